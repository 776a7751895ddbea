"""Training steps of SdP-Net in several forms (``python -m bench.train_throughput``), one activation and group a case.

Forms that take turns in one case can be compared. What needs no compiler comes first: it takes a minute, a compiler
several; and where a step of ours crashes, the others are measured without it.
"""

from __future__ import annotations

import json

from bench.gpu.captured_step import require
from bench.gpu.part import Failure, Item, Setting
from bench.train_throughput.presets import PRESETS

ORDER = 45
TITLE = "training steps of sdpnet_xl_bench: original, eager, compiled, fused"
BUDGET = 470
PARTIAL = True
SECONDS = 12.0
GROUPS = {
    "as they are": ("original", "eager", "fused"),
    "compiled": ("eager", "eager, compiled", "fused", "fused, compiled"),
}
"""What takes turns; the goals compare with eager and with its compiled form."""
FORM = {"form": str, "seconds": [float], "*": any}
RESULT = {"preset": str, "activation": str, "batch": int, "group": str, "forms": [FORM], "goals": [any], "*": any}


def cases(setting: Setting) -> list[Item]:
    """A rehearsal leaves the compiler out: it takes longer than everything else."""
    if setting.variant != "plain":
        return []
    name = "tiny" if setting.rehearsal else "sdpnet_xl_bench"
    found = []
    for group, forms in list(GROUPS.items())[: 1 if setting.rehearsal else None]:
        for activation in PRESETS[name].activations:
            arguments = {"preset": name, "activation": activation, "group": group}
            peers = [form for form in forms if not form.startswith("fused")]
            instead = [arguments | {"wanted": peers}]
            found.append(Item(f"{name} {activation} {group}", arguments, timeout=300, alone=True, instead=instead))
    return found


def run(setting: Setting, preset: str, activation: str, group: str, wanted: list[str] | None = None) -> dict:
    """Figures of the group's forms. Failure, with the others' figures, where one of ours is left out."""
    require("sdpnet.train", "matplotlib")
    from bench.train_throughput import measure, report

    chosen, forms, broken, notes = PRESETS[preset], list(wanted or GROUPS[group]), [], []
    while True:
        try:
            results = measure.run(
                chosen, activation, batch=chosen.batch, device=setting.device, wanted=tuple(forms),
                seconds=0.0 if setting.rehearsal else SECONDS, say=notes.append,
            )  # fmt: skip
            break
        except ValueError as wrong:  # a form whose logits are off, which must not take the others with it
            name = str(wrong).partition(":")[0]
            if name not in forms or forms == [name]:
                raise
            forms.remove(name)
            broken.append(str(wrong))
    found = report.record(preset, activation, chosen.batch, setting.device, results)
    found |= {"group": group, "notes": notes}
    broken += [f"{r.form}: {r.reason}" for r in results if r.form.startswith("fused") and r.reason]
    if broken:
        raise Failure("; ".join(broken), found)
    return found


def summary(results: dict[str, dict], setting: Setting) -> dict:
    if not results:
        return {"lines": []}
    from bench.train_throughput import report

    return {"lines": [line for result in results.values() for line in (*report.lines(result), "")]}


def files(file: dict, setting: Setting) -> dict[str, str]:
    """Files as the command writes them, one a group."""
    told = [record["result"] for record in file["records"] if record["status"] in ("ok", "failed") and record["result"]]
    return {
        f"train_throughput-{r['preset']}-{r['activation']}-{r['group'].split()[0]}.json": (
            json.dumps(r, indent=1, allow_nan=False) + "\n"
        )
        for r in told
    }
