"""Searches the launch constants of Triton's committed table, entry by entry, and proposes what was measured faster.

From the committed constants on, one of them is doubled or halved at a time; what is faster by more than the noise and
computes the same is kept, until nothing near is faster. CUDA's kernels have no table: their geometry is computed from
the device. Where there are two kernels for a case and a constant of the sources chooses, the two are compared.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.gpu import machine, warpgroups
from bench.gpu.part import Item, Setting, Unavailable
from bench.gpu.store import write_atomically
from bench.gpu.worker import ROOT
from bench.gpu.workloads import CUDA, SETS, NoWorkloadError, Workload, workload
from bench.measure import interleave
from sdp_kernels.backends import BACKENDS

ORDER = 50
TITLE = "search of Triton's configuration table; writes a proposal, changes nothing without --write"
BUDGET = 460
COMMITTED = ROOT / "sdp_kernels" / "triton" / "configurations.json"
PROPOSAL = "configurations.proposal.json"
CONSTANTS = {"*": int}
TRIED = {"constants": CONSTANTS, "seconds": (None, float), "reason": (None, str)}
RESULT = {
    "capability": str,
    "entry": str,
    "committed": CONSTANTS,
    "committed_seconds": float,
    "best": CONSTANTS,
    "best_seconds": float,
    "tried": [TRIED],
    "compiled_only?": bool,
}
LIMITS = {"warps": (1, 32), "blocks": (32, 4096), "pixels": (1, 512), "ahead": (0, 1)}
LIMITS |= {"gemm": (0, 1), "parts": (1, 2), "stages": (1, 8), "group": (1, 64)}
LIMITS |= {"queries": (16, 256), "keys": (16, 256), "part": (16, 256), "tokens": (0, 0)}
LIMITS |= {"programs": (33, 8448), "outputs": (1, 4), "groups": (1, 64), "fused": (0, 1)}
LIMITS |= {"wgmma": (0, 1)}
LARGEST = 65536
BETTER = 0.98
"""A candidate must take at most this share of the best time so far."""
MOST = 12
"""Evaluations per entry; each compiles."""
PARALLEL = 8
"""Of what compiles; whatever is timed is alone."""
FOUND: dict[str, dict[str, int]] = {}
"""Entry → what this process found to be best: the vendor's GEMM is compared with the best of ours."""


def cases(setting: Setting) -> list[Item]:
    """Every entry that applies to this GPU, the most used first. In the interpreter one of each operator."""
    if setting.variant != ("interpreter" if setting.rehearsal else "plain"):
        return []
    ours = [] if setting.rehearsal or BACKENDS["cuda"].absent or not warpgroups.there() else list(CUDA)
    chosen = [Item(f"cuda: {entry}", {"entry": entry}, 150, setting.variant, alone=True) for entry in ours]
    reason = BACKENDS["triton"].absent
    if reason or not COMMITTED.exists():
        return [*chosen, Item("triton", {"entry": "", "reason": reason or "there is no committed table"})]
    entries = table(capability(setting))
    ordered = sorted(entries, key=lambda e: (_urgency(e), e.rpartition("/")[2], e))
    if setting.rehearsal:
        ordered = ["kelu/forward/dense/16bit", "layer_norm_2d/backward/rows/16/32bit"]
        ordered += ["linear/form/forward/square/16bit"]
    ordered = [entry for entry in ordered if entry in entries]
    found = [Item(f"triton: {entry}", {"entry": entry}, 150, setting.variant, alone=True) for entry in ordered]
    early = ordered[:1] if setting.rehearsal else [e for e in ordered if _urgency(e) < LATER]
    made = [Item(f"compile: {entry}", {"entry": entry, "compile_only": True}, 150, setting.variant) for entry in early]
    return [*chosen, *made, *found]


LATER = 3


def _urgency(entry: str) -> int:
    """Of the models' entries (768 channels of 16 bits, heads of 64 and 96, k = 7): first matrix products and what
    chooses between ours and the vendor's, then attention and convolution, then the rest. Others come ``LATER``."""
    parts = entry.split("/")
    if parts[-1] != "16bit" or any(part.startswith("odd") for part in parts):
        return LATER
    if parts[0] == "linear" and (parts[1] == "form" or parts[2] == "descriptors"):
        return 1 if parts[1] == "form" else 0
    if parts[0] == "register_attention" and parts[2] in ("d64", "d96"):
        return 2
    rows = {"rows", "normed rows"} & set(parts)
    return 2 if rows and ("k7" in parts or "1024" in parts) else 2 if parts[:2] == ["linear", "forward"] else LATER


