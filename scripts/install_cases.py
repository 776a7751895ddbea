"""Try ``pip install -e .`` in each situation a user can be in, each in its own environment and copy of the sources.

    python scripts/install_cases.py                # all cases; one that gets a CUDA build of torch takes 6 GB and more
    python scripts/install_cases.py --case no-nvcc --case offline
    python scripts/install_cases.py --list
    python scripts/install_cases.py --cpu-torch "torch==2.13.0" --python python3.12

Prints one row per case: seconds and CPU seconds of the install alone, what was built, what was left out. Exits with 1
if a case failed: the install itself, a library missing or not loading though this machine can build it, or operators
that do not run afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

from sdp_build import toolchain  # noqa: E402
from sdp_build.extensions import NAMES, REPORT_NAME  # noqa: E402
from sdp_build.plan import sources_of  # noqa: E402

CXX_NAMES = ("c++", "g++", "clang++", "cc", "gcc", "clang", "x86_64-linux-gnu-g++", "x86_64-linux-gnu-gcc")


@dataclass(frozen=True)
class Case:
    """One situation: which torch is installed beforehand, which tools are hidden, how pip is called."""

    name: str
    text: str
    torch: str | None = None  # "cpu", "cuda" or None
    hide: tuple[str, ...] = ()
    offline: bool = False


CASES = [
    Case("nothing", "empty environment"),
    Case("cpu-torch", "CPU build of torch installed", torch="cpu"),
    Case("cuda-torch", "CUDA build of torch installed", torch="cuda"),
    Case("no-nvcc", "CPU build of torch, no nvcc", torch="cpu", hide=("nvcc",)),
    Case("no-compiler", "empty environment, no compiler at all", hide=("nvcc", "c++")),
    Case("offline", "everything installed, no network, no isolation, no dependencies", torch="cpu", offline=True),
]

CHECK = """
import importlib, json, sys, torch, sdp_kernels
report = json.loads(open(sys.argv[1]).read())
for name, entry in report.items():
    # _C_cuda needs the libraries of a CUDA build of torch; beside a CPU build it is a compile check only.
    if entry["built"] and (name == "_C" or torch.version.cuda):
        importlib.import_module("sdp_kernels." + name)
x = torch.randn(2, 6, 5, 7, requires_grad=True)
y = sdp_kernels.layer_norm_2d(sdp_kernels.kelu(x), torch.ones(6), torch.zeros(6))
y.square().sum().backward()
assert y.shape == x.shape and torch.isfinite(x.grad).all()
if report["_C"]["built"]:
    with sdp_kernels.use_backend("cpu"):
        torch.testing.assert_close(sdp_kernels.kelu(x), sdp_kernels.kelu(x, backend="reference"))
print("torch", torch.__version__)
"""


def run(command: list[str], log: Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command, its output appended to ``log`` and returned; RuntimeError with its end if it fails."""
    start = time.perf_counter()
    result = subprocess.run(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}  # {time.perf_counter() - start:.1f} s\n{result.stdout}\n")
    if result.returncode != 0:
        tail = "\n".join(result.stdout.splitlines()[-15:])
        raise RuntimeError(f"{shlex.join(command)} exited with {result.returncode}:\n{tail}")
    return result.stdout


def copy_sources(target: Path) -> None:
    """The files git knows or would add, as they are now: what a fresh clone of the coming commit holds."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def environment(case: Case, folder: Path) -> dict[str, str]:
    """This process's environment with the case's tools hidden: a PATH of links to everything but them."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SDP_", "PYTHON", "VIRTUAL_ENV"))}
    if "nvcc" in case.hide:
        env["CUDACXX"] = str(folder / "no-such-nvcc")  # or /usr/local/cuda would be found without PATH
    if case.hide:
        hidden = {"nvcc"} | (set(CXX_NAMES) if "c++" in case.hide else set())
        tools = folder / "tools"
        tools.mkdir()
        for directory in env.get("PATH", os.defpath).split(os.pathsep):
            for tool in sorted(Path(directory).glob("*")) if Path(directory).is_dir() else ():
                versioned = tool.name.rstrip("0123456789.").rstrip("-")  # g++-12 is g++
                if not hidden & {tool.name, versioned} and not os.path.lexists(tools / tool.name):
                    (tools / tool.name).symlink_to(tool)
        env["PATH"] = str(tools)
    return env


