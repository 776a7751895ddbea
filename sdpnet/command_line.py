"""What the words after ``python -m sdpnet.train`` mean: a configuration, a run folder, a checkpoint to go on from."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from sdpnet import checkpoint
from sdpnet.config import ConfigError
from sdpnet.settings import Resolved, dump, preset_names, read_file, read_overrides, read_preset, resolve

# Other kernels, another device or number of threads: the same samples and masks, though not the same last bits.
RESUME_MAY_CHANGE = (
    "run.fused",
    "run.device",
    "run.threads",
    "run.check_every",
    "data.path",
    "data.threads",
    "data.eval_batch",
    "checkpoint.every_epochs",
    "checkpoint.keep",
)


def parse(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sdpnet.train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="PRESET | section.key=value",
        help=f"a preset ({', '.join(preset_names())}; default: digits), and settings over it",
    )
    parser.add_argument("-c", "--config", type=Path, help="YAML file over the preset")
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=None, help="fused kernels (run.fused)"
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<name>-<time>)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with the run in --out, or in this folder or checkpoint",
    )
    parser.add_argument("--print-config", action="store_true", help="print every value with its origin, and stop")
    options = parser.parse_intermixed_args(arguments)
    if options.resume and "=" in options.resume and not Path(options.resume).exists():
        options.words.append(options.resume)  # `--resume a.b=c`: the word after it is a setting, not a folder
        options.resume = ""
    return options


def settings(options: argparse.Namespace) -> tuple[Resolved, Path | None]:
    """The configuration, and the checkpoint to go on from.

    Resuming, the run's own config.yaml takes the preset's place.
    """
    presets = [word for word in options.words if "=" not in word]
    if len(presets) > 1:
        raise ConfigError(f"wanted one preset, got {' '.join(presets)}")
    layers = [(str(options.config), read_file(options.config))] if options.config else []
    layers.append(("command line", read_overrides(word for word in options.words if "=" in word)))
    if options.fused is not None:
        layers.append(("command line", {"run.fused": options.fused}))
    if options.resume is None:
        name = presets[0] if presets else "digits"
        return resolve((f"preset {name}", read_preset(name)), *layers), None
    if options.resume:
        source = Path(options.resume)
        run = source.parent.parent if (source / "state.json").is_file() else source
        if options.out and options.out.resolve() != run.resolve():
            raise ConfigError(f"--resume {source} and --out {options.out} are different runs; leave --out away")
        options.out = run
    elif options.out:
        source = options.out
    else:
        raise ConfigError("--resume: which run? Give --out DIR as before, or --resume RUN")
    stored = read_file(options.out / "config.yaml")
    resolved = resolve(
        (f"run {options.out}", stored),
        *([(f"preset {presets[0]}", read_preset(presets[0]))] if presets else []),
        *layers,
    )
    before, now = dump(resolve(("stored", stored)).config), dump(resolved.config)
    changed = [
        f"{k} {before.get(k)!r} → {v!r}" for k, v in now.items() if before.get(k) != v and k not in RESUME_MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"--resume cannot change {'; '.join(changed)}: that would be another run "
            "(leave --resume away and give a new --out)"
        )
    found, last = checkpoint.newest(source), checkpoint.newest(options.out)
    if found.resolve() != last.resolve():
        raise ConfigError(f"--resume: {last} is newer than {found}, and nothing is overwritten: move it away first")
    return resolved, found


def new_folder(wanted: Path | None, name: str) -> Path:
    """Where a new run goes. Raises ConfigError when it holds a run already: nothing is ever overwritten."""
    base = wanted or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = base, 2
    while wanted is None and folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {folder} is a file")
    held = [n for n in ("config.yaml", "metrics.csv", "checkpoints", "model.safetensors") if (folder / n).exists()]
    if held:
        way = "--resume goes on with it" if checkpoint.list_checkpoints(folder) else "it has no checkpoint yet"
        raise ConfigError(
            f"--out: {folder} already holds a run ({', '.join(held)}); {way}, another --out starts a new one"
        )
    return folder
