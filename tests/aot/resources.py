"""Prints what every kernel needs on the GPUs it ships for; ``--write`` makes that the committed tables, committed/.

    python tests/aot/resources.py [--write] [cuda] [triton] [cuda/kelu …]

Names choose backends, or one operator of one. No GPU is needed: kernels are only compiled. An operator takes part by a
module ``cuda_<operator>.py`` (beside its ``cuda_<operator>.cu``) or ``triton_<operator>.py``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
TABLES = HERE / "committed"
BACKENDS = ("cuda", "triton")
PARTS = tuple(
    f"{backend}/{path.stem.removeprefix(backend + '_')}"
    for backend in BACKENDS
    for path in sorted(HERE.glob(f"{backend}_*.py"))
)
"""Backend and operator, e.g. "cuda/kelu"."""


def operators(backend: str) -> list[str]:
    """That have kernels on that backend."""
    return [part.partition("/")[2] for part in PARTS if part.startswith(backend + "/")]


def module(part: str) -> ModuleType:
    """``cuda_kelu`` for "cuda/kelu"."""
    sys.path.insert(0, str(HERE))
    return importlib.import_module(part.replace("/", "_"))


def table(part: str) -> Path:
    """Where the committed table of a part stands."""
    return TABLES / f"{part.replace('/', '_')}.json"


def committed(part: str) -> dict:
    """The committed table of a part; empty if there is none."""
    return json.loads(table(part).read_text(encoding="utf-8")) if table(part).exists() else {}


def collect(part: str) -> dict:
    """That part as compiled now."""
    sys.path.insert(0, str(HERE))
    backend, _, operator = part.partition("/")
    return importlib.import_module(f"resources_{backend}").collect(operator)


def differences(old, new, path: str = "") -> list[str]:
    """One line per value that differs, with where it stands: "kernels / name / sm_90 / registers: 64 → 72"."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            where = f"{path} / {key}" if path else str(key)
            if key not in new:
                lines.append(f"{where}: gone")
            elif key not in old:
                lines.append(f"{where}: new")
            else:
                lines += differences(old[key], new[key], where)
        return lines
    return [] if old == new else [f"{path}: {old} → {new}"]


def _lines(value, indent: int = 0) -> str:
    """JSON with the innermost objects on one line, so that a diff shows a kernel per line."""
    space = " " * indent
    if isinstance(value, dict) and any(isinstance(v, (dict, list)) for v in value.values()):
        inner = [f"{space}  {json.dumps(k)}: {_lines(v, indent + 2)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner) + f"\n{space}}}"
    return json.dumps(value, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join((*BACKENDS, *PARTS))}; all by default")
    parser.add_argument("--write", action="store_true", help=f"update {TABLES.name}/")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - {*BACKENDS, *PARTS}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    wanted = [p for p in PARTS if not arguments.parts or {p, p.partition("/")[0]} & set(arguments.parts)]
    for part in wanted:
        new = collect(part)
        print(_lines({part: new}), flush=True)
        for line in differences(committed(part), new):
            print(f"{part}: {line}", file=sys.stderr)
        if arguments.write:
            table(part).write_text(_lines(new) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
