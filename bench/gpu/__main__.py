"""``python -m bench.gpu [--list] [--part NAME …] [--out DIR] [--time-limit SECONDS] [--rehearse]``: see docs/gpu.md."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from .part import Setting, all_parts
from .pool import Crew
from .runner import Deadline, Outcome, run_part
from .store import Store, StoreError, code_fingerprint, load, write_atomically

WELL, NOT_WELL, UNUSABLE, UNFINISHED = 0, 1, 2, 3


def _arguments(arguments: list[str] | None, known: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Proves and measures the kernels on a GPU, in parts; what is done is not done again.",
        epilog="Exit status: 0 all is well, 1 something failed, 2 cannot run like this, 3 time was up: run it again.",
    )
    parser.add_argument("--list", action="store_true", help="list the parts and end")
    parser.add_argument("--part", action="append", nargs="+", choices=known, metavar="NAME", help="these parts only")
    parser.add_argument("--out", type=Path, help="folder of results (default: runs/gpu; rehearsal: none)")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="begin no case later")
    parser.add_argument("--rehearse", action="store_true", help="the same code on a CPU: tiny shapes, made-up times")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases with all these words in their name")
    parser.add_argument("--brief", action="store_true", help="say nothing of cases that end well")
    parser.add_argument("--prebuilt", action="store_true", help="use the libraries that are there, if they load")
    parser.add_argument("--retry", action="store_true", help="do again what failed, crashed or timed out before")
    parser.add_argument("--fresh", action="store_true", help="do everything again")
    parser.add_argument("--write", action="store_true", help="configurations: into the committed table")
    options = parser.parse_args(arguments)
    if options.time_limit <= 0:
        parser.error(f"--time-limit must be positive, got {options.time_limit:g}")
    if options.write and options.rehearse:
        parser.error("--write needs measured times; a rehearsal has none")
    return options


def _environment(setting: Setting, crew: Crew) -> dict:
    """Of the machine, told by a worker: this process never touches the GPU. Raises StoreError without a GPU."""
    reply = crew.ask("bench.gpu.machine:describe", setting)
    if reply["status"] != "ok":
        raise StoreError(f"the environment could not be read: {reply['error']}")
    if reply["result"]["gpu"] is None and not setting.rehearsal:
        raise StoreError("torch finds no CUDA device here; --rehearse runs every part's code on a CPU")
    return reply["result"]


def run(options: argparse.Namespace, parts: dict, out: Path, crew: Crew) -> int:
    """Run the chosen parts into ``out``; the exit status. A rehearsal's parts share workers, to save their starts."""
    names = [n for group in options.part for n in group] if options.part else list(parts)
    setting = Setting(rehearsal=options.rehearse, prebuilt=options.prebuilt)
    deadline = Deadline.after(options.time_limit)
    environment, code = _environment(setting, crew), code_fingerprint()
    out.mkdir(parents=True, exist_ok=True)
    if not options.rehearse:
        crew.dismiss()
    outcomes: list[Outcome] = []
    for name in [n for n in parts if n in names]:
        part = parts[name]
        if deadline.over:
            outcomes.append(Outcome(name, planned=1))
            continue
        store = Store(out, name, rehearsal=options.rehearse, environment=environment, code=code, fresh=options.fresh)
        _say(f"{name}: {part.TITLE}")
        setting = replace(setting, facts=_facts(out, options.rehearse))
        shared = crew if options.rehearse else None
        how = {"retry": options.retry, "only": options.only, "brief": options.brief, "crew": shared, "say": _say}
        outcomes.append(run_part(part, store, setting, deadline, **how))
        if store.path.exists():
            _conclude(part, store, setting, out, options.write)
    print("\n".join(["", *(outcome.line() for outcome in outcomes)]))
    if options.rehearse:
        print("rehearsal: the files fit their schema; none of their numbers was measured")
    if not all(outcome.well for outcome in outcomes):
        return NOT_WELL
    return WELL if all(outcome.complete for outcome in outcomes) else UNFINISHED


def _conclude(part: ModuleType, store: Store, setting: Setting, out: Path, write: bool) -> None:
    """Read the file back, write what belongs beside it, print its summary."""
    content = load(store.path, rehearsal=setting.rehearsal, result=part.RESULT)
    extra = part.files(content, setting) if hasattr(part, "files") else {}
    for file, text in extra.items() if not setting.rehearsal else ():
        write_atomically(out / file, text)
    if write and hasattr(part, "write"):
        _say("  " + part.write(content))
    for line in (content["summary"] or {}).get("lines", []):
        _say(f"  {line}")


def _say(line: str) -> None:
    print(line, flush=True)


def _facts(out: Path, rehearsal: bool) -> dict:
    """Summaries of the parts that have one in this folder."""
    facts = {}
    for path in sorted(out.glob("*.json")):
        try:
            content = load(path, rehearsal=rehearsal)
        except StoreError:
            continue
        if content["summary"] is not None:
            facts[content["part"]] = {k: v for k, v in content["summary"].items() if k != "lines"}
    return facts


def main(arguments: list[str] | None = None) -> int:
    parts = all_parts()
    options = _arguments(arguments, list(parts))
    if options.list:
        for name, part in parts.items():
            print(f"{name:<16} {part.TITLE} (≤ {part.BUDGET} s)")
        return WELL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers are ended
    start, crew = time.monotonic(), Crew()
    try:
        if options.rehearse and options.out is None:
            with tempfile.TemporaryDirectory() as folder:
                return run(options, parts, Path(folder), crew)
        return run(options, parts, options.out or Path("runs/gpu"), crew)
    except StoreError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print(f"\ninterrupted after {time.monotonic() - start:.0f} s; what was finished is kept", file=sys.stderr)
        return 130
    finally:
        crew.dismiss()


if __name__ == "__main__":
    sys.exit(main())
