"""Nothing in a fused training step waits for the device or reads from it: it can be captured into a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sdp_kernels
from sdpnet import create_model
from sdpnet.ema import EMA
from sdpnet.loss import classification_loss
from sdpnet.optim import FiniteGuard, build_optimizer
from sdpnet.train import train_step

OPTIONS = {"dim": 32, "heads": 2, "blocks": 1, "patch_size": 2, "conv_blocks": 1, "dropout": 0.2, "drop_path": 0.1}

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # copying a model does


class Names(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


class Mode(FakeTensorMode):
    """A fake mode that copied models stay in."""

    def __deepcopy__(self, memo):
        return self


def make_fake(module: torch.nn.Module) -> None:
    """Parameters without data, in the current fake mode."""
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad)


def fake_step(model: torch.nn.Module) -> set[str]:
    """A step on tensors without data: whoever asks for a value gets DataDependentOutputException."""
    with Mode(allow_non_fake_inputs=False):
        make_fake(model)
        ema = EMA(model, 0.9)
        optimizer, guard = build_optimizer(model, weight_decay=0.05), FiniteGuard(torch.device("cpu"))
        images, targets = torch.empty(2, 1, 8, 8), torch.empty(2, dtype=torch.int64)
        parts = [(images, targets, torch.empty(3, dtype=torch.int64))]
        with Names() as names:
            train_step(
                model, optimizer, ema, guard, parts, classification_loss, step=3, lr=1e-3, clip=1.0, bf16=True
            )  # fmt: skip
    return names.seen


def test_the_fused_step_reads_nothing_back():
    if sdp_kernels.backends.BACKENDS["cpu"].absent is not None:
        pytest.skip("the CPU kernels are not built")  # then there is no fused step here
    seen = fake_step(create_model("sdpnet_digits", fused=True, **OPTIONS).train())
    for kernel in ("layer_norm_2d", "depthwise_conv2d", "linear_epilogue", "register_attention"):
        for which in ("fwd", "bwd"):
            assert any(f"::{kernel}_{which}" in name for name in seen), f"{kernel}_{which} did not run"


def test_reading_a_value_would_be_noticed():
    model = create_model("sdpnet_digits", fused=True, **OPTIONS).train()
    head = model.head.forward
    model.head.forward = lambda x, rng: head(x, rng) * (1.0 if x.sum() > 0 else 2.0)
    with pytest.raises(DataDependentOutputException):
        fake_step(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_replays_on_other_data():
    """Two steps by replay against two steps run as they come, same data: equal weights."""
    device = torch.device("cuda")
    weights = {}
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 1, 8, 8, generator=generator).to(device) for _ in range(2)]
    for captured in (False, True):
        torch.manual_seed(0)
        model = create_model("sdpnet_digits", fused=True, **OPTIONS).to(device).train()
        ema, optimizer, guard = EMA(model, 0.9), build_optimizer(model, weight_decay=0.05), FiniteGuard(device)
        images, targets = batches[0].clone(), torch.arange(4, device=device)
        rng = sdp_kernels.make_rng(3, 0, 0, device=device)

        def step(model=model, ema=ema, optimizer=optimizer, guard=guard, images=images, targets=targets, rng=rng):
            parts = [(images, targets, rng)]
            train_step(
                model, optimizer, ema, guard, parts, classification_loss, step=100, lr=1e-3, clip=1.0, bf16=True
            )  # fmt: skip

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        run = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        for number, batch in enumerate(batches):
            images.copy_(batch)
            rng.copy_(sdp_kernels.make_rng(3, number, 0, device=device))
            run()
        weights[captured] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights[False], weights[True])
