"""Fresh interpreters, for what is decided when the package is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import sdp_kernels

ROOT = Path(sdp_kernels.__file__).parents[1]


def python(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run python with the package importable and no setting of its own but ``environment``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDP_KERNELS_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
