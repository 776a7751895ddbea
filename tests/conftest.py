"""Rules for all tests.

``SDP_REQUIRE_PROOFS=1`` (set by ``.ci/run``): a skipped test is a failed one, so that no proof is silently left out.
The exception is the marker ``gpu``: those tests are for another machine.

Property tests run hypothesis derandomised, without a deadline and without its database: the same cases every time.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "sdp",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sdp")


def proofs_required() -> bool:
    """Whether a skip is a failure."""
    return os.environ.get("SDP_REQUIRE_PROOFS", "0") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "proof(name): one of the ways a GPU kernel is proven without a GPU")
    config.addinivalue_line("markers", "levels: belongs to the compact set that every SIMD level of the CPU runs")


def _failed_instead(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"SDP_REQUIRE_PROOFS=1 and this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.skipped and proofs_required() and item.get_closest_marker("gpu") is None:
        _failed_instead(report)
    if proof := item.get_closest_marker("proof"):
        report.user_properties.append(("proof", proof.args[0]))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if report.skipped and proofs_required():
        _failed_instead(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests of each proof ran, with what outcome, and their seconds."""
    counts, seconds = defaultdict(Counter), Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name in {value for key, value in report.user_properties if key == "proof"}:
                counts[name][outcome] += 1
                seconds[name] += report.duration
    for name, outcomes in sorted(counts.items()):
        told = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        terminalreporter.write_line(f"proof {name}: {told} in {seconds[name]:.0f} s")
