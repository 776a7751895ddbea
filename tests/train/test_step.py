"""The training step: accumulation, clipping, the guard, meta tensors, fused against unfused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import sdp_kernels
from sdpnet import create_model
from sdpnet.ema import EMA
from sdpnet.loss import classification_loss
from sdpnet.optim import FiniteGuard, build_optimizer
from sdpnet.train import TrainingError, train_step

OPTIONS = {
    "dim": 16,
    "heads": 2,
    "blocks": 2,
    "patch_size": 2,
    "conv_blocks": 1,
    "dropout": 0.2,
    "drop_path": (0.1, 0.3),
}


def parts_of(device: torch.device, sizes: list[int], dtype: torch.dtype = torch.float32, step: int = 0):
    """Micro-batches of these sizes that together are always the same batch."""
    generator = torch.Generator().manual_seed(step)
    total = sum(sizes)
    images = torch.randn(total, 1, 8, 8, generator=generator, dtype=torch.float64).to(device, dtype)
    labels = torch.randint(10, (total,), generator=generator).to(device)
    first = [0, *itertools.accumulate(sizes)]
    return [
        (images[a:b], labels[a:b], sdp_kernels.make_rng(3, step, a, device=device))
        for a, b in itertools.pairwise(first)
    ]


class Bench:
    """A model with all that a step needs."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, fused: bool = False, **options):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.model = create_model("sdpnet_digits", fused=fused, **{**OPTIONS, **options}).to(self.device, dtype).train()
        self.ema = EMA(self.model, 0.9)
        self.optimizer = build_optimizer(self.model, weight_decay=0.05)
        self.guard = FiniteGuard(self.device)

    def step(self, parts, step: int = 0, lr: float = 0.01, **options) -> torch.Tensor:
        loss_of = lambda z, t: classification_loss(z, t, smoothing=0.1)  # noqa: E731
        return train_step(self.model, self.optimizer, self.ema, self.guard, parts, loss_of, step=step, lr=lr, **options)

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [12, 12, 8], [16, 16], [31, 1]])
@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_is_the_big_batch_with_dropout_on(sizes, fused):
    whole, parts = Bench(dtype=torch.float64, fused=fused), Bench(dtype=torch.float64, fused=fused)
    a = whole.step(parts_of(whole.device, [32], torch.float64))
    b = parts.step(parts_of(whole.device, sizes, torch.float64))
    assert (whole.gradient() - parts.gradient()).norm() <= 1e-10 * whole.gradient().norm()
    assert b.item() == pytest.approx(a.item(), rel=1e-10)


def test_accumulation_needs_the_samples_places():
    """The masks really differ from sample to sample: without first_sample the gradient is another."""
    whole, parts = Bench(dtype=torch.float64), Bench(dtype=torch.float64)
    whole.step(parts_of(whole.device, [32], torch.float64))
    split = [(x, t, sdp_kernels.make_rng(3, 0, 0)) for x, t, _ in parts_of(whole.device, [16, 16], torch.float64)]
    parts.step(split)
    assert (whole.gradient() - parts.gradient()).norm() > 1e-3 * whole.gradient().norm()


def test_clipping_is_of_the_accumulated_gradient():
    free, clipped = Bench(), Bench()
    free.step(parts_of(free.device, [16, 16]))
    norm = free.gradient().norm()
    clipped.step(parts_of(free.device, [16, 16]), clip=norm.item() / 4)
    torch.testing.assert_close(clipped.gradient(), free.gradient() / 4, rtol=1e-4, atol=1e-7)
    loose = Bench()
    loose.step(parts_of(free.device, [16, 16]), clip=norm.item() * 4)
    assert torch.equal(loose.gradient(), free.gradient())


@pytest.mark.parametrize("fused", [False, True])
def test_step_runs_on_meta_tensors(fused):
    """… so nothing in it waits for, or asks, the device."""
    bench = Bench("meta", fused=fused)
    loss = bench.step(parts_of(bench.device, [8, 4]), clip=1.0)
    assert loss.device.type == "meta" and loss.shape == () and loss.dtype == torch.float32
    assert all(p.grad is not None for p in bench.model.parameters())


def test_bf16_learns_and_keeps_fp32_weights():
    bench = Bench(dropout=0.0, drop_path=0.0)
    losses = [bench.step(parts_of(bench.device, [32]), i, bf16=True).item() for i in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert (
        {p.dtype for p in bench.model.parameters()}
        == {torch.float32}
        == {p.grad.dtype for p in bench.model.parameters()}
    )


def test_fused_agrees_with_unfused_over_twenty_steps():
    plain, fused = Bench(activation="kelu"), Bench(activation="kelu", fused=True)
    assert torch.equal(plain.weights(), fused.weights())
    for i in range(20):
        parts = parts_of(plain.device, [24, 8], step=i)
        a, b = plain.step(parts, i, lr=1e-3, clip=5.0), fused.step(parts, i, lr=1e-3, clip=5.0)
        assert b.item() == pytest.approx(a.item(), rel=1e-4), f"step {i}"


def test_dropout_is_on_in_that_comparison():
    a, b = Bench(), Bench()
    parts = parts_of(a.device, [32])
    other = [(x, t, sdp_kernels.make_rng(4)) for x, t, _ in parts]
    assert abs(a.step(parts).item() - b.step(other).item()) > 1e-3


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poison):
    bench = Bench()
    bench.step(parts_of(bench.device, [16]), 0)
    before = (
        bench.weights(),
        copy.deepcopy(bench.optimizer.state_dict()),
        copy.deepcopy(bench.ema.module.state_dict()),
    )
    parts = parts_of(bench.device, [16], step=1)
    if poison == "loss":
        parts[0][0][3, 0, 2, 2] = float("nan")
    else:
        next(bench.model.parameters()).register_hook(lambda g: g * float("inf"))
    bench.step(parts, 1, clip=1.0)
    bench.step(parts_of(bench.device, [16], step=2), 2)  # the guard is sticky: the host may look late
    assert bench.guard.first_bad_step() == 1
    assert torch.equal(bench.weights(), before[0])
    for name, tensor in bench.ema.module.state_dict().items():
        assert torch.equal(tensor, before[2][name])
    for index, state in bench.optimizer.state_dict()["state"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, before[1]["state"][index][key]), key


def test_a_run_stops_with_the_place_of_the_bad_step(trainer, monkeypatch):
    run, calls = trainer(), itertools.count()
    micro_batches = run.micro_batches

    def spoil(batch):
        parts = micro_batches(batch)
        if next(calls) == 5:
            parts[0][0][0] = float("inf")
        return parts

    monkeypatch.setattr(run, "micro_batches", spoil)
    with pytest.raises(TrainingError, match=r"epoch 2, step 5 \(samples 400"):
        run.train()
    assert torch.isfinite(torch.cat([p.flatten() for p in run.model.parameters()])).all()
