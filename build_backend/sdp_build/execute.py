"""Running a plan: with ninja (parallel, only what changed, headers included), or one command after the other."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from .plan import Plan, write_if_changed
from .toolchain import Tool


class BuildFailed(Exception):
    """A compiler said no; the text is its first error line and where the rest is written."""


def execute(plan: Plan, work: Path, *, ninja: Tool | None, jobs: int) -> None:
    """Make the plan's output; the full output goes to ``work``/build.log. Raises BuildFailed with the first error."""
    work.mkdir(parents=True, exist_ok=True)
    if ninja is not None:
        write_if_changed(work / "build.ninja", ninja_file(plan))
        command = [*ninja.command, "-C", str(work), "-j", str(jobs)]
        returncode, output = _run(command)
    else:
        returncode, output = _one_by_one(plan)
    (work / "build.log").write_text(output, encoding="utf-8")
    if returncode != 0:
        raise BuildFailed(f"{first_error(output)} (everything it said: {work / 'build.log'})")


def _run(command: list[str] | tuple[str, ...]) -> tuple[int, str]:
    try:
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return 1, f"error: {command[0]}: {error}\n"
    sys.stdout.write(result.stdout)
    return result.returncode, result.stdout


def _one_by_one(plan: Plan) -> tuple[int, str]:
    outputs = []
    for step in plan.steps:
        step.output.unlink(missing_ok=True)
        returncode, output = _run(step.command)
        outputs.append(f"{step.text}\n{output}")
        if returncode != 0:
            return returncode, "".join(outputs)
    return 0, "".join(outputs)


def ninja_file(plan: Plan) -> str:
    """The text of build.ninja for a plan."""
    lines = [
        "ninja_required_version = 1.5",
        "rule run",
        "  command = $command",
        "  description = $text",
        "rule compile",
        "  command = $command",
        "  description = $text",
        "  depfile = $depfile",
        "  deps = gcc",
    ]
    for step in plan.steps:
        rule = "run" if step.depfile is None else "compile"
        inputs = " ".join(_path(path) for path in step.inputs)
        lines.append(f"build {_path(step.output)}: {rule} {inputs}")
        lines.append(f"  command = {shlex.join(step.command).replace('$', '$$')}")
        lines.append(f"  text = {step.text}")
        if step.depfile is not None:
            lines.append(f"  depfile = {str(step.depfile).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def first_error(output: str) -> str:
    """The first line of a compiler's output that names an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        lowered = line.lower()
        if "error:" in lowered or "error :" in lowered or "fatal" in lowered or "undefined reference" in lowered:
            return line
    return lines[-1] if lines else "the build stopped without a word"