class Watched(dict):
    """An entry that notes whether anybody read it."""

    read = False

    def __getitem__(self, name):
        self.read = True
        return super().__getitem__(name)

    def keys(self):
        self.read = True
        return super().keys()


def is_used(load: Workload, tensors: list[torch.Tensor], constants: dict, entry: str) -> bool:
    """Whether the workload's call reads the entry; else it would be tuned on something that does not depend on it."""
    kept = constants[entry]
    constants[entry] = watched = Watched(kept)
    try:
        load.call(*tensors)
    finally:
        constants[entry] = kept
    return watched.read


def capability(setting: Setting) -> str:
    """Of this GPU, "90" for sm_90, which also stands for the interpreter."""
    if setting.rehearsal:
        return "90"
    major, minor = torch.cuda.get_device_capability(0)
    return f"{10 * major + minor}"


def table(found: str) -> dict[str, dict[str, int]]:
    """The constants in use on that capability; edited in place, they are what is launched."""
    from sdp_kernels.triton._launch import table_for

    return table_for(int(found))


def neighbours(constants: dict[str, int]) -> Iterator[dict[str, int]]:
    """One constant doubled or halved (or switched); none beyond its limits."""
    for name, value in constants.items():
        least, most = LIMITS.get(name, (1, LARGEST))
        steps = (1 - value,) if (least, most) == (0, 1) else (value * 2, value // 2)
        for changed in steps:
            if least <= changed <= most and changed != value:
                yield constants | {name: changed}


def _same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> str | None:
    for i, (a, b) in enumerate(zip(got, wanted)):
        size = b.abs().max().double().item() or 1.0
        apart = (a.double() - b.double()).abs().max().item() / size
        if not apart <= 4 * torch.finfo(a.dtype).eps + 1e-5:
            return f"output {i} differs from the committed configuration's by {apart:.1e} of its largest value"
    return None


def climb(start: dict[str, int], seconds_of: Callable[[dict[str, int]], float | None], most: int) -> tuple[dict, float]:
    """(best constants, their seconds): to the best neighbour while that is faster, in at most ``most`` evaluations."""
    best, best_seconds = start, seconds_of(start)
    if best_seconds is None:
        raise RuntimeError(f"the committed configuration {start} does not run")
    tried = [start]
    while True:
        found = best, best_seconds
        for candidate in neighbours(best):
            if candidate in tried or len(tried) >= most:
                continue
            tried.append(candidate)
            seconds = seconds_of(candidate)
            if seconds is not None and seconds < found[1] * BETTER:
                found = candidate, seconds
        if found[0] == best:
            return best, best_seconds
        best, best_seconds = found


def run(setting: Setting, entry: str, reason: str = "", compile_only: bool = False) -> dict:
    """Search one entry, or only run what the search begins with, for the compiler's cache on the disk. The table of
    this process is edited for it and put back."""
    if not entry:
        raise Unavailable(reason)
    constants = CUDA if entry in CUDA else table(capability(setting))
    committed = dict(constants[entry])
    try:
        load = workload(entry, setting.device, tiny=setting.rehearsal)
    except NoWorkloadError as error:
        raise Unavailable(str(error)) from None
    if compile_only:
        return _compiled(setting, load, constants, entry)
    sets = [load.make(100 * i) for i in range(2 if setting.rehearsal else SETS)]
    if not is_used(load, sets[0], constants, entry):
        raise Unavailable("its workload does not use it: bench/gpu/workloads.py and the kernel's host code differ")
    others = {name: constants[name] for name in FOUND if "/form/" in entry}
    constants |= {name: FOUND[name] for name in others}
    wanted = load.call(*sets[0])
    tried: list[dict] = []

    def seconds_of(candidate: dict[str, int]) -> float | None:
        constants[entry] = candidate
        found: dict = {"constants": candidate, "seconds": None, "reason": None}
        tried.append(found)
        try:
            found["reason"] = _same(load.call(*sets[0]), wanted)
            if found["reason"] is None:
                turns = {"candidate": lambda index: lambda: load.call(*sets[index])}
                spans = interleave(turns, len(sets), 0.03 if not setting.rehearsal else 0.0, machine.clock(setting))
                found["seconds"] = statistics.median(spans["candidate"])
        except Exception as error:  # too much shared memory, say: a finding about the candidate
            if "CUDA error" in str(error) or "illegal" in str(error):
                raise
            found["reason"] = f"{type(error).__name__}: {str(error)[:150]}"
        return found["seconds"]

    try:
        best, best_seconds = climb(committed, seconds_of, most=3 if setting.rehearsal else MOST)
        committed_seconds = tried[0]["seconds"]
        if best != committed:  # once more, alternating, so that a lucky moment does not decide
            committed_seconds, best_seconds = _duel(setting, load, sets, constants, entry, committed, best)
            if best_seconds > committed_seconds * BETTER:
                best, best_seconds = committed, committed_seconds
    finally:
        constants[entry] = committed
        constants |= others
    FOUND[entry] = best
    return {
        "capability": capability(setting),
        "entry": entry,
        "committed": committed,
        "committed_seconds": committed_seconds,
        "best": best,
        "best_seconds": best_seconds,
        "tried": tried,
    }


def _compiled(setting: Setting, load: Workload, constants: dict, entry: str) -> dict:
    """As a search's result without times."""
    committed, tensors = dict(constants[entry]), load.make(0)
    tried: list[dict] = []
    try:
        for candidate in [committed, *neighbours(committed)][: 2 if setting.rehearsal else MOST]:
            constants[entry] = candidate
            found: dict = {"constants": candidate, "seconds": None, "reason": None}
            tried.append(found)
            try:
                load.call(*tensors)
                machine.synchronise(setting)
            except Exception as error:  # as in a search
                if "CUDA error" in str(error) or "illegal" in str(error):
                    raise
                found["reason"] = f"{type(error).__name__}: {str(error)[:150]}"
    finally:
        constants[entry] = committed
    told = {"capability": capability(setting), "entry": entry, "committed": committed, "best": committed}
    return told | {"committed_seconds": 0.0, "best_seconds": 0.0, "tried": tried, "compiled_only": True}


def _duel(setting: Setting, load, sets, constants: dict, entry: str, a: dict, b: dict) -> tuple[float, float]:
    def turn(chosen: dict):
        def call(index: int):
            def run_it():
                constants[entry] = chosen
                return load.call(*sets[index])

            return run_it

        return call

    spans = interleave({"a": turn(a), "b": turn(b)}, len(sets), 0.1, machine.clock(setting))
    return statistics.median(spans["a"]), statistics.median(spans["b"])


def proposal(results: list[dict], committed: dict) -> dict:
    """The committed table with what was found faster in the column of the GPU that it was measured on; CUDA's entries
    are not in it."""
    made = {found: dict(entries) for found, entries in committed.items()}
    for row in results:
        if row["best"] != row["committed"] and row["entry"] not in CUDA:
            made.setdefault(row["capability"], {})[row["entry"]] = row["best"]
    return dict(sorted(made.items(), key=lambda item: int(item[0])))


def as_text(found: dict) -> str:
    """The committed file's format: one line per entry."""
    columns = []
    for name, entries in found.items():
        lines = ",\n".join(f"    {json.dumps(entry)}: {json.dumps(entries[entry])}" for entry in sorted(entries))
        columns.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(columns) + "\n}\n"


def _good(file: dict) -> list[dict]:
    found = [record["result"] for record in file["records"] if record["status"] == "ok"]
    return [row for row in found if not row.get("compiled_only")]


def files(file: dict, setting: Setting) -> dict[str, str]:
    if not _good(file):
        return {}
    return {PROPOSAL: as_text(proposal(_good(file), json.loads(COMMITTED.read_text(encoding="utf-8"))))}


def write(file: dict, path: Path = COMMITTED) -> str:
    """Put the proposal in the committed table's place; what happened, in words."""
    if file["rehearsal"]:
        return "nothing written: a rehearsal measures nothing"
    changed = [row for row in _good(file) if row["best"] != row["committed"] and row["entry"] not in CUDA]
    if not changed:
        return "nothing written: the committed table is as fast as anything tried"
    write_atomically(path, as_text(proposal(changed, json.loads(path.read_text(encoding="utf-8")))))
    return f"{path.name}: {len(changed)} entries changed; the resource table of the ahead-of-time compile follows"


def summary(results: dict[str, dict], setting: Setting) -> dict:
    searched = [row for row in results.values() if not row.get("compiled_only")]
    faster = [row for row in searched if row["best"] != row["committed"]]
    lines = [f"{len(searched)} entries searched, {len(faster)} can be faster"]
    for row in sorted(faster, key=lambda row: row["best_seconds"] / row["committed_seconds"])[:10]:
        share = row["best_seconds"] / row["committed_seconds"]
        where = " (kAttentionWgmma in csrc/cuda/register_attention.cuh)" if row["entry"] in CUDA else ""
        lines.append(f"{row['entry']}: {row['committed']} → {row['best']}, {share:.2f} of the time{where}")
    return {"lines": lines}
