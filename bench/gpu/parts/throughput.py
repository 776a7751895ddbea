"""A training step of SdP-Net in all forms (``python -m bench.train_throughput``), one activation a case."""

from __future__ import annotations

import json

from bench.gpu.part import Item, Setting
from bench.train_throughput import measure, report
from bench.train_throughput.forms import FORMS
from bench.train_throughput.presets import PRESETS

ORDER = 45
TITLE = "training steps of sdpnet_xl_bench: original, eager, compiled, fused"
BUDGET = 400
SECONDS = 20.0
FORM = {"form": str, "seconds": [float], "*": any}
RESULT = {"preset": str, "activation": str, "batch": int, "forms": [FORM], "goals": [any], "*": any}


def cases(setting: Setting) -> list[Item]:
    if setting.variant != "plain":
        return []
    name = "tiny" if setting.rehearsal else "sdpnet_xl_bench"
    arguments = [{"preset": name, "activation": activation} for activation in PRESETS[name].activations]
    return [Item(f"{name} {a['activation']}", a, timeout=390, alone=True) for a in arguments]


def run(setting: Setting, preset: str, activation: str) -> dict:
    """A rehearsal leaves the compiler out: it takes longer than everything else."""
    chosen = PRESETS[preset]
    wanted = tuple(form for form in FORMS if not (setting.rehearsal and "compiled" in form))
    results = measure.run(
        chosen, activation, batch=chosen.batch, device=setting.device, wanted=wanted,
        seconds=0.0 if setting.rehearsal else SECONDS, say=lambda text: None,
    )  # fmt: skip
    return report.record(preset, activation, chosen.batch, setting.device, results)


def summary(results: dict[str, dict], setting: Setting) -> dict:
    return {"lines": [line for result in results.values() for line in (*report.lines(result), "")]}


def files(file: dict, setting: Setting) -> dict[str, str]:
    """The same files that the command writes."""
    told = [record["result"] for record in file["records"] if record["status"] == "ok"]
    return {
        f"train_throughput-{r['preset']}-{r['activation']}.json": json.dumps(r, indent=1, allow_nan=False) + "\n"
        for r in told
    }
