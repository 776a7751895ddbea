"""Losses against PyTorch's own, the moving average against its closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sdpnet.ema import EMA
from sdpnet.loss import classification_loss, soft_targets

torch.manual_seed(0)
LOGITS = torch.randn(6, 5, dtype=torch.float64)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    wanted = F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    assert classification_loss(LOGITS, LABELS, smoothing=smoothing).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_soft_targets_of_both_kinds_agree():
    one_hot = F.one_hot(LABELS, 5).double()
    for kind in ("ce", "bce"):
        a = classification_loss(LOGITS, LABELS, kind=kind, smoothing=0.2)
        b = classification_loss(LOGITS, one_hot, kind=kind, smoothing=0.2)
        assert a.item() == pytest.approx(b.item(), rel=1e-12)


def test_mixed_targets():
    soft = torch.softmax(torch.randn(6, 5, dtype=torch.float64), dim=1)
    wanted = F.cross_entropy(LOGITS, soft)
    assert classification_loss(LOGITS, soft).item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("reduction, factor", [("mean", 1), ("sum", 5)])
def test_binary_cross_entropy(reduction, factor):
    wanted = F.binary_cross_entropy_with_logits(LOGITS, soft_targets(LABELS, 5, 0.1, torch.float64)) * factor
    got = classification_loss(LOGITS, LABELS, kind="bce", smoothing=0.1, class_reduction=reduction)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_smoothing_does_not_turn_every_class_on():
    target = soft_targets(LABELS, 5, 0.1)
    assert target.sum(dim=1).tolist() == pytest.approx([1.0] * 6)
    assert target[0].tolist() == pytest.approx([0.92, 0.02, 0.02, 0.02, 0.02])


def test_half_precision_logits_are_reduced_in_fp32():
    assert classification_loss(LOGITS.bfloat16(), LABELS).dtype == torch.float32


@pytest.mark.parametrize(
    "logits, targets, options, word",
    [
        (LOGITS, LABELS[:5], {}, "targets"),
        (LOGITS, torch.zeros(6, 4), {}, "targets"),
        (LOGITS, LABELS, {"kind": "mse"}, "kind"),
        (LOGITS, LABELS, {"class_reduction": "max"}, "class_reduction"),
    ],
)
def test_wrong_arguments_are_named(logits, targets, options, word):
    with pytest.raises(ValueError, match=word):
        classification_loss(logits, targets, **options)


@pytest.mark.parametrize("decay", [0.5, 0.95, 0.0])
def test_ema_is_the_closed_form_and_not_the_live_weights(decay):
    model = torch.nn.Linear(4, 3)
    start = model.weight.detach().clone().double()
    ema, seen = EMA(model, decay), []
    for n in range(25):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update(n)
        seen.append(model.weight.detach().clone().double())
    d = [min(decay, (1 + n) / (10 + n)) for n in range(25)]
    product = lambda first: torch.tensor(d[first:], dtype=torch.float64).prod()  # noqa: E731
    wanted = product(0) * start + sum((1 - d[i]) * product(i + 1) * seen[i] for i in range(25))
    torch.testing.assert_close(ema.module.weight.double(), wanted, rtol=1e-5, atol=1e-5)
    assert ((ema.module.weight - model.weight).abs().max() > 0.01) == (decay > 0)


def test_ema_is_fp32_and_copies_buffers():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    ema = EMA(model, 0.9)
    assert {p.dtype for p in ema.module.parameters()} == {torch.float32}
    model.train()(torch.randn(8, 4, dtype=torch.bfloat16))
    ema.update(0)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean) and ema.module[1].num_batches_tracked == 1


def test_ema_refuses_a_decay_of_one():
    with pytest.raises(ValueError, match="decay"):
        EMA(torch.nn.Linear(1, 1), 1.0)
