"""Philox and the masks made from it: known answers, where each word goes, statistics, independence."""

from __future__ import annotations

import pytest
import torch
from _layouts import layouts, normal
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sdp_kernels as sk
from sdp_kernels.reference import philox

FULL = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 10: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_of_ints(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * a, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & FULL, (k1 + 0xBB67AE85) & FULL
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert philox_of_ints(counter, key) == words
    got = philox.philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in got) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5, -(2**63), 2**63 - 1])
@pytest.mark.parametrize(("step", "first"), [(0, 0), (7, 3), (2**32 - 1, 2**32 - 2)])
def test_word_of_a_sample_and_position(seed, step, first):
    """Key: seed. Counter: (position // 4, sample, step, layer · 4 + stream), word position % 4; all wrap at 32 bits."""
    layer, stream = 2**30 - 1, philox.ATTENTION
    words = philox.random_words(sk.make_rng(seed, step, first), layer, stream, samples=4, positions=11)
    assert words.shape == (4, 11)
    for s in range(4):
        for p in range(11):
            counter = (p // 4, (first + s) % 2**32, step, layer * 4 + stream)
            assert words[s, p] == philox_of_ints(counter, (seed & FULL, (seed >> 32) & FULL))[p % 4]


def test_words_are_uniform_in_every_bit():
    words = philox.random_words(sk.make_rng(12), 3, philox.DROPOUT, samples=50, positions=2000)
    assert words.min() >= 0 and words.max() < 2**32
    bits = (words.flatten()[:, None] >> torch.arange(32)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / words.numel() ** 0.5).all()
    found = torch.bincount(words.flatten() >> 24, minlength=256).double()
    expected = words.numel() / 256
    assert ((found - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5


def mask(seed=1, step=2, first=0, layer=3, shape=(64, 500), p=0.3) -> Tensor:
    return sk.dropout(torch.ones(shape, dtype=torch.float64), p, rng=sk.make_rng(seed, step, first), layer=layer)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate_and_mean(p):
    y = mask(p=p)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-6, atol=0)
    assert abs((~kept).double().mean() - p) < 5 * (p * (1 - p) / y.numel()) ** 0.5
    assert abs(y.mean() - 1) < 5 * (p / (1 - p) / y.numel()) ** 0.5


def test_rate_next_to_one_keeps_the_largest_word(monkeypatch):
    """Rounded to 32 bits that rate is 1; the threshold stays a word, or nothing could ever be kept."""
    rate = 1 - 2**-34
    words = torch.tensor([[0, 2**31, 2**32 - 2, 2**32 - 1]])
    monkeypatch.setattr(philox, "random_words", lambda *_: words)
    kept = philox.keep_mask(sk.make_rng(1), 0, philox.DROPOUT, 1, 4, rate, torch.float64)
    assert kept.tolist() == [[0, 0, 0, 2.0**34]]


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"seed": 1 + 2**32}, {"step": 3}, {"layer": 4}, {"first": 64}, {"seed": 2, "step": 1}, {"layer": 0}],
    ids=str,
)
def test_masks_of_other_places_are_independent(other):
    a, b = (m - m.mean() for m in (mask(), mask(**other)))
    correlation = (a * b).mean() / (a.std() * b.std())
    assert abs(correlation) < 5 / a.numel() ** 0.5


def test_neighbouring_samples_and_positions_are_independent():
    a = mask()
    for b in (a.roll(1, 0), a.roll(1, 1), a.roll(4, 1), a.roll((1, 4), (0, 1))):
        correlation = ((a - a.mean()) * (b - b.mean())).mean() / a.var()
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_streams_of_one_layer_are_independent():
    rng = sk.make_rng(1)
    words = [philox.random_words(rng, 2, s, 4, 100) for s in (philox.DROPOUT, philox.DROP_PATH, philox.ATTENTION)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not (words[a] == words[b]).any()


def test_micro_batches_draw_what_the_whole_batch_draws():
    whole = mask(shape=(10, 7, 3))
    parts = [mask(first=a, shape=(b - a, 7, 3)) for a, b in ((0, 1), (1, 4), (4, 10))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mask_does_not_depend_on_dtype_or_strides(dtype):
    x = normal(4, 6, 5, dtype=dtype) + 10
    y = sk.dropout(x, 0.5, rng=sk.make_rng(3), layer=1)
    assert y.dtype == dtype and torch.equal(y != 0, mask(3, 0, 0, 1, (4, 6, 5), 0.5) != 0)
    torch.testing.assert_close(y[y != 0], 2 * x[y != 0], rtol=0, atol=0)
    for version in layouts(x).values():
        assert torch.equal(sk.dropout(version, 0.5, rng=sk.make_rng(3), layer=1), y)


def test_gradient_has_the_same_mask():
    x = normal(4, 50).requires_grad_()
    y = sk.dropout(x, 0.3, rng=sk.make_rng(3), layer=1)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, mask(3, 0, 0, 1, (4, 50), 0.3), rtol=1e-6, atol=0)


def test_rate_zero_changes_nothing_and_needs_no_rng():
    x = normal(3, 4)
    assert torch.equal(sk.dropout(x, 0.0), x)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 3, 4), (3, 0)], ids=str)
def test_nothing_to_drop(shape):
    assert sk.dropout(torch.empty(shape), 0.5, rng=sk.make_rng(1)).shape == shape


def test_advancing_the_step_in_place_changes_the_mask():
    """What a captured graph replays: the rng is read where it lies."""
    rng, x = sk.make_rng(1, 5), torch.ones(4, 100)
    before = sk.dropout(x, 0.5, rng=rng)
    rng[1] += 1
    assert torch.equal(sk.dropout(x, 0.5, rng=rng), sk.dropout(x, 0.5, rng=sk.make_rng(1, 6)))
    assert not torch.equal(sk.dropout(x, 0.5, rng=rng), before)


def test_make_rng():
    rng = sk.make_rng(-5, 6, 7)
    assert rng.tolist() == [-5, 6, 7] and rng.dtype == torch.int64 and rng.device.type == "cpu"
    assert sk.make_rng(1, device="meta").device.type == "meta"


def test_making_one_does_not_wait_for_a_gpu():
    """Its numbers travel as arguments of kernels; a copy from the host's memory would be behind all that is queued."""

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    names = []
    with FakeTensorMode(), Called():
        rng = sk.make_rng(-1, 2, 3, device="cuda")
    assert rng.device.type == "cuda" and rng.shape == (3,)
    assert names.count("aten::fill_.Scalar") == 3
    assert not [name for name in names if "copy" in name or "lift" in name]
    assert sk.make_rng(-(2**63), 2**32 - 1, 3).tolist() == [-(2**63), 2**32 - 1, 3]
