"""The original SdP-Net's names: its options and tensors against ours, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .models import SdPNet, SdPNetConfig, checks

DEFAULTS: dict[str, Any] = {
    "embedding_dim": 128, "num_blocks": 10, "n_head": 4, "activation": "gelu", "conv_kernel_size": 5, "patch_size": 16,
    "ffn_dropout": 0.2, "attn_dropout": 0.2, "output_classes": 1000, "conv_block_num": 2, "ff_multiplication_factor": 4,
    "max_image_size": [14, 14], "max_num_registers": 5, "embedding_activation": "none", "conv_first": True,
    "head_output_from_register": False, "simple_mlp_output": False, "output_head_bias": False, "normalize_qv": True,
    "stochastic_depth_p": [0.0, 0.0], "mixer_deptwise_bias": False, "mixer_ffn_bias": False, "fast_att": True,
    "conv_embedding": False, "conv_embedding_kernel_size": 5,
}  # fmt: skip
"""The original's options and the values it takes for those not given."""

INDEX_BUFFERS = tuple(
    f"embedding_layer.{n}" for n in ("horizontal_embedding", "vertical_embedding", "register_embeddings", "register")
)
"""Integer ranges in the original's state dict that hold nothing learned."""

DEFAULT_REGISTERS = 4
"""The original's forward takes ``num_registers = 3`` and uses one more."""


def config_from_original(
    options: Mapping[str, Any], *, registers: int | None = None, grid: tuple[int, int] | None = None
) -> SdPNetConfig:
    """Our options for the original's (whose tables are max_image_size[1] rows by max_image_size[0] columns).

    :param registers: registers in use; None = the original's default of 4, or all there are if fewer.
    :param grid: rows and columns of tokens in use; None = the tables' sizes.
    :raises TypeError: unknown option. ValueError: more registers or rows than the tables hold.
    """
    checks.known_keys("option of the original", options, DEFAULTS)
    o = {**DEFAULTS, **options}
    for name in ("max_image_size", "stochastic_depth_p"):
        if not isinstance(o[name], list | tuple) or len(o[name]) != 2:
            raise ValueError(f"{name} must be a list of two numbers, got {o[name]!r}")
    sizes = checks.pair("max_image_size", o["max_image_size"], 1)
    neighbourhood = checks.flag("conv_embedding", o["conv_embedding"])
    table = sizes if neighbourhood else sizes[::-1]
    grid = table if grid is None else checks.pair("grid", grid, 1)
    if grid[0] > table[0] or grid[1] > table[1]:
        raise ValueError(f"grid must fit into the embedding's {table[0]}×{table[1]}, got {grid[0]}×{grid[1]}")
    held = checks.integer("max_num_registers", o["max_num_registers"], 1) - neighbourhood  # row 0 is out of its reach
    registers = min(DEFAULT_REGISTERS, held) if registers is None else checks.integer("registers", registers, 1)
    if registers > held:
        raise ValueError(f"registers must be at most {held}, what the original's table offers, got {registers}")
    patch = checks.integer("patch_size", o["patch_size"], 1)
    first, last = o["stochastic_depth_p"]
    ffn, attention = o["ffn_dropout"], o["attn_dropout"]
    from_register = checks.flag("head_output_from_register", o["head_output_from_register"])
    simple = checks.flag("simple_mlp_output", o["simple_mlp_output"])
    return SdPNetConfig(
        num_classes=o["output_classes"], in_channels=3, image_size=(grid[0] * patch, grid[1] * patch), patch_size=patch,
        dim=o["embedding_dim"], blocks=o["num_blocks"], conv_blocks=o["conv_block_num"], conv_first=o["conv_first"],
        kernel_size=o["conv_kernel_size"], conv_ratio=4, depthwise_bias=o["mixer_deptwise_bias"],
        pointwise_bias=o["mixer_ffn_bias"], heads=o["n_head"], qk_norm=o["normalize_qv"],
        ffn_ratio=o["ff_multiplication_factor"], activation=_lower(o["activation"]),
        embedding_activation=_lower(o["embedding_activation"]),
        position="neighbourhood" if neighbourhood else "axial", position_kernel=o["conv_embedding_kernel_size"],
        position_trainable=not neighbourhood, registers=registers,
        head="mean" if not from_register else "simple" if simple else "tanh", head_bias=o["output_head_bias"],
        # One rate serves the original's feed-forward half, its output projection and its head; without its fast
        # attention the attention too.
        dropout=ffn, projection_dropout=ffn, head_dropout=ffn, attention_dropout=attention if o["fast_att"] else ffn,
        drop_path=(first, last) if o["num_blocks"] != 1 else first,
    )  # fmt: skip


