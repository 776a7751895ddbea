"""Everything static is in pyproject.toml; this adds the two optional extensions (see build_backend/sdp_build)."""

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

from sdp_build.command import BuildKernels
from sdp_build.extensions import NAMES

# The libraries use Python's limited API of 3.11, so one wheel serves every later Python (except free-threaded ones).
limited = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[Extension(f"sdp_kernels.{name}", sources=[], py_limited_api=limited, optional=True) for name in NAMES],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited else {},
)
