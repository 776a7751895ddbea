"""The policy: an extension is built where it can be; where not, the reason is recorded (an error, if it was demanded).

``build_extensions`` leaves the libraries and ``_build_report.json`` in the package directory and returns the report,
which ``python -m sdp_kernels.info`` shows. It has one entry per extension: built, reason and, of a built one, compiler,
flags, arch_list, torch_headers, schema_hash, commit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from . import toolchain, torch_headers
from .execute import BuildFailed, execute
from .plan import Plan, plan_extension, sources_of
from .settings import SettingError, Settings, gencode_flags
from .toolchain import Missing

NAMES = ("_C", "_C_cuda")
REPORT_NAME = "_build_report.json"
SWITCHES = {"_C": "SDP_BUILD_CPU", "_C_cuda": "SDP_BUILD_CUDA"}


class DemandedBuildError(RuntimeError):
    """An extension demanded with SDP_BUILD_CPU=1 or SDP_BUILD_CUDA=1 could not be built."""


def library_name(name: str) -> str:
    """File name of an extension's library."""
    return f"{name}.abi3.so"


def schema_hash(root: Path) -> str:
    """Hash of the operators' schemas, by the package's own torch-free function, loaded from its file."""
    path = root / "sdp_kernels" / "_schema_hash.py"
    spec = importlib.util.spec_from_file_location("_sdp_schema_hash", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.schema_hash(root / "sdp_kernels" / "ops")


def build_extensions(root: Path, package_dir: Path, env: Mapping[str, str] | None = None) -> dict[str, dict]:
    """Build what can be built from ``root``/csrc into ``package_dir``; raises SettingError or DemandedBuildError."""
    env = os.environ if env is None else env
    settings = Settings.from_env(env)
    package_dir.mkdir(parents=True, exist_ok=True)
    report, demanded = {}, []
    for name in NAMES:
        wish = settings.cpu if name == "_C" else settings.cuda
        target = package_dir / library_name(name)
        try:
            report[name] = _build(name, root, target, wish, settings, env)
        except (Missing, BuildFailed) as error:
            # A library left from an earlier build would be loaded as if it belonged to these sources.
            target.unlink(missing_ok=True)
            report[name] = {"built": False, "reason": str(error)}
            if wish == "1":
                demanded.append(f"{SWITCHES[name]}=1, but sdp_kernels.{name} cannot be built: {error}")
    (package_dir / REPORT_NAME).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if demanded:
        raise DemandedBuildError("; ".join(demanded))
    return report


def _build(name: str, root: Path, target: Path, wish: str, settings: Settings, env: Mapping[str, str]) -> dict:
    if wish == "0":
        raise Missing(f"switched off by {SWITCHES[name]}=0")
    if not sys.platform.startswith("linux"):
        raise Missing(f"built on Linux only, this is {sys.platform}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise Missing("a free-threaded Python cannot load libraries of the limited API")
    if not sources_of(root, name):
        raise Missing(f"this source tree holds no sources for it (csrc/{'cpu' if name == '_C' else 'cuda'})")
    nvcc = toolchain.find_nvcc(env) if name == "_C_cuda" else None
    plan = plan_extension(
        name,
        root,
        root / "build" / "sdp" / name,
        cxx=toolchain.find_cxx(env),
        nvcc=nvcc,
        torch=torch_headers.find_torch_headers(torch_headers.search_path(root)),
        python_include=toolchain.find_python_headers(),
        arch_list=_arch_list(settings, nvcc) if nvcc is not None else (),
        schema_hash=schema_hash(root),
        commit=toolchain.git_commit(root),
        env=env,
    )
    execute(plan, root / "build" / "sdp" / name, ninja=toolchain.find_ninja(env), jobs=settings.jobs)
    _install(plan, target)
    return {"built": True, "reason": None, **plan.facts}


def _arch_list(settings: Settings, nvcc: toolchain.Tool) -> tuple[str, ...]:
    chosen = settings.arch_list or toolchain.present_gpus() or toolchain.DEFAULT_ARCH_LIST
    listed = toolchain.run([*nvcc.command, "--list-gpu-code"])
    known = listed.stdout.split() if listed is not None and listed.returncode == 0 else []
    for entry in chosen if known else ():
        code = gencode_flags((entry,))[0].rpartition("code=")[2]
        # Suffixed forms (sm_90a, sm_100f) are listed by newer versions of nvcc only; their plain form is.
        if code not in known and code.rstrip("af") not in known:
            source = "TORCH_CUDA_ARCH_LIST names" if settings.arch_list else "the GPU here has"
            raise Missing(
                f"{source} compute capability {entry}, which {nvcc.version} does not know ({', '.join(known)})"
            )
    return chosen


def _install(plan: Plan, target: Path) -> None:
    # Put in place by a rename: a running process keeps the file it has mapped, instead of crashing in the new one.
    fresh = target.with_suffix(".new")
    shutil.copy2(plan.output, fresh)
    fresh.replace(target)


def summary(report: Mapping[str, Mapping]) -> str:
    """The one line that says what was built and what was left out, and why."""
    built = [
        f"{name} ({entry['compiler'].split(' (')[0]}; {', '.join(entry['arch_list'])})"
        for name, entry in report.items()
        if entry["built"]
    ]
    left_out = [f"{name}: {entry['reason']}" for name, entry in report.items() if not entry["built"]]
    parts = [f"built {' and '.join(built)}" if built else "built no extension (Triton and reference backends remain)"]
    if left_out:
        parts.append(f"left out {'; '.join(left_out)}")
    return "sdp_kernels: " + "; ".join(parts)


__all__ = [
    "NAMES",
    "REPORT_NAME",
    "DemandedBuildError",
    "SettingError",
    "build_extensions",
    "library_name",
    "schema_hash",
    "summary",
]