def _lower(name: Any) -> Any:
    return name.lower() if isinstance(name, str) else name


class Entry(NamedTuple):
    """One tensor of ours and where the original keeps it."""

    ours: str
    theirs: tuple[str, ...]
    """Several are stacked along dimension 0."""
    shape: tuple[int, ...]
    """Of each of theirs; 0 stands for any size at least what ``window`` reads."""
    window: tuple[slice, ...] | None = None
    """The part of theirs that is in use; the rest gets no gradient."""


def entries(config: SdPNetConfig) -> Iterator[Entry]:
    """Every tensor of the model with ``config`` that the original has too."""
    dim, (rows, columns), (p, q) = config.dim, config.grid, config.patch_size
    first = int(config.position == "neighbourhood")
    yield Entry("embedding.patch.weight", ("conv_init.conv.weight",), (dim, config.in_channels, p, q))
    table = "embedding_layer.{}_embedding_layer.weight"
    used = slice(first, first + config.registers)
    yield Entry("embedding.registers", (table.format("register"),), (0, dim), (used,))
    if config.position == "axial":  # the original's "horizontal" table is indexed by rows
        yield Entry("embedding.position.rows", (table.format("horizontal"),), (0, dim), (slice(0, rows),))
        yield Entry("embedding.position.columns", (table.format("vertical"),), (0, dim), (slice(0, columns),))
    else:
        k = config.position_kernel
        window = (slice(0, 1), slice(0, dim), slice(0, rows + k), slice(0, columns + k))
        yield Entry("embedding.position.field", ("embedding_layer.bone",), (1, dim, 0, 0), window)
    for i in range(config.blocks):
        for j in range(config.conv_blocks):
            yield from _conv(config, f"blocks.{i}.convs.{j}.", f"blocks.{i}.conv_blocks.{j}.")
        yield from _encoder(config, f"blocks.{i}.encoder.", f"blocks.{i}.t_block.")
    yield from _encoder(config, "encoder.", "final_block.t_block.")
    yield from _head(config)


def _conv(config: SdPNetConfig, ours: str, theirs: str) -> Iterator[Entry]:
    dim, hidden, k = config.dim, int(config.conv_ratio * config.dim), config.kernel_size
    for i in (1, 2):
        for a, b in (("weight", "gamma"), ("bias", "beta")):
            yield Entry(f"{ours}norm{i}.{a}", (f"{theirs}layer_norm_{i}.{b}",), (dim,))
    parts = (
        ("depthwise", "conv2d.0", (dim, 1, k, k), config.depthwise_bias),
        ("pointwise", "conv2d.1", (dim, dim, 1, 1), config.pointwise_bias),
        ("expand", "conv1d.0", (hidden, dim, 1, 1), config.pointwise_bias),
        ("project", "conv1d.2", (dim, hidden, 1, 1), config.pointwise_bias),
    )
    for a, b, shape, bias in parts:
        yield Entry(f"{ours}{a}.weight", (f"{theirs}{b}.weight",), shape)
        if bias:
            yield Entry(f"{ours}{a}.bias", (f"{theirs}{b}.bias",), shape[:1])


