"""Every operator of ``pytest bench`` on the GPU, ours once per backend, against every contender that is right and here.

The benchmark's own harness measures: fp64 gate, inputs rotating beyond the cache, CUDA events, turns in random order.
What is added here is the floor from the copy bandwidth of the environment part, the goals, and resuming. What the
compilers make is made first, in several processes, which leave it in the compilers' caches on the disk.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import bench
import sdp_kernels
from bench import peers, report
from bench.cases import PASSES, Case, Contender, Operator
from bench.gpu import goals, machine, warpgroups
from bench.gpu.part import Failure, Item, Setting, Unavailable
from bench.gpu.subjects import GPU_BACKENDS, SUBJECTS
from bench.harness import Harness
from bench.measure import floor
from sdp_kernels.backends import every_reason

ORDER = 40
TITLE = "speed against PyTorch, torch.compile and other libraries; time over the measured floor; the goals"
BUDGET = 470
PARTIAL = True
PARALLEL = 6
"""Of what compiles; whatever is timed is alone."""
WARPGROUPS, DEFAULT = "cuda, warpgroups", os.environ.get(warpgroups.VARIABLE, "")
"""CUDA's attention by the kernel that is not the default, and what was asked for when this began."""
SECONDS, TIMEOUT, PREPARED = 1.0, 180.0, 24
FIRST = ("depthwise_conv2d", (256, 768, 16, 16))
"""Where least is known of what PyTorch's own kernels take."""
ROW = {
    "operator": str,
    "contender": str,
    "kind": ("ours", "peer", "yardstick"),
    "pass": PASSES,
    "median": float,
    "*": any,
}
LEFT_OUT = {"case": str, "contender": str, "kind": str, "status": ("unusable", "wrong"), "reason": str}
RESULT = {"rows": [ROW], "not_timed": [LEFT_OUT]}
REPORT = "speed.report.json"
TINY = {"tokens": (2, 5, 8), "contiguous": (2, 8, 4, 4), "channels_last": (2, 8, 4, 4)}


@dataclass(frozen=True)
class OnDevice(Case):
    """A case whose tensors are made on its device: drawing hundreds of millions of numbers on a CPU takes minutes."""

    def random(self, generator: torch.Generator, scale: float = 1.0, shape: tuple[int, ...] | None = None) -> Tensor:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        there = torch.Generator(self.device).manual_seed(seed)
        made = (torch.randn(shape or self.shape, generator=there, device=self.device) * scale).to(self.dtype)
        return made.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else made


def files_of_benchmarks() -> list[str]:
    """The modules ``bench.test_*``."""
    return [f"bench.{entry.name}" for entry in pkgutil.iter_modules(bench.__path__) if entry.name.startswith("test_")]


def operators() -> dict[str, tuple[Operator, list[Case]]]:
    """Operator → what ``pytest bench`` knows of it and its GPU problems, from every file that can be imported."""
    found = {}
    for name in files_of_benchmarks():
        with contextlib.suppress(ImportError):  # cases() says so
            module = importlib.import_module(name)
            problems = list(dict.fromkeys(case.problem for case in module.CASES["all"]["cuda"]))
            found[module.OPERATOR.name] = (module.OPERATOR, problems)
    return found


def unimportable() -> dict[str, str]:
    """File → why it can't be imported: for want of a package, say."""
    found = {}
    for name in files_of_benchmarks():
        try:
            importlib.import_module(name)
        except ImportError as error:
            found[name] = str(error)
    return found


def _urgency(item: Item) -> tuple:
    """The goals, of them first what PyTorch's depthwise convolution takes; then bf16, which trains."""
    a = item.arguments
    key = (a["operator"], tuple(a["shape"]))
    is_goal = any(
        (g.operator, g.shape, g.layout, g.dtype, g.variant) == (*key, a["layout"], a["dtype"], a["variant"])
        for g in goals.GOALS
    )
    return not is_goal and (key != FIRST or a["variant"] != "k7"), a["dtype"] != "bfloat16", key != FIRST


