"""One block of SdP-Net on one token buffer: what it copies, what it keeps for backward, how exact it is."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sdp_kernels
from sdp_kernels.backends import BACKENDS
from sdpnet import SdPNetConfig
from sdpnet.models.layers import Block, Part

GRID, REGISTERS, DIM = (4, 6), 3, 32
TOKENS = REGISTERS + GRID[0] * GRID[1]
CONFIG = SdPNetConfig(
    num_classes=5, image_size=(16, 24), patch_size=4, dim=DIM, blocks=1, conv_blocks=2, kernel_size=3, heads=2,
    registers=REGISTERS, dropout=0.0,
)  # fmt: skip
MASKS = {"dropout": 0.2, "attention_dropout": 0.1, "projection_dropout": 0.2, "drop_path": 0.3}
OPTIONS = {
    "gelu": {},
    "kelu": {"activation": "kelu"},
    "encoder first": {"conv_first": False},
    "biases and layer scale": {"depthwise_bias": True, "pointwise_bias": True, "layer_scale": 0.5},
    "masks": MASKS,
    "gated": {"gated_ffn": True, **MASKS},
    "no q/k norm": {"qk_norm": False},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
COPIES = ("aten::copy_", "aten::clone", "aten::cat", "aten::_to_copy", "aten::slice_backward")
SUMS = ("aten::add", "aten::add_")
PYTORCHS_PRODUCTS = {"aten::mm", "aten::linear"}
OUR_PRODUCTS = (
    {f"sdp_kernels_cpp::linear_gemm_{which}" for which in ("fwd", "bwd", "dgrad", "wgrad")}
    if torch.bfloat16 in BACKENDS["cpu"].multiplies
    else set()
)
"""What the fused block multiplies with, if not with PyTorch's."""


def make(fused, dtype, **options):
    """A block with parameters off their start, and its input."""
    torch.manual_seed(0)
    block = Block(CONFIG.replace(**options), CONFIG.replace(**options).drop_path[1], itertools.count())
    for parameter in block.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for part in block.modules():
        if isinstance(part, Part):
            part.backend = None if fused else "reference"
    return block.to(dtype)


def tokens(batch, dtype):
    x = torch.randn(batch, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    return x.bfloat16().to(dtype).requires_grad_()


def passes(block, x, grad):
    """Forward and backward: the result and the gradients of x and of every parameter."""
    y = block(x, GRID, sdp_kernels.make_rng(4, step=2))
    names = ["x", *(name for name, _ in block.named_parameters())]
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, [x, *block.parameters()], grad), strict=True))}


def inside(event, name):
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


def large_passes(block, batch, autocast, products):
    """Names of the copies and sums of B·T·C elements or more, with their shapes; ``products`` must have been seen.

    Not those inside addmm: on the CPU that is how PyTorch's own GEMM begins with its bias.
    """
    x = tokens(batch, torch.bfloat16)
    grad = torch.randn_like(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        passes(block, x, grad)  # what happens once only is not looked at
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            passes(block, x, grad)
    events = profiled.events()
    assert products <= {event.name for event in events}
    return {
        (event.name, str(event.input_shapes))
        for event in events
        if event.name in COPIES + SUMS
        and not inside(event, "aten::addmm")
        and any(torch.Size(shape).numel() >= x.numel() for shape in event.input_shapes if isinstance(shape, list))
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@every_option
def test_fused_block_copies_nothing_as_large_as_the_token_buffer(options, autocast):
    """And adds nothing so large: gradients of residuals join in a norm's backward pass, except that of a gate's input.

    With parameters so few that a copy of one of them is smaller.
    """
    dtype = torch.float32 if autocast else torch.bfloat16
    found = large_passes(make(True, dtype, **options), 16, autocast, OUR_PRODUCTS or PYTORCHS_PRODUCTS)
    gate = {"aten::add_" if OUR_PRODUCTS else "aten::add"} if "gated_ffn" in options else set()
    assert len(found) == len(gate) and {name for name, _ in found} == gate, found
    found = large_passes(make(False, dtype, **options), 16, autocast, PYTORCHS_PRODUCTS)
    assert {"aten::copy_", "aten::clone", "aten::_to_copy", "aten::add"} <= {name for name, _ in found}


def live_bytes(block, x):
    """What stays between forward and backward beside x, the result and the parameters."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = block(x, GRID, sdp_kernels.make_rng(4))
    for t in (x, y, *block.parameters()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@every_option
def test_fused_block_keeps_at_most_six_tenths(options):
    fused, unfused = (live_bytes(make(f, torch.bfloat16, **options), tokens(32, torch.bfloat16)) for f in (True, False))
    assert fused <= 0.6 * unfused, fused / unfused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_option
def test_fused_block_is_as_exact_as_the_unfused(options, dtype):
    """Error against fp64 at most twice the unfused block's, plus a few roundings of the largest gradient beside."""
    grad = torch.randn(4, TOKENS, DIM, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact, unfused, fused = (
        passes(make(f, d, **options), tokens(4, d), grad.to(d))
        for f, d in ((False, torch.float64), (False, dtype), (True, dtype))
    )
    eps = torch.finfo(dtype).eps
    for name, right in exact.items():
        # Softmax does not see a shift of all keys: the exact gradient is 0.
        size = exact[name.replace("k_norm.bias", "k_norm.weight")].norm().item()
        ours, theirs = ((g[name].double() - right).norm().item() for g in (fused, unfused))
        assert fused[name].dtype == dtype and size > 0
        assert ours <= 2 * theirs + 4 * eps * size, (name, ours / size, theirs / size)


def test_fused_block_compiles_in_one_graph():
    torch._dynamo.reset()
    block = make(True, torch.float32, **MASKS)
    x, grad = tokens(3, torch.float32), torch.ones(3, TOKENS, DIM)
    wanted = passes(block, x, grad)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y = compiled(x, GRID, sdp_kernels.make_rng(4, step=2))
    gradients = torch.autograd.grad(y, [x, *block.parameters()], grad)
    for a, b in zip([y, *gradients], wanted.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item() + 1e-6)
