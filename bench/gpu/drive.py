"""What runs under a sanitizer: a few small problems of one operator on one backend, both passes, and little else.

    python -m bench.gpu.drive OPERATOR BACKEND        or: python -m bench.gpu.drive control

Inputs are made on the CPU, so that hardly any kernels but ours are launched. "control" writes out of bounds on purpose,
to see whether the sanitizer notices.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from .grid import EPILOGUES
from .problem import LAYOUTS, Problem, normal
from .subjects import OWN_GEMM, SUBJECTS, choice_of_gemm, differentiate, solvable

CONTROL = "control"


def problems(operator: str) -> list[Problem]:
    """Small, odd, in every layout and with every branch that a kernel takes; in bf16 and fp32."""
    kernel = {"kernel": 7} if operator == "depthwise_conv2d" else {}
    if operator == "linear":
        return [
            Problem(operator, (2, 19, c), dtype, registers=3, epilogue=epilogue)
            for dtype in ("float32", "bfloat16")
            for c in (24, 33)
            for epilogue in EPILOGUES
        ]
    if operator == "register_attention":
        return [
            Problem(operator, (2, 35, 2 * d), dtype, registers=3, kernel=d, epilogue=limits)
            for dtype in ("float32", "bfloat16")
            for d in (24, 64, 96)
            for limits in ("all", "separate", "all masks")
        ]
    found = [
        Problem(operator, (2, c, 5, 7), dtype, layout, **kernel)
        for dtype in ("float32", "bfloat16")
        for c in (24, 33)
        for layout in ("contiguous", "channels_last", "gaps")
    ]
    if operator == "layer_norm_2d":
        found += [Problem(operator, (1, 4104, 2, 3), "bfloat16", layout) for layout in ("contiguous", "channels_last")]
        found += [Problem(operator, (2, 9, 40), "bfloat16", "tokens", registers=3, residual=True)]
    if operator == "kelu":
        found += [Problem(operator, (4099,), dtype) for dtype in ("float32", "bfloat16")]
    return found


def drive(operator: str, backend: str, device: str) -> int:
    """Run them all; the number of problems run."""
    found = problems(operator)
    if operator == "linear" and backend in OWN_GEMM:
        found += [replace(problem, own_gemm=True) for problem in found]
    if operator == "register_attention":
        half = [problem for problem in found if problem.dtype != "float32" and problem.epilogue == "all"]
        found += solvable([replace(problem, warpgroups=True) for problem in half], backend)
    for problem in found:
        subject = SUBJECTS[operator]
        inputs = subject.inputs(problem, "cpu")
        grads = [normal(problem, problem.shape, 10 + i, "cpu") for i in range(2 if problem.residual else 1)]
        lay = LAYOUTS[problem.layout]
        moved = [t.to(device) for t in inputs]
        if problem.layout == "gaps":  # whose strides a copy between devices does not keep
            moved[0] = lay(moved[0])
        moved_grads = [g.to(device) for g in grads]
        with choice_of_gemm(problem, backend):
            differentiate(lambda *t, p=problem, s=subject: s.ours(p, backend, *t), moved, moved_grads)
    return len(found)


def control(device: str) -> None:
    """One store far beyond an allocation."""
    import triton
    import triton.language as tl

    @triton.jit
    def beyond(pointer):
        tl.store(pointer + 2**20 + tl.arange(0, 32), 1.0)

    beyond[(1,)](torch.zeros(32, device=device))
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.drive", description=__doc__)
    parser.add_argument("operator", choices=[*SUBJECTS, CONTROL])
    parser.add_argument("backend", nargs="?")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.operator == CONTROL:
        control(options.device)
        return 0
    print(f"drove {drive(options.operator, options.backend, options.device)} problems")
    if options.device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