def cases(setting: Setting) -> list[Item]:
    """One item per problem: its three passes share what is compiled and checked."""
    found = []
    for name, (known, problems) in operators().items():
        if setting.rehearsal:
            # Interpreted, who has kernels of its own: the blocks made of them would take minutes to say no more.
            problems = [_tiny(known, problems[-1])] if setting.variant == "plain" or name in SUBJECTS else []
        for case in problems:
            if ours(setting, known, case.dtype):
                arguments = {k: getattr(case, k) for k in ("shape", "layout", "registers", "variant")}
                arguments |= {"operator": name, "dtype": case.dtype_name}
                names = forms(setting, known, case.dtype)
                without = [[name] for name in names] + [names] * (len(names) > 1)
                instead = [arguments | {"without": left_out} for left_out in without]
                title = case.name.removesuffix("-both")
                found.append(Item(title, arguments, TIMEOUT, setting.variant, alone=True, instead=instead))
    found = _in_turns(sorted(found, key=_urgency))
    absent = unimportable() if setting.variant == "plain" else {}
    found += [Item(f"cases of {name}", {"operator": "", "reason": why}) for name, why in absent.items()]
    return [*_prepared(found, setting), *found]


def _in_turns(items: list[Item]) -> list[Item]:
    """Among the equally urgent, one of every operator, then the next of every operator."""
    turns: Counter[tuple] = Counter()
    placed = []
    for item in items:
        turn = _urgency(item)[:2], item.arguments["operator"]
        placed.append((turn[0], turns[turn], _urgency(item), item))
        turns[turn] += 1
    return [item for *_, item in sorted(placed, key=lambda place: place[:3])]


def _prepared(timed: list[Item], setting: Setting) -> list[Item]:
    """What is compiled beforehand, the first ones; the others may well not be reached."""
    count = PREPARED if not setting.rehearsal else 1 if setting.variant == "plain" else 0
    first = [item for item in timed if item.arguments["operator"]][:count]
    return [
        replace(
            item,
            id=f"compile: {item.id}",
            arguments=item.arguments | {"compile_only": True, "without": ["cuda", WARPGROUPS]},
            alone=False,
            instead=[],
        )
        for item in first
    ]


def _tiny(known: Operator, case: Case) -> Case:
    """What stands around matrix products goes in fp32: with so few terms, bf16's roundings don't even out."""
    shapes = TINY | getattr(importlib.import_module(f"bench.test_{known.name}"), "SMALL", {})
    dtype = torch.float32 if known.gemms else case.dtype
    case = replace(case, variant="k3") if case.variant == "k7" else case
    return replace(case, shape=shapes[case.layout], dtype=dtype, registers=min(case.registers, 1), device="cpu")


def ours(setting: Setting, operator: Operator, dtype: torch.dtype) -> list[str]:
    """Backends to be timed, in the order of automatic choice: those that have all kernels that ours runs."""
    wanted = GPU_BACKENDS if not setting.rehearsal else ("triton",) if setting.variant == "interpreter" else ("cpu",)
    reasons = [every_reason(kernel, setting.device, dtype) for kernel in operator.kernels]
    return [name for name in wanted if not any(told[name] for told in reasons)]


def forms(setting: Setting, operator: Operator, dtype: torch.dtype) -> list[str]:
    """The backends that are ours, and of CUDA's attention the kernel of warpgroups, which is not its default."""
    names = ours(setting, operator, dtype)
    two = operator.name == "register_attention" and "cuda" in names and dtype != torch.float32 and warpgroups.there()
    return [*names, *[WARPGROUPS] * two]


def contenders(setting: Setting, operator: Operator, case: Case) -> list[Contender]:
    """Ours once per backend, then everybody who can take part here; the interpreter has nobody's speed to compare."""
    present = {peer.name for peer in peers.survey(setting.device) if peer.reason is None}
    found: list[Contender] = []
    for contender in operator.contenders:
        if case.layout not in contender.layouts or (contender.name in peers.DEVICES and contender.name not in present):
            continue
        if contender.kind != "ours":
            if setting.variant == "plain" or contender.name in (operator.eager, operator.gemms):
                found.append(contender)
            continue
        found += [
            replace(contender, name=f"ours ({name})", build=_on(name, contender))
            for name in forms(setting, operator, case.dtype)
        ]
    return found


def _on(name: str, contender: Contender):
    backend = name.partition(",")[0]

    def build(case: Case):
        function = contender.build(case)

        def on_backend(*tensors: Tensor) -> Tensor:
            with sdp_kernels.use_backend(backend):
                return function(*tensors)

        if case.operator != "register_attention" or backend != "cuda" or not warpgroups.there():
            return on_backend
        return warpgroups.in_form("wgmma" if name == WARPGROUPS else DEFAULT, on_backend)

    return build


