"""The pinned Triton, that of the GPU machine, beside whatever Triton is installed: found or prepared in a folder.

    python tests/triton/pinned.py        prepares it and prints the folder

``SDP_TRITON_360`` names a folder that holds it (``pip install --no-deps --target FOLDER triton==3.6.0 "numpy<2.4"``);
else it is installed once into a cache folder of the user's. numpy comes along because this Triton's interpreter fails
with numpy 2.4.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "3.6.0"
REQUIREMENTS = (f"triton=={VERSION}", "numpy<2.4")
ROOT = Path(__file__).resolve().parents[2]


class NotAvailable(RuntimeError):
    """The pinned Triton is not here and can't be fetched."""


def _holds_it(folder: Path) -> bool:
    return (folder / f"triton-{VERSION}.dist-info").is_dir() and (folder / "numpy").is_dir()


def folder() -> Path:
    """A folder to put first on ``PYTHONPATH``. Raises :class:`NotAvailable` where there is none and no network."""
    named = os.environ.get("SDP_TRITON_360")
    if named:
        if not _holds_it(Path(named)):
            raise NotAvailable(f"SDP_TRITON_360={named} holds no Triton {VERSION} with numpy")
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdp_kernels"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    target = cache / f"triton-{VERSION}-{python}"
    if _holds_it(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:  # several processes may want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _holds_it(target):
            _install(target)
    return target


def _install(target: Path) -> None:
    fresh = Path(tempfile.mkdtemp(dir=target.parent))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(fresh), *REQUIREMENTS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise NotAvailable(f"Triton {VERSION} could not be installed: {done.stderr.strip()[-300:]}")
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise NotAvailable(f"Triton {VERSION} could not be installed: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def environment(*, pinned: bool = True, interpret: bool = False) -> dict[str, str]:
    """The environment of a process that imports this repository, with the pinned Triton or the installed one."""
    paths = [str(folder())] if pinned else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SDP_KERNELS_BACKEND")}
    return variables | more | ({"TRITON_INTERPRET": "1"} if interpret else {})


if __name__ == "__main__":
    print(folder())
