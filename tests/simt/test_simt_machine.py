"""The emulator itself: what it computes, and that it notices what it promises to notice."""

from __future__ import annotations

import subprocess

import pytest
import simt_emulator as emulator
import torch
from simt_kelu import kelu
from simt_layer_norm_2d import layer_norm_fwd

pytestmark = pytest.mark.proof("emulator")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def machine(name: str, order: int = 0, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    program = emulator.compile_source("machine.cpp", "-O1", *flags, shared=False)
    return subprocess.run([str(program), name, str(order)], capture_output=True, text=True, timeout=60)


def values(name: str, order: int = 0) -> list[int]:
    done = machine(name, order)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_barriers_and_shuffles(order):
    sums = [sum(range(32)), sum(range(32, 64))]
    assert values("right", order) == [sums[1]] * 32 + [sums[0]] * 32
    assert values("broadcast", order) == [7] * 32 + [39] * 32
    assert values("poison", order) == [1] * 64


def test_orders():
    """Ascending and descending are what they say; the random one is a permutation, and the same for the same seed."""
    assert values("order", emulator.ASCENDING) == list(range(64))
    assert values("order", emulator.DESCENDING) == list(range(63, -1, -1))
    assert values("order", emulator.WARPS_DESCENDING) == list(range(63, -1, -1))
    random = values("order", emulator.RANDOM)
    assert sorted(random) == list(range(64)) and random == values("order", emulator.RANDOM)
    assert len({tuple(values("order", seed)) for seed in range(100, 106)}) > 1


def test_a_missing_barrier_shows_in_some_order():
    wanted = list(range(63, -1, -1))
    assert any(values("missing_barrier", order) != wanted for order in emulator.ORDERS)


@pytest.mark.parametrize("name", ["half_the_block", "two_places", "left_early", "half_a_warp", "part_mask"])
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_refuses_divergence(name, order):
    done = machine(name, order)
    assert done.returncode != 0
    assert "barrier divergence" in done.stderr or "shuffles want whole warps" in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("right", None),
        ("shared_overflow", "heap-buffer-overflow"),
        ("global_overflow", "heap-buffer-overflow"),
        ("signed_overflow", "signed integer overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_sanitizers_see_kernels(name, message):
    done = machine(name, flags=SANITIZE)
    assert (done.returncode == 0) == (message is None), done.stderr
    assert message is None or message in done.stderr


def test_sixteen_bit_conversions():
    """The stand-ins for CUDA's types convert like PyTorch, which rounds to nearest even; KeLü is x above 3.5."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype)
        x = x[torch.isfinite(x) & (x > 3.5)]
        assert torch.equal(kelu(x), x)
    # Narrowing: a sum of two values has every rounding there is.
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for scale in (1.0, 1e-6, 3e4 if dtype == torch.float16 else 1e30):
            a, b = ((torch.randn(1, 512, 8, generator=generator) * scale).to(dtype) for _ in range(2))
            *_, total, _ = layer_norm_fwd(a, b, torch.ones(8), torch.ones(8))
            assert torch.equal(total, a + b)
