"""Proof "interpreter": tests/triton/interpreted, each time in a process of its own whose Triton interprets.

Once with the installed Triton and once with the GPU machine's, both at a time (or each by a worker of pytest-xdist).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
from pinned import VERSION, NotAvailable, environment

HERE = Path(__file__).resolve().parent
WHICH = ("installed", "pinned")
LEAST = 180
"""Fewer tests than that were not all of them."""
SECONDS = 900


class Run:
    """pytest on tests/triton/interpreted, started at once."""

    def __init__(self, variables: dict[str, str], folder: Path):
        self.began = time.monotonic()
        self.report = folder / "report.xml"
        self.output = folder / "output.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--junitxml={self.report}"]
        command += ["-p", "no:cacheprovider", "-p", "no:warnings"]  # numpy's, of Triton 3.6: thousands
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [*command, str(HERE / "interpreted")],
                cwd=HERE.parents[1],
                env=variables,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def counts(self) -> dict[str, int]:
        """Tests, failures, errors and skips, when it is done."""
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"not done after {SECONDS} s:\n{self.output.read_text()[-2000:]}")
        if not self.report.exists():
            pytest.fail(f"no report:\n{self.output.read_text()[-4000:]}")
        suite = next(xml.parse(self.report).iter("testsuite"))
        return {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}


def start(which: str, folder: Path) -> Run | str:
    """The run, or the reason why there is none."""
    pinned = which == "pinned"
    try:
        variables = environment(pinned=pinned, interpret=True)
    except NotAvailable as reason:
        return str(reason)
    return Run({**variables, "SDP_EXPECTED_TRITON": VERSION if pinned else ""}, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both runs; of a worker, which has one core, those that it is asked for."""
    started = {}
    if "PYTEST_XDIST_WORKER" not in os.environ:
        started = {which: start(which, tmp_path_factory.mktemp(which)) for which in WHICH}
    yield started
    for run in started.values():
        if isinstance(run, Run) and run.process.poll() is None:
            run.process.kill()


@pytest.mark.proof("interpreter")
@pytest.mark.parametrize("which", WHICH)
def test_kernels_in_the_interpreter(which, runs, tmp_path, record_property):
    pytest.importorskip("triton")
    run = runs[which] = runs.get(which) or start(which, tmp_path)
    if isinstance(run, str):
        pytest.skip(run)
    counts = run.counts()
    record_property("told", f"interpreter, {which} Triton: {counts} in {time.monotonic() - run.began:.0f} s")
    assert run.process.returncode == 0, run.output.read_text()[-6000:]
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0
    assert counts["tests"] >= LEAST
