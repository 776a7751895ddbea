"""Operator × dtype × layout × backend against fp64; equal bits; more than 2³¹ elements; torch.compile; CUDA graphs."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator

import torch

from bench.baselines import kelu_where
from bench.gpu import blocks, captured_step, grid, large, machine
from bench.gpu.judge import judge, same_bits
from bench.gpu.part import Failure, Item, Setting, Unavailable
from bench.gpu.problem import Problem, Surroundings
from bench.gpu.subjects import (
    EVERYTHING,
    SUBJECTS,
    alike,
    backends,
    choice_of_gemm,
    differentiate,
    gradients_for,
    missing,
    solvable,
)

ORDER = 20
TITLE = "every operator, dtype, layout and backend against fp64; determinism; > 2³¹ elements; compile; CUDA graphs"
BUDGET = 460
PARALLEL = 15
WORST = {"tensor": str, "error": float, "torch_error": float, "allowed": float}
WHAT = dict.fromkeys(("kind", "operator", "backend", "dtype", "layout"), str)
RESULT = {**WHAT, "worst": (None, WORST), "note": (None, str)}


def cases(setting: Setting) -> list[Item]:
    """All operators in turns, so that whenever time is up each was tried; what has to be compiled after what has not
    (Triton's kernels make over a thousand variants), the types that nobody trains in last, and what needs the whole
    memory without company."""
    found = []
    for operator in SUBJECTS:
        here = backends(setting, operator)
        for backend in here:
            for problem in solvable(grid.tiny(operator) if setting.rehearsal else grid.problems(operator), backend):
                found.append(_item("values", problem, backend, setting))
            for problem in solvable(grid.repeatable(operator, setting.rehearsal), backend):
                found += [_item(kind, problem, backend, setting) for kind in ("equal bits", "compile", "graph")]
            dtypes = ("float16",) if setting.rehearsal else ("float32", "bfloat16", "float16")
            if operator == "kelu" and backend != "reference":  # which has the textbook's formula, and its cancellation
                found += [_item("rounding", Problem("kelu", (1,), dtype), backend, setting) for dtype in dtypes]
            vast = solvable(large.problems(operator, setting), backend)
            found += [_item("large", problem, backend, setting) for problem in vast]
            found += [_item("far", problem, backend, setting) for problem in large.far(operator, setting)]
    for name in blocks.NAMES if setting.variant == "plain" else ():
        for backend in backends(setting, name):
            problems = blocks.tiny(name) if setting.rehearsal else blocks.problems(name)
            found += [_item("values", problem, backend, setting) for problem in solvable(problems, backend)]
            repeated = [] if setting.rehearsal else blocks.repeatable(name)
            found += [_item(kind, p, backend, setting) for p in repeated for kind in ("equal bits", "compile", "graph")]
    if setting.variant == "plain":
        arguments = {"kind": "captured step", "problem": {}, "backend": "the automatic choice"}
        found.append(Item("captured step: SdP-Net", arguments, 200.0))
    if not setting.rehearsal:
        found += [
            Item(f"{name} on {backend}", {"kind": "missing", "problem": {}, "backend": why})
            for name in EVERYTHING
            for backend, why in missing(setting, name).items()
        ]
    return _in_turns(found)


def _in_turns(items: list[Item]) -> list[Item]:
    """Place after place, within a place the first of every group, then the second."""
    turns: Counter[str] = Counter()
    placed = []
    for item in items:
        placed.append((_place(**item.arguments), turns[item.group], item))
        turns[item.group] += 1
    return [item for *_, item in sorted(placed, key=lambda place: place[:2])]


def _place(kind: str, problem: dict, backend: str) -> int:
    if kind in ("values", "rounding") and backend == "triton":
        return {"bfloat16": 1, "float32": 3, "float16": 5}[problem["dtype"]]
    return {"graph": 2, "equal bits": 2, "captured step": 2, "compile": 4, "far": 6, "large": 7}.get(kind, 0)


def _item(kind: str, problem: Problem, backend: str, setting: Setting) -> Item:
    arguments = {"kind": kind, "problem": problem.json(), "backend": backend}
    timeout = {"large": 300.0, "compile": 240.0}.get(kind, 90.0)
    name, alone = f"{kind}: {problem.name} {backend}", kind in ("large", "far")
    group = f"{problem.operator} {problem.dtype} {kind} on {backend}"
    return Item(name, arguments, timeout, setting.variant, alone=alone, group=group)


def run(setting: Setting, kind: str, problem: dict, backend: str) -> dict:
    """One case; Failure where something is off."""
    if kind == "missing":
        raise Unavailable(backend)
    # Read when the compiler is imported: each of PARALLEL workers would start a process per core.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.backends.cudnn.allow_tf32 = False  # else what is allowed in fp32 is what TF32 gets wrong
    if kind == "captured step":
        note = captured_step.run(setting)
        told = {"kind": kind, "operator": "SdP-Net", "backend": backend, "dtype": "bfloat16", "layout": "tokens"}
        return told | {"worst": None, "note": note}
    solved = Problem.of(problem)
    check = {
        "values": values,
        "rounding": rounding,
        "equal bits": equal_bits,
        "compile": compiled,
        "graph": graph,
        "far": large.check_far,
        "large": large.check,
    }[kind]
    with choice_of_gemm(solved, backend):
        found, note = check(setting, solved, backend)
    worst = max(found.items(), key=lambda f: f[1]["error"] / (f[1]["allowed"] or 1.0), default=None)
    return {
        "kind": kind,
        "operator": solved.operator,
        "backend": backend,
        "dtype": solved.dtype,
        "layout": solved.layout,
        "worst": worst and {"tensor": worst[0], **{k: worst[1][k] for k in WORST if k != "tensor"}},
        "note": note,
    }


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written yet holds NaN, so that what a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _ours(problem: Problem, backend: str, inputs, grads):
    return differentiate(lambda *t: EVERYTHING[problem.operator].ours(problem, backend, *t), inputs, grads)


def values(setting: Setting, problem: Problem, backend: str):
    """Outputs and all gradients against fp64; what lies around and between the inputs is NaN, before and after."""
    subject = EVERYTHING[problem.operator]
    inputs, grads = subject.inputs(problem, setting.device), gradients_for(problem, setting.device)
    around = [Surroundings(t) for t in (*inputs, *grads)]
    inputs, grads = ([s.tensor for s in part] for part in (around[: len(inputs)], around[len(inputs) :]))
    with poisoned():
        outputs, gradients = _ours(problem, backend, inputs, grads)
    for i, surroundings in enumerate(around):
        if not surroundings.untouched():
            raise Failure(f"memory around or in input {i} was written")

    def plain(*tensors):
        return subject.plain(problem, *tensors)

    # The gradient has the outputs' dtype, so that all three differentiate the same function.
    exact, exact_gradients = differentiate(plain, [t.double() for t in inputs], grads)
    peer, peer_gradients = differentiate(plain, inputs, grads)
    slack, found = subject.slack(problem, inputs), {}
    for i, tensors in enumerate(zip([*outputs, *gradients], [*exact, *exact_gradients], [*peer, *peer_gradients])):
        name = f"output {i}" if i < len(outputs) else f"gradient {i - len(outputs)}"
        summed = 1 <= i - len(outputs) <= subject.parameters
        rows = problem.rows if summed else max(1, problem.channels, problem.kernel**2)
        found[name] = judge(name, *tensors, rows=rows, slack=slack[i])
    return found, None


def rounding(setting: Setting, problem: Problem, backend: str):
    """KeLü and its derivative: one unit in the last place at every 16-bit number in [−4, 4]; 2e-7 in fp32."""
    dtype = problem.torch_dtype
    if dtype == torch.float32:
        x = torch.linspace(-4, 4, 2**12 + 1 if setting.rehearsal else 2**24 + 1, device=setting.device)
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.abs() <= 4].to(setting.device)
    ours = _ours(problem, backend, [x], [torch.ones_like(x)])
    exact = differentiate(lambda t: (kelu_where(t),), [x.double()], [torch.ones_like(x).double()])
    found = {}
    for name, got, truth in (("f", ours[0][0], exact[0][0]), ("f'", ours[1][0], exact[1][0])):
        apart = (got.double() - truth).abs()
        if dtype == torch.float32:
            error, allowed = apart.max().item(), 2e-7
        else:
            finfo = torch.finfo(dtype)
            exponent = truth.abs().clamp_min(finfo.tiny).log2().floor()
            error, allowed = (apart / (exponent.exp2() * finfo.eps)).max().item(), 1.0
        if not error <= allowed:
            raise Failure(f"{name} is off by {error:.3g}, allowed is {allowed:g}")
        found[name] = {"error": error, "torch_error": 0.0, "allowed": allowed}
    return found, "absolute error" if dtype == torch.float32 else "units in the last place"


def equal_bits(setting: Setting, problem: Problem, backend: str):
    """Run to run; and outputs and dx of some samples alone, which may not depend on the others."""
    subject = EVERYTHING[problem.operator]
    inputs, grads = subject.inputs(problem, setting.device), gradients_for(problem, setting.device)
    first = _ours(problem, backend, inputs, grads)
    for _ in range(2 if setting.rehearsal else 10):
        again = _ours(problem, backend, inputs, grads)
        for i, (a, b) in enumerate(zip([*first[0], *first[1]], [*again[0], *again[1]])):
            same_bits(f"tensor {i}, run to run,", a, b)
    batched = [i for i in range(len(inputs)) if not 1 <= i <= subject.parameters]
    batch = problem.shape[0]
    for begin, end in ((0, 1), (1, 3), (batch - 1, batch)):
        part = [t[begin:end] if i in batched else t for i, t in enumerate(inputs)]
        outputs, gradients = _ours(problem, backend, part, [g[begin:end] for g in grads])
        for i, (whole, alone) in enumerate(zip(first[0], outputs)):
            alike(problem, f"output {i} of samples {begin} to {end} alone", whole[begin:end], alone)
        for i in batched:
            alike(problem, f"gradient {i} of samples {begin} to {end} alone", first[1][i][begin:end], gradients[i])
    return {}, None


def compiled(setting: Setting, problem: Problem, backend: str):
    """torch.compile(fullgraph=True), both passes: the bits of eager mode."""
    subject = EVERYTHING[problem.operator]
    inputs, grads = subject.inputs(problem, setting.device), gradients_for(problem, setting.device)
    eager = _ours(problem, backend, inputs, grads)
    torch._dynamo.reset()
    with machine.stand_ins(setting):
        function = torch.compile(lambda *t: subject.ours(problem, backend, *t), fullgraph=True, dynamic=False)
        traced = differentiate(function, inputs, grads)
    for i, (a, b) in enumerate(zip([*eager[0], *eager[1]], [*traced[0], *traced[1]])):
        alike(problem, f"tensor {i}, eager and compiled,", a, b)
        if a.stride() != b.stride():
            raise Failure(f"tensor {i} has strides {b.stride()} compiled and {a.stride()} eager")
    return {}, None


def graph(setting: Setting, problem: Problem, backend: str):
    """One step captured and replayed on other values: the bits of eager mode on those values."""
    subject = EVERYTHING[problem.operator]
    inputs, grads = subject.inputs(problem, setting.device), gradients_for(problem, setting.device)
    leaves = [t.detach().requires_grad_() for t in inputs]

    def step():
        outputs = subject.ours(problem, backend, *leaves)
        return (*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads))

    replay, results = machine.captured(setting, step)
    with torch.no_grad():
        leaves[0].mul_(-0.75)
        grads[0].neg_()
    replay()
    machine.synchronise(setting)
    outputs, gradients = _ours(problem, backend, [leaf.detach() for leaf in leaves], grads)
    for i, (a, b) in enumerate(zip([*outputs, *gradients], results)):
        alike(problem, f"tensor {i}, eager and replayed,", a, b)
    return {}, None


def summary(results: dict[str, dict], setting: Setting) -> dict:
    """How many cases of each kind hold, and the tightest."""
    counts: dict[str, int] = {}
    for row in results.values():
        key = f"{row['operator']} {row['backend']} {row['kind']}"
        counts[key] = counts.get(key, 0) + 1
    worst = {name: row["worst"] for name, row in results.items() if row["worst"] and row["worst"]["allowed"]}
    judged = [(w["error"] / w["allowed"], name) for name, w in worst.items()]
    lines = [f"{key}: {n} right" for key, n in sorted(counts.items())]
    if judged:
        share, name = max(judged)
        lines.append(f"nearest to what is allowed: {100 * share:.0f} % in {name}")
    return {"lines": lines, "right": counts}
