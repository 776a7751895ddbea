"""A training step in a CUDA graph: the repository's own test of it, which needs a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

from .part import Failure, Setting, Unavailable
from .worker import ROOT, scrubbed

TEST = "tests/train/test_capture.py"
NEEDS = ("pytest", "sdpnet.train")


def require(*modules: str) -> None:
    """Raises Unavailable where one of them can't be imported, for want of a package that an image need not have."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Unavailable(f"{name}: {error}") from None


def run(setting: Setting) -> str:
    """What pytest says last; a rehearsal only collects."""
    require(*NEEDS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", TEST]
    environment = {k: v for k, v in os.environ.items() if k != "SDP_REQUIRE_PROOFS"}
    done = subprocess.run(
        [*command, "--collect-only"] if setting.rehearsal else command,
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout.strip().splitlines() or [""]
    if done.returncode or (not setting.rehearsal and "passed" not in said[-1]):
        raise Failure(scrubbed(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-1200:]}"))
    return said[-1]
