"""Proof "interpreter": tests/triton/interpreted, each time in a process of its own whose Triton interprets.

Once with the installed Triton and once with the GPU machine's, both at a time.
"""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
from pinned import NotAvailable, environment

HERE = Path(__file__).resolve().parent
LEAST = 180
"""Fewer tests than that were not all of them."""
SECONDS = 900


class Run:
    """pytest on tests/triton/interpreted, started at once."""

    def __init__(self, variables: dict[str, str], folder: Path):
        self.began = time.monotonic()
        self.report = folder / "report.xml"
        self.output = folder / "output.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--junitxml={self.report}"]
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both runs, or the reason why there is none."""
    started: dict[str, Run | str] = {}
    for name, pinned in (("installed", False), ("pinned", True)):
        try:
            variables = environment(pinned=pinned, interpret=True)
            variables["SDP_EXPECTED_TRITON"] = "3.6.0" if pinned else ""
            started[name] = Run(variables, tmp_path_factory.mktemp(name))
        except NotAvailable as reason:
            started[name] = str(reason)
    yield started
    for run in started.values():
        if isinstance(run, Run) and run.process.poll() is None:
            run.process.kill()


@pytest.mark.proof("interpreter")
@pytest.mark.parametrize("which", ["installed", "pinned"])
def test_kernels_in_the_interpreter(which, runs, record_property, capsys):
    pytest.importorskip("triton")
    run = runs[which]
    if isinstance(run, str):
        pytest.skip(run)
    counts = run.counts()
    record_property("counts", counts)
    with capsys.disabled():
        print(f"\ninterpreter, {which} Triton: {counts} in {time.monotonic() - run.began:.0f} s")
    assert run.process.returncode == 0, run.output.read_text()[-6000:]
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0
    assert counts["tests"] >= LEAST
