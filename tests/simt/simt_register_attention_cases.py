"""Register attention cases for the emulator: each kernel, whole heads on chip and in pieces, every limit and mask."""

from __future__ import annotations

from dataclasses import dataclass

import simt_emulator as emulator
import simt_register_attention as attention
import torch
from torch import Tensor

SMALL_CHIP, LOW_CHIP, MEDIUM_CHIP = (8_200, 12_000, 132), (30_000, 40_000, 132), (60_000, 80_000, 132)
"""So little shared memory that heads of d ≤ 32, 96 and 128 come in pieces of 32 to 64 rows."""
RNG = (987654321987654321, 7, 40)
"""Seed, step, first sample."""


@dataclass(frozen=True)
class AttentionCase:
    batch: int
    tokens: int
    heads: int
    d: int
    norms: str = "qk"
    """Which norms there are, of "qk"; "w", "b": q's weight alone, k's bias alone."""
    narrow_parameters: bool = False
    registers: int = 0
    attend: str = "all"
    dropout: float = 0.0
    scale: float | None = None
    gain: float = 1.0
    eps: float = 1e-5
    fma: bool = False
    wgmma: bool = False
    limits: tuple[int, int, int] = emulator.H200

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.tokens}x{self.heads}x{self.d}"]
        words += [f"norms={self.norms}"] if self.norms != "qk" else []
        words += ["narrow"] if self.narrow_parameters else []
        words += [f"{self.attend}{self.registers}"] if self.attend != "all" else []
        words += [f"dropout={self.dropout}"] if self.dropout else []
        words += [f"scale={self.scale}"] if self.scale is not None else []
        words += [f"gain={self.gain}"] if self.gain != 1 else []
        words += [f"eps={self.eps}"] if self.eps != 1e-5 else []
        words += ["fma"] if self.fma else ["wgmma"] if self.wgmma else []
        words += [f"limits={self.limits[0]}"] if self.limits != emulator.H200 else []
        return "-".join(words)

    @property
    def options(self) -> dict:
        """Keyword arguments of both passes."""
        return {
            "eps": self.eps,
            "scale": self.scale,
            "registers": self.registers,
            "attend": self.attend,
            "dropout": self.dropout,
            "rng": torch.tensor(RNG) if self.dropout else None,
            "layer": 3,
        }


@dataclass
class Inputs:
    qkv: Tensor
    norms: list[Tensor | None]
    grad: Tensor


def inputs_of(case: AttentionCase, dtype: torch.dtype) -> Inputs:
    """Guarded, of values that bfloat16 holds, so that every dtype gets the same."""

    def normal(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift
        return values.bfloat16().float()

    def held(values: Tensor, dtype: torch.dtype) -> Tensor:
        return emulator.guarded(values.to(dtype)).view

    wide = dtype if case.narrow_parameters else emulator.wide_dtype(dtype)
    d = case.d
    parameters = [held(normal(d, seed=i, scale=0.3 if i % 2 else 0.2, shift=i % 2), wide) for i in (1, 2, 3, 4)]
    there = {
        "qk": (1, 1, 1, 1),
        "q": (1, 1, 0, 0),
        "k": (0, 0, 1, 1),
        "w": (1, 0, 0, 0),
        "b": (0, 0, 0, 1),
        "": (0,) * 4,
    }
    qkv = normal(case.batch, case.tokens, 3, case.heads, d, seed=5, scale=case.gain, shift=0.25)
    grad = normal(case.batch, case.tokens, case.heads * d, seed=6)
    norms = [p if is_there else None for p, is_there in zip(parameters, there[case.norms])]
    return Inputs(held(qkv, dtype), norms, held(grad, dtype))


def run(case: AttentionCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both passes of the kernels, all outputs by name."""
    i = inputs_of(case, dtype)
    more = case.options | {"limits": case.limits, "fma": case.fma}
    y, lse, _ = attention.forward(i.qkv, i.norms, **more)
    dqkv, gradients, told = attention.backward(i.grad, i.qkv, y, lse, i.norms, **more, wgmma=case.wgmma)
    assert told.wgmma == (case.wgmma and dtype in (torch.bfloat16, torch.float16))
    named = zip(("dq_weight", "dq_bias", "dk_weight", "dk_bias"), gradients)
    return {"y": y, "lse": lse, "dqkv": dqkv} | {name: g for name, g in named if g is not None}


# Each kernel, way and option, small: also what fiber orders and sanitizers are tried on.
CASES = [
    AttentionCase(2, 1, 2, 8),
    AttentionCase(1, 16, 3, 24, registers=4, attend="separate"),
    AttentionCase(2, 37, 2, 32, dropout=0.3),
    AttentionCase(1, 150, 2, 32, limits=SMALL_CHIP, registers=5, attend="image_to_image"),
    AttentionCase(1, 50, 2, 64, norms="", scale=-0.2),
    AttentionCase(1, 45, 1, 72, narrow_parameters=True, registers=20, attend="image_to_image", dropout=0.1),
    AttentionCase(2, 33, 2, 96, registers=5, attend="registers_to_registers"),
    AttentionCase(1, 40, 1, 96, norms="w", dropout=0.5),
    AttentionCase(1, 19, 1, 128, norms="b", dropout=0.2, registers=19, attend="separate"),
    AttentionCase(1, 40, 1, 128, norms="k"),
    AttentionCase(1, 90, 1, 96, limits=LOW_CHIP, norms="q"),
    AttentionCase(1, 90, 1, 128, limits=MEDIUM_CHIP, dropout=0.25),
    AttentionCase(1, 70, 2, 40, fma=True, dropout=0.3),
    AttentionCase(1, 40, 1, 128, fma=True, registers=3, attend="separate", norms="b", scale=-0.2),
    AttentionCase(2, 37, 2, 32, wgmma=True),
    AttentionCase(1, 133, 1, 56, wgmma=True, norms="b", scale=-0.2),
    AttentionCase(1, 83, 1, 96, wgmma=True, narrow_parameters=True),
]

BARRIER_CASES = [
    AttentionCase(5, 40, 7, 32),
    AttentionCase(1, 150, 2, 32, limits=SMALL_CHIP),
    AttentionCase(1, 70, 2, 40, fma=True),
    AttentionCase(1, 133, 1, 32, wgmma=True),
]


def outputs(case: AttentionCase, dtype: torch.dtype) -> list[Tensor]:
    return list(run(case, dtype).values())


def sanitizer_calls(dtype: torch.dtype) -> list[str]:
    calls = []
    for number, case in enumerate(CASES):
        reads = [int(case.attend in ("all", other)) for other in ("registers_to_registers", "image_to_image")]
        there = [int(p is not None) for p in inputs_of(case, dtype).norms]
        order = emulator.ORDERS[number % len(emulator.ORDERS)]
        for backward in (0, 1):
            numbers = [backward, case.batch, case.tokens, case.heads, case.d, case.registers, *reads, 3, *there]
            form = 2 if case.wgmma else int(case.fma)
            numbers += [int(not case.narrow_parameters), int(case.dropout > 0), *case.limits, form, order]
            calls.append("register_attention " + " ".join(map(str, numbers)))
    return calls