def expected(case: Case, sources: Path) -> dict[str, bool]:
    """Which extensions this machine can build from ``sources`` in a case."""
    usable = {}
    for name in NAMES:
        try:
            toolchain.find_cxx(os.environ)
            if name == "_C_cuda":
                toolchain.find_nvcc(os.environ)
            usable[name] = bool(sources_of(sources, name))
        except toolchain.Missing:
            usable[name] = False
    return {name: usable[name] and "c++" not in case.hide and not (name == "_C_cuda" and case.hide) for name in NAMES}


def cpu_seconds() -> float:
    """Processor time of all finished child processes: what an install costs on a machine that has other work too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def try_case(case: Case, folder: Path, options: argparse.Namespace) -> tuple[str, dict[str, dict], str]:
    """Install as the case says; returns the seconds it took, the build's report and what the check printed."""
    log, sources, venv = folder / "log.txt", folder / "sources", folder / "venv"
    copy_sources(sources)
    env = environment(case, folder)
    run([options.python, "-m", "venv", str(venv)], log)
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "install"]
    if case.torch is not None:
        run([*pip, *shlex.split(options.cpu_torch if case.torch == "cpu" else options.cuda_torch)], log)
    if case.offline:
        run([*pip, "setuptools>=77", "wheel", "ninja"], log)
        run([*pip, *runtime_dependencies()], log)
        offline = ["--no-build-isolation", "--no-deps"]
        env["PIP_NO_INDEX"] = "1"
        cut_off = ["unshare", "--net"] if shutil.which("unshare") and os.geteuid() == 0 else []
        command = [*cut_off, *pip, *offline, "-v", "-e", str(sources)]
    else:
        command = [*pip, "-v", "-e", str(sources)]
    start, cpu_start = time.perf_counter(), cpu_seconds()
    run(command, log, env=env)
    seconds = f"{time.perf_counter() - start:.0f} | {cpu_seconds() - cpu_start:.0f}"

    report_path = sources / "sdp_kernels" / REPORT_NAME
    report = json.loads(report_path.read_text(encoding="utf-8"))
    built = {name: entry["built"] for name, entry in report.items()}
    if built != expected(case, sources):
        raise RuntimeError(f"built {built}, expected {expected(case, sources)}; reasons: {reasons(report)}")
    text = run([python, "-c", CHECK, str(report_path)], log, env=env, cwd=folder).strip().splitlines()[-1]
    run([python, "-m", "sdp_kernels.info"], log, env=env, cwd=folder)
    return seconds, report, text


def runtime_dependencies() -> list[str]:
    """The package's own requirements but torch, which the case has chosen already."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [requirement for requirement in project["dependencies"] if not requirement.startswith("torch")]


def reasons(report: dict[str, dict]) -> str:
    """Why each missing extension is missing."""
    return "; ".join(f"{name}: {entry['reason']}" for name, entry in report.items() if not entry["built"]) or "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], help="only this one (repeatable)"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--python", default=sys.executable, help="interpreter that makes the environments")
    cpu_index = "https://download.pytorch.org/whl/cpu"
    parser.add_argument(
        "--cpu-torch", default=f"torch --index-url {cpu_index}", help="pip's arguments for a CPU build of torch"
    )
    parser.add_argument("--cuda-torch", default="torch", help="pip's arguments for a CUDA build of torch")
    parser.add_argument(
        "--work", type=Path, default=None, help="folder for the environments (default: the temporary one)"
    )
    parser.add_argument("--keep", action="store_true", help="leave environments and logs in place")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{case.name:12} {case.text}" for case in CASES))
        return 0

    failed, rows = [], []
    for case in [case for case in CASES if not options.case or case.name in options.case]:
        folder = Path(tempfile.mkdtemp(prefix=f"sdp-{case.name}-", dir=options.work))
        try:
            seconds, report, text = try_case(case, folder, options)
            built = ", ".join(name for name, entry in report.items() if entry["built"]) or "nothing"
            rows.append(f"| {case.name} | {seconds} | {built} | {reasons(report)} | {text}, imports, runs | ok |")
        except RuntimeError as error:
            failed.append(case.name)
            rows.append(f"| {case.name} | - | - | - | - | {str(error).splitlines()[0]} | FAILED |")
            print(f"{case.name}: {error}", file=sys.stderr)
        finally:
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
        print(rows[-1], flush=True)
    print("\n| case | seconds | CPU s | built | left out | check | result |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
