"""Checks and measures whole cases for pytest and keeps what it found. One problem's tensors are alive at a time."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

import sdp_kernels.backends

from .cases import Case, Contender, Operator, UnusableError
from .measure import (
    AGAIN,
    COPY,
    Checked,
    CpuClock,
    CudaClock,
    Inputs,
    Measured,
    floor,
    interleave,
    outputs,
    relative_errors,
    relevant,
    timed_call,
    verdict,
)

REAL_BACKENDS = ("cpu", "cuda", "triton")


def missing_backend(operator: str, device: str, dtype: torch.dtype) -> str | None:
    """Why "ours" would not run a fused kernel for the case here; None when it would."""
    asked = sdp_kernels.backends._forced
    if asked is not None:
        return f"the backend {asked!r} is forced (SDP_KERNELS_BACKEND); the benchmark measures the automatic choice"
    chosen = sdp_kernels.backends.choose(operator, torch.empty(1, dtype=dtype, device=device))
    if chosen in REAL_BACKENDS:
        return None
    reasons = sdp_kernels.backends.every_reason(operator, device, dtype)
    lines = [f"  {name}: {'; '.join(why)}" for name, why in reasons.items() if why]
    return "\n".join(
        [
            f"{operator} would run on the {chosen!r} backend on {device}, so there is nothing to compare. Build the",
            "library with pip install -e . and look at python -m sdp_kernels.info. Reasons:",
            *lines,
        ]
    )


class Harness:
    """Measures a case the first time one of its contenders is asked for; the others find the result."""

    def __init__(self, seconds: float, threads: int | None = None):
        self.seconds = seconds
        if threads:
            torch.set_num_threads(threads)
        self._problem: Case | None = None
        self._inputs: Inputs | None = None
        self._truths: dict[int, dict[str, Tensor]] = {}
        self._eager: dict[str, float] = {}
        self._checked: dict[str, Checked] = {}
        self._measured: dict[Case, Measured] = {}

    def check(self, operator: Operator, contender: Contender, case: Case) -> Checked:
        """Build the contender and compare it with the fp64 truth; once per problem."""
        if case.problem != self._problem:
            self._begin(operator, case.problem)
        if contender.name not in self._checked:
            self._checked[contender.name] = self._build(operator, contender, case.problem)
        return self._checked[contender.name]

    def wrong(self, operator: Operator, checked: Checked, case: Case) -> str | None:
        """What is wrong with the contender's numbers in the case's pass; None when they are right."""
        if checked.errors is None:
            return None
        return verdict(checked.contender.kind, case, checked.errors, self._eager)

    def measure(self, operator: Operator, contenders: list[Contender], case: Case) -> Measured:
        """Time all contenders that are right, interleaved."""
        if case in self._measured:
            return self._measured[case]
        if operator.gemms and operator.gemms not in {contender.name for contender in contenders}:
            contenders = [*contenders, operator.contender(operator.gemms)]  # the floor needs its time
        ready = [self.check(operator, contender, case) for contender in contenders]
        running = [c for c in ready if c.function is not None and self.wrong(operator, c, case) is None]
        inputs = self._inputs
        if inputs is None:
            raise RuntimeError("measure: no inputs; check comes first")

        def turns(function):
            return lambda index: timed_call(function, case, inputs, index)

        prepare = {COPY: lambda index: inputs.x[index].detach().clone}
        for checked in running:
            prepare[checked.contender.name] = turns(checked.function)
            if checked.contender.kind == "ours":
                prepare[checked.contender.name + AGAIN] = turns(checked.function)
        clock = CudaClock() if case.device == "cuda" else CpuClock()
        self._measured[case] = Measured(case, interleave(prepare, inputs.count, self.seconds, clock))
        return self._measured[case]

    def record(self, operator: Operator, contenders: list[Contender], contender: Contender, case: Case) -> dict:
        """What the result file says of a contender in a case, besides its times."""
        measured, checked = self.measure(operator, contenders, case), self._checked[contender.name]
        work = {"traffic": operator.traffic(case), "hidden": operator.hidden(case)}
        work["gemms"] = measured.median(operator.gemms) if operator.gemms else 0.0
        least = floor(measured.bandwidth, **work)
        errors = relevant(checked.errors or {}, case.which)
        row = {
            "operator": operator.name,
            "shape": list(case.shape),
            "dtype": case.dtype_name,
            "layout": case.layout,
            "registers": case.registers,
            "variant": case.variant,
            "pass": case.which,
            "device": case.device,
            "threads": torch.get_num_threads(),
            "contender": contender.name,
            "kind": contender.kind,
            "median": measured.median(contender.name),
            "error": max(errors.values()),
            "errors": errors,
            "bytes": work["traffic"],
            "hidden_bytes": work["hidden"],
            "gemm_seconds": work["gemms"],
            "floor": least,
            "time_over_floor": measured.median(contender.name) / least,
            "copy_bytes_per_second": measured.bandwidth,
            "input_sets": self._inputs.count if self._inputs else None,
        }
        if contender.kind == "ours":
            peers = [c.name for c in contenders if c.kind == "peer" and c.name in measured.durations]
            best = min(peers, key=measured.median, default=None)
            row["noise"] = measured.noise(contender.name)
            row["best_peer"] = best
            row["ratio_to_best_peer"] = measured.paired_ratio(best, contender.name) if best else None
        return row

    def _begin(self, operator: Operator, problem: Case) -> None:
        torch._dynamo.reset()  # else the recompile limit of a function is reached after a few shapes
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        self._problem, self._checked, self._truths = problem, {}, {}
        self._inputs = Inputs(operator, problem)
        eager = operator.contender(operator.eager)
        self._checked[eager.name] = self._build(operator, eager, problem)
        self._eager = self._checked[eager.name].errors or {}
        if not self._eager:
            raise RuntimeError(
                f"{problem.name}: the baseline {eager.name} does not run: {self._checked[eager.name].reason}"
            )

    def _build(self, operator: Operator, contender: Contender, case: Case) -> Checked:
        inputs, checked = self._inputs, Checked(contender)
        try:
            checked.function = contender.build(case)
            got = outputs(checked.function, inputs.x[0], inputs.parameters, inputs.dy[0])
            checked.errors = relative_errors(got, self._truth(operator, contender, case))
        except UnusableError as reason:
            checked.function, checked.reason = None, str(reason)
        except Exception as error:  # a peer may fail in any way of its own; that is a finding, not the end of the run
            checked.crash = error if contender.kind == "ours" else None
            first = str(error).strip().splitlines() or [""]
            checked.function, checked.reason = None, f"{type(error).__name__}: {first[0][:200]}"
        return checked

    def _truth(self, operator: Operator, contender: Contender, case: Case) -> dict[str, Tensor]:
        oracle = contender.oracle or operator.oracle
        if id(oracle) not in self._truths:
            inputs = self._inputs
            x = inputs.x[0].detach().double().requires_grad_()
            parameters = [p.detach().double().requires_grad_() for p in inputs.parameters]
            truth = outputs(lambda x, *p: oracle(x, *p, case=case), x, parameters, inputs.dy[0].double())
            self._truths[id(oracle)] = truth
        return self._truths[id(oracle)]
