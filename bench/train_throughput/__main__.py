"""Training throughput of SdP-Net, fused against plain PyTorch.

python -m bench.train_throughput                              the preset for this device, every activation
python -m bench.train_throughput --preset cpu --activation gelu --out results/here
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from sdpnet.checkpoint import write_atomically

from . import measure, report
from .forms import FORMS
from .presets import PRESETS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train_throughput", description=__doc__.partition("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=PRESETS, default="sdpnet_xl_bench" if cuda else "cpu")
    parser.add_argument("--activation", action="append", choices=("kelu", "gelu"), help="default: the preset's")
    parser.add_argument("--form", action="append", choices=FORMS, help="default: all")
    parser.add_argument("--batch", type=int, help="samples per step; default: the preset's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the forms take turns; five at least")
    parser.add_argument("--out", type=Path, help="folder for train_throughput-*.json and .png")
    options = parser.parse_args(arguments)
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: PyTorch finds no GPU here")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    preset = PRESETS[options.preset]
    batch = options.batch or preset.batch
    for activation in options.activation or preset.activations:
        results = measure.run(
            preset, activation, batch=batch, device=options.device, seconds=options.seconds,
            wanted=tuple(options.form or FORMS), say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
        told = report.record(options.preset, activation, batch, options.device, results)
        print("\n".join(report.lines(told)), flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            name = options.out / f"train_throughput-{options.preset}-{activation}"
            text = json.dumps(told, indent=1, allow_nan=False) + "\n"
            write_atomically(name.with_suffix(".json"), text.encode())
            report.draw(told, name.with_suffix(".png"))
            print(f"written: {name}.json, {name}.png", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
