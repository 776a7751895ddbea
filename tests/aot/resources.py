"""Prints what every kernel needs on the GPUs it ships for; ``--write`` makes that the committed table, resources.json.

    python tests/aot/resources.py [--write] [cuda] [triton]

Names choose parts; the other parts of the table stay as they are. No GPU is needed: kernels are only compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE / "resources.json"
PARTS = ("cuda", "triton")


def committed(part: str) -> dict:
    """That part of the committed table; empty if there is none."""
    return json.loads(TABLE.read_text(encoding="utf-8")).get(part, {}) if TABLE.exists() else {}


def collect(part: str) -> dict:
    """That part as compiled now."""
    sys.path.insert(0, str(HERE))
    return importlib.import_module(f"resources_{part}").collect()


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
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--write", action="store_true", help=f"update {TABLE.name}")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    new = {part: collect(part) for part in arguments.parts or PARTS}
    print(_lines(new))
    for part in new:
        for line in differences(committed(part), new[part]):
            print(f"{part}: {line}", file=sys.stderr)
    if arguments.write:
        table = {part: new.get(part) or committed(part) for part in PARTS}
        TABLE.write_text(_lines({k: v for k, v in table.items() if v}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
