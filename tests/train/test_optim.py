"""Learning rate, parameter groups and the non-finite guard."""

from __future__ import annotations

import math

import pytest
import torch

from sdpnet import create_model
from sdpnet.optim import FiniteGuard, build_optimizer, learning_rate, parameter_groups, scaled_lr


def test_rate_rule():
    assert scaled_lr(0.001, 960) == pytest.approx(0.001875, rel=1e-12)  # the recipe's own figure


def test_rate_table_is_the_formula():
    peak, floor, warmup, cycle, growth = 0.5, 0.01, 7, 20, 1.5
    table = [
        learning_rate(s, peak=peak, floor=floor, warmup_steps=warmup, cycle_steps=cycle, cycle_growth=growth)
        for s in range(7 + 20 + 30 + 45 + 3)
    ]
    wanted = [peak * (i + 1) / 8 for i in range(7)]
    for length in (20, 30, 45):
        wanted += [floor + (peak - floor) / 2 * (1 + math.cos(math.pi * t / length)) for t in range(length)]
    assert table[: len(wanted)] == pytest.approx(wanted, rel=1e-12)
    restarts = [s for s in range(7, len(table)) if table[s] == peak]
    assert restarts == [7, 27, 57, 102]


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(0, peak=1.0, floor=0.0, warmup_steps=0, cycle_steps=10) == 1.0


def test_every_step_of_a_run_gets_its_own_rate(trainer):
    run = trainer("optim.base_lr=0.002", "optim.lr=null", "schedule.cycle_epochs=1", "schedule.min_lr=0.1")
    assert run.order.steps == 4
    peak = 0.002 * 400 / 512
    assert run.lr(0) == pytest.approx(peak / 5)
    assert [run.lr(s) for s in (4, 8)] == pytest.approx([peak, peak])  # a restart per epoch after the warm-up
    assert run.lr(6) == pytest.approx(peak * 0.1 + peak * 0.9 / 2)


def test_decay_is_on_matrices_only():
    model = create_model("sdpnet_digits", layer_scale=0.1, registers=3)
    decayed, spared = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0.0
    assert len(decayed["names"]) + len(spared["names"]) == len(list(model.parameters()))
    shapes = dict(model.named_parameters())
    assert all(shapes[name].ndim >= 2 for name in decayed["names"])
    assert {n for n in shapes if "bias" in n or "norm" in n or "register" in n or "scale" in n} <= set(spared["names"])


def test_frozen_parameters_are_left_out():
    model = create_model("sdpnet_digits")
    frozen = next(n for n in parameter_groups(model, 0.1)[0]["names"])
    dict(model.named_parameters())[frozen].requires_grad_(False)
    assert frozen not in parameter_groups(model, 0.1)[0]["names"]


def test_adamw_is_the_formula():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    model.no_weight_decay = lambda: {"bias"}
    optimizer = build_optimizer(model, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
    weight, m, v = model.weight.detach().clone(), 0.0, 0.0
    for t in (1, 2, 3):
        gradient = torch.randn(2, 3, dtype=torch.float64)
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-14)


def test_guard_keeps_the_first_bad_step():
    guard = FiniteGuard(torch.device("cpu"))
    good, nan, inf = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))
    guard.update(0, good, good)
    assert guard.first_bad_step() is None
    guard.update(1, good, inf)
    guard.update(2, nan, good)
    guard.update(3, good, good)
    assert guard.first_bad_step() == 1 and guard.tripped == 1