def run(
    setting: Setting,
    operator: str,
    shape: tuple[int, ...] = (),
    dtype: str = "",
    layout: str = "",
    registers: int = 0,
    variant: str = "",
    compile_only: bool = False,
    without: list[str] | None = None,
    reason: str = "",
) -> dict:
    """All passes and contenders of one problem, but for the backends left out. Failure where ours is wrong or crashes:
    then it has no time."""
    if not operator:
        raise Unavailable(reason)
    known = operators()[operator][0]
    number = getattr(torch, dtype)
    problem = OnDevice(operator, tuple(shape), number, layout, "both", setting.device, registers, variant)
    left = {f"ours ({name})" for name in without or ()}
    rivals = [rival for rival in contenders(setting, known, problem) if rival.name not in left]
    rows, left_out = [], []
    if compile_only:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # read when the compiler is imported
    with machine.stand_ins(setting), warpgroups.cuda_attention(DEFAULT):
        harness = Harness(0.0 if setting.rehearsal else SECONDS)
        if compile_only:
            return _compiled(harness, known, rivals, problem)
        for which in PASSES:
            case = replace(problem, which=which)
            for contender in rivals:
                row, reason = _one(harness, known, rivals, contender, case)
                if reason:
                    told = {"case": case.name, "contender": contender.name, "kind": contender.kind}
                    left_out.append(told | {"status": reason[0], "reason": reason[1]})
                else:
                    rows.append(_with_floor(row, setting))
    result = {"rows": rows, "not_timed": left_out}
    if wrong := [r for r in left_out if r["kind"] == "ours"]:
        told = "; ".join(f"{r['contender']} is {r['status']} in {r['case']}: {r['reason']}" for r in wrong)
        raise Failure(told[:1500], result)
    return result


def _compiled(harness: Harness, known: Operator, rivals: list[Contender], problem: Case) -> dict:
    """A contender's check runs both of its passes; what it finds is told when it is timed. Several processes share the
    memory here, which may be too little for the fp64 truths of all."""
    try:
        for rival in rivals:
            harness.check(known, rival, problem)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
    return {"rows": [], "not_timed": []}


def _one(harness: Harness, operator: Operator, rivals: list[Contender], contender: Contender, case: Case):
    """(row, None), or (None, (status, reason)) for who may not be timed."""
    checked = harness.check(operator, contender, case)
    if checked.function is None:
        return None, ("unusable", checked.reason or "no reason given")
    if wrong := harness.wrong(operator, checked, case):
        return None, ("wrong", wrong)
    return harness.record(operator, rivals, contender, case), None


def _with_floor(row: dict, setting: Setting) -> dict:
    """The row with its floor from the environment part's bandwidth; the same run's copy stays beside it."""
    row = row | {"time_over_copy_in_this_run": row["time_over_floor"], "floor_from": "a copy in the same run"}
    if row["kind"] == "ours":
        row["backend"] = row["contender"].removeprefix("ours (").removesuffix(")")
    bandwidth = setting.facts.get("environment", {}).get("copy_bytes_per_second")
    if bandwidth:
        least = floor(bandwidth, row["bytes"], row["hidden_bytes"], row["gemm_seconds"])
        row |= {"floor": least, "time_over_floor": row["median"] / least, "copy_bytes_per_second": bandwidth}
        row["floor_from"] = "the environment part's copy"
    return row


def as_report(results: list[dict], environment: dict) -> dict:
    """What ``python -m bench.report`` reads."""
    rows = [row for result in results for row in result["rows"]]
    return {
        "machine_info": environment,
        "commit_info": environment.get("commit", {}),
        "benchmarks": [{"group": report.case_name(row), "name": row["contender"], "extra_info": row} for row in rows],
        "not_timed": [row for result in results for row in result["not_timed"]],
        "peers": [vars(peer) for peer in peers.survey("cuda")],
    }


def files(file: dict, setting: Setting) -> dict[str, str]:
    results = [record["result"] for record in file["records"] if record["status"] in ("ok", "failed")]
    results = [result for result in results if result and result["rows"]]
    if not results:
        return {}
    made = as_report(results, file["environment"])
    report.markdown(made)  # what it can't render, nobody should find later
    return {REPORT: json.dumps(made, indent=1, allow_nan=False) + "\n"}


def summary(results: dict[str, dict], setting: Setting) -> dict:
    """The goals, and ours against the best peer in each case."""
    rows = [row for result in results.values() for row in result["rows"]]
    found = goals.judged(rows)
    lines = [*report.summary_table(rows), "", "goals (time ÷ floor)", *goals.lines(found)] if rows else []
    return {"lines": lines, "goals": found}
