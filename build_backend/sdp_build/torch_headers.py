"""Where torch's headers come from: an installed torch, or its wheel, out of which they are taken without installing it.

The stable ABI makes any torch from 2.11 on as good as any other here; and they are never part of this repository.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .toolchain import Missing

MIN_TORCH = (2, 11)
REQUIREMENT = f"torch>={'.'.join(map(str, MIN_TORCH))}"


@dataclass(frozen=True)
class TorchHeaders:
    """A directory with torch's headers and the version of the torch it belongs to."""

    include: Path
    version: str


def fetched_directory(root: Path) -> Path:
    """Where headers taken out of a wheel are kept: beside the objects made with them, laid out as when installed."""
    return root / "build" / "sdp" / "torch_headers"


def site_directories() -> list[Path]:
    """Where packages of the target environment live, also from inside pip's build isolation, then the build's own path.

    Under isolation pip hides the environment from ``sys.path``, but ``sysconfig`` still names it.
    """
    schemes = [sysconfig.get_default_scheme(), "deb_system", "posix_prefix"]
    found = [
        sysconfig.get_path(key, scheme)
        for scheme in schemes
        if scheme in sysconfig.get_scheme_names()
        for key in ("purelib", "platlib")
    ]
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    return list(dict.fromkeys(Path(path) for path in [*found, *sys.path] if path))


def search_path(root: Path) -> list[Path]:
    """Where to look for a torch with headers: those fetched earlier, the target environment, the build's own path."""
    return [fetched_directory(root), *site_directories()]


def find_torch_headers(directories: Iterable[Path]) -> TorchHeaders:
    """The headers of the first torch >= 2.11 under ``directories``; raises Missing if there is none."""
    too_old = []
    for directory in directories:
        torch = Path(directory, "torch")
        try:
            text = (torch / "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        version = re.search(r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)['\"]", text)
        if version is None or not (torch / "include/torch/csrc/stable/library.h").is_file():
            continue
        if (int(version[2]), int(version[3])) >= MIN_TORCH:
            return TorchHeaders(torch / "include", version[1])
        too_old.append(version[1])
    if too_old:
        raise Missing(f"the torch found is {too_old[0]}; wanted are the headers of {REQUIREMENT}")
    raise Missing(f"no torch headers are visible (install {REQUIREMENT} before building the extensions)")


def take_from_wheel(requirement: str, target: Path, *options: str, libraries=(), timeout: float = 900) -> None:
    """Have this environment's pip download torch's wheel, and keep its headers alone as ``target``.

    They lie as when installed, and so do the ``libraries`` asked for (names in torch/lib) that the wheel has.
    ``options`` are pip's. Raises Missing where that is not possible: no pip here, no network, no such wheel.
    """
    # -I, because pip hides the environment that holds it from this process by way of PYTHONPATH.
    pip = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    wanted = ("torch/version.py", "torch/include/", *(f"torch/lib/{name}" for name in libraries))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [*pip, *options, "--dest", folder, requirement]
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=timeout)
            (wheel,) = Path(folder).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(folder, "out"), [n for n in archive.namelist() if n.startswith(wanted)])
            find_torch_headers([Path(folder, "out")])  # before it gets the name under which it is trusted
            os.replace(Path(folder, "out"), target)
        except (OSError, subprocess.SubprocessError, ValueError, zipfile.BadZipFile) as error:
            raise Missing(f"torch's headers could not be taken out of its wheel ({error})") from error


def fetch_torch_headers(root: Path) -> bool:
    """Take the headers out of torch's wheel; False where that is not possible, for the caller to ask for torch itself.

    A fetched copy is looked at first from then on: other headers, though equal, would compile everything again, as the
    second of "pip install -e ." and "pip install -e .[test]" would.
    """
    target = fetched_directory(root)
    shutil.rmtree(target, ignore_errors=True)
    try:
        take_from_wheel(REQUIREMENT, target)
    except Missing as reason:
        print(f"{reason}; asking for torch itself", flush=True)
        return False
    return True
