"""Every option of SdP-Net in one frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdp_kernels import ACTIVATIONS

from . import checks

POSITIONS = ("axial", "neighbourhood")
HEADS = ("tanh", "simple", "mean")
KERNEL_SIZES = (3, 5, 7, 9)


@dataclass(frozen=True)
class SdPNetConfig:
    """Options of :class:`sdpnet.models.SdPNet`. The equations are in the class's docstring.

    Wrong values raise ``ValueError`` or ``TypeError`` that name the option, before any parameter is made.
    """

    num_classes: int = 1000
    in_channels: int = 3
    image_size: int | tuple[int, int] = 224
    """Pixels, one side or (height, width): the native size. Others work too, by interpolated positions."""
    patch_size: int | tuple[int, int] = 14
    dim: int = 768
    blocks: int = 6
    conv_blocks: int = 2
    """ConvMLPs per block."""
    conv_first: bool = True
    """True: a block is its ConvMLPs, then its encoder. False: the encoder first (the original's own setting)."""
    kernel_size: int = 7
    conv_ratio: float = 4.0
    """Hidden width of a ConvMLP's second branch over ``dim``."""
    depthwise_bias: bool = False
    pointwise_bias: bool = False
    """Biases of the three 1×1 convolutions of a ConvMLP."""
    heads: int = 8
    qk_norm: bool = True
    ffn_ratio: float = 4.0
    """Hidden width of the encoder's feed-forward half over ``dim``."""
    gated_ffn: bool = False
    """W₂(act(W₁x) ⊙ Vx) instead of W₂ act(W₁x)."""
    activation: str = "gelu"
    embedding_activation: str = "none"
    position: str = "axial"
    """"axial": one learned vector per row and one per column. "neighbourhood": a C×(H+k)×(W+k) field, cropped to
    (H+k−1)×(W+k−1) and average-pooled k×k at stride 1."""
    position_kernel: int = 5
    """k of the neighbourhood embedding."""
    position_trainable: bool = True
    """False freezes the neighbourhood embedding's field (a buffer, as in the original)."""
    registers: int = 5
    layer_scale: float | None = None
    """Initial value of every γ; None = no LayerScale (the original)."""
    head: str = "tanh"
    """"simple": LN → Linear on the registers' mean. "tanh": LN → Linear(C, K) → tanh → dropout → Linear(K, K) on it.
    "mean": Linear on the image tokens' mean."""
    head_bias: bool = False
    dropout: float = 0.2
    """In the encoder's feed-forward half, after each of its linears."""
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0
    """After the attention's output projection."""
    head_dropout: float = 0.0
    """Between the two linears of the tanh head."""
    drop_path: float | tuple[float, float] = (0.0, 0.0)
    """(p₀, p₁), rates of the first and the last block; p alone means (0, p). The final encoder drops none."""
    conv_eps: float = 1e-6
    """eps of the LayerNorms in the ConvMLPs."""
    token_eps: float = 1e-5
    """eps of the other LayerNorms."""
    residual_dtype: str | None = None
    """Of the token buffer under autocast: None = the autocast dtype, "float32" keeps it fp32. Without autocast it is in
    the parameters' dtype."""

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  frozen: only here
        for name in ("num_classes", "in_channels", "dim", "blocks", "heads"):
            put(name, checks.integer(name, getattr(self, name), 1))
        for name in ("conv_blocks", "registers"):
            put(name, checks.integer(name, getattr(self, name), 0))
        for name in ("image_size", "patch_size"):
            put(name, checks.pair(name, getattr(self, name), 1))
        put("position_kernel", checks.integer("position_kernel", self.position_kernel, 1))
        for name in ("conv_ratio", "ffn_ratio", "conv_eps", "token_eps"):
            put(name, checks.positive(name, getattr(self, name)))
        if self.layer_scale is not None:
            put("layer_scale", checks.positive("layer_scale", self.layer_scale))
        for name in ("dropout", "attention_dropout", "projection_dropout", "head_dropout"):
            put(name, checks.rate(name, getattr(self, name)))
        for field in dataclasses.fields(self):
            if field.type == "bool":
                checks.flag(field.name, getattr(self, field.name))
        for name, options in (("activation", ACTIVATIONS), ("embedding_activation", ACTIVATIONS)):
            checks.choice(name, getattr(self, name), options)
        checks.choice("position", self.position, POSITIONS)
        checks.choice("head", self.head, HEADS)
        if self.residual_dtype is not None:
            checks.choice("residual_dtype", self.residual_dtype, ("float32",))
        self._check_drop_path(put)
        self._check_sizes()

    def _check_drop_path(self, put) -> None:
        given = self.drop_path if isinstance(self.drop_path, list | tuple) else (0.0, self.drop_path)
        if len(given) != 2:
            raise ValueError(f"drop_path must be one rate or (first, last), got {self.drop_path!r}")
        put("drop_path", (checks.rate("drop_path[0]", given[0]), checks.rate("drop_path[1]", given[1])))

    def _check_sizes(self) -> None:
        for side, pixels, patch in zip(("height", "width"), self.image_size, self.patch_size, strict=True):
            if pixels % patch:
                raise ValueError(
                    f"image_size must be a multiple of patch_size, got {side} {pixels} with patches of {patch}"
                )
        if self.kernel_size not in KERNEL_SIZES:
            raise ValueError(f"kernel_size must be one of {KERNEL_SIZES}, got {self.kernel_size!r}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got dim {self.dim} with {self.heads} heads")
        if self.dim // self.heads % 8 or self.dim // self.heads > 128:
            raise ValueError(
                f"dim / heads, the head dimension, must be a multiple of 8 up to 128, got {self.dim} / {self.heads} = "
                f"{self.dim // self.heads}"
            )
        for name in ("conv_ratio", "ffn_ratio"):
            if int(getattr(self, name) * self.dim) < 1:
                raise ValueError(f"{name} · dim must be at least 1, got {getattr(self, name)} · {self.dim}")
        if self.registers == 0 and self.head != "mean":
            raise ValueError(f"registers must be at least 1 for head={self.head!r}, which reads them, got 0")
        if self.blocks == 1 and self.drop_path[0] not in (0.0, self.drop_path[1]):
            raise ValueError(f"drop_path with one block takes one rate, got {self.drop_path}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens at the native image size."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """One rate per block, evenly spaced from p₀ to p₁ with both reached; a single block gets p₁."""
        first, last = self.drop_path
        if self.blocks == 1:
            return (last,)
        steps = self.blocks - 1
        return (*(first + (last - first) * i / steps for i in range(steps)), last)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only (pairs as lists), as JSON and YAML hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SdPNetConfig:
        """The inverse of :meth:`to_dict`; an unknown key raises ``TypeError`` with the nearest right one."""
        checks.known_keys("model option", options, (field.name for field in dataclasses.fields(cls)))
        return cls(**options)

    def replace(self, **overrides: Any) -> SdPNetConfig:
        """A copy with some options changed, checked like a new one."""
        return self.from_dict({**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **overrides})