def _encoder(config: SdPNetConfig, ours: str, theirs: str) -> Iterator[Entry]:
    dim, hidden, head = config.dim, int(config.ffn_ratio * config.dim), config.dim // config.heads
    yield Entry(f"{ours}qkv.weight", tuple(f"{theirs}{n}_proj.weight" for n in "qkv"), (dim, dim))
    yield Entry(f"{ours}out.weight", (f"{theirs}o_proj.weight",), (dim, dim))
    for name in ("weight", "bias"):
        for norm in ("norm1", "norm2"):
            yield Entry(f"{ours}{norm}.{name}", (f"{theirs}{norm}.{name}",), (dim,))
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            yield Entry(f"{ours}{norm}.{name}", (f"{theirs}{norm}.{name}",), (head,))
    for a, b, shape in (("up", "ff_linear1", (hidden, dim)), ("down", "ff_linear2", (dim, hidden))):
        yield Entry(f"{ours}{a}.weight", (f"{theirs}{b}.weight",), shape)
        yield Entry(f"{ours}{a}.bias", (f"{theirs}{b}.bias",), shape[:1])


def _head(config: SdPNetConfig) -> Iterator[Entry]:
    dim, classes, head = config.dim, config.num_classes, "output_head.output_head."
    if config.head != "mean":
        for name in ("weight", "bias"):
            yield Entry(f"head.norm.{name}", (f"{head}0.{name}",), (dim,))
    layers = [("first", "2" if config.head == "mean" else "1", (classes, dim))]
    if config.head == "tanh":
        layers.append(("second", "4", (classes, classes)))
    for a, b, shape in layers:
        yield Entry(f"head.{a}.weight", (f"{head}{b}.weight",), shape)
        if config.head_bias:
            yield Entry(f"head.{a}.bias", (f"{head}{b}.bias",), shape[:1])


def _fits(shape: tuple[int, ...], entry: Entry) -> bool:
    if len(shape) != len(entry.shape):
        return False
    ends = [w.stop for w in entry.window or ()] + [0] * len(shape)
    sides = zip(shape, entry.shape, ends, strict=False)
    return all(got >= end if want == 0 else got == want for got, want, end in sides)


def from_original(state: Mapping[str, Tensor], config: SdPNetConfig) -> dict[str, Tensor]:
    """Our state dict for the original's.

    :raises ValueError: naming every tensor that is missing, unknown or of a wrong shape.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SdPNet(config).state_dict().items()}
    table = list(entries(config))
    wanted = {name: entry for entry in table for name in entry.theirs}
    faults = [f"missing {name}" for name in wanted if name not in state]
    faults += [f"unknown {name}" for name in state if name not in wanted and name not in INDEX_BUFFERS]
    for name, entry in wanted.items():
        if name in state and not _fits(tuple(state[name].shape), entry):
            want = "×".join(str(n) if n else "enough" for n in entry.shape)
            faults.append(f"misshapen {name}: {'×'.join(map(str, state[name].shape))}, wanted {want}")
    if faults:
        raise ValueError("the checkpoint does not fit the options:\n  " + "\n  ".join(faults))
    ours = {}
    for entry in table:
        parts = [state[name][entry.window or ()] for name in entry.theirs]
        ours[entry.ours] = torch.cat(parts).reshape(shapes[entry.ours]).clone()
    return ours


def to_original(
    tensors: Mapping[str, Tensor], config: SdPNetConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The inverse of :func:`from_original` for weights or gradients, under the original's names.

    :param shapes: of the original's tensors; rows of its tables that are not in use come back as zeros.
    """
    theirs = {}
    for entry in entries(config):
        if entry.ours not in tensors:
            continue
        for name, part in zip(entry.theirs, tensors[entry.ours].chunk(len(entry.theirs)), strict=True):
            whole = part.new_zeros(shapes[name])
            whole[entry.window or ()] = part.reshape(whole[entry.window or ()].shape)
            theirs[name] = whole
    return theirs
