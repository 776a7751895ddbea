"""Rules for all tests.

``SDP_REQUIRE_PROOFS=1`` (set by ``.ci/run``): a skipped test is a failed one, so that no proof is silently left out.
The exception is the marker ``gpu``: those tests are for another machine.

Property tests run hypothesis derandomised, without a deadline and without its database: the same cases every time.

``pytest -n 2`` (pytest-xdist) runs two files at a time, long ones first. A file stays with one worker, which then makes
what its tests share once; :func:`unit` names the few whose tests are handed out in smaller parts.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict

import hypothesis
import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # before torch is imported: a core for each worker
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", os.environ["OMP_NUM_THREADS"])

hypothesis.settings.register_profile(
    "sdp",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sdp")
SECONDS = pytest.StashKey[float]()
LONG = (
    "tests/triton/",
    "tests/aot/test_resources_triton",
    "tests/aot/",
    "tests/install/test_oldest_torch",
    "tests/simt/",
    "tests/bench/",
)
"""Where the longest tests are, longest first: what is handed out last should be short."""
BY_OPERATOR = ("tests/aot/test_resources_triton.py", "tests/aot/test_resources_cuda.py")
"""Files that compile one operator at a time, named by a test's first parameter."""
ALONE = (
    "tests/aot/test_resources_triton.py::test_variants_compile_without_spilling",
    "tests/kernels/test_levels.py::test_lower_level_passes_the_tests",
    "tests/simt/test_simt_sanitizers.py::test_kernels",
    "tests/triton/test_interpreter.py::test_kernels_in_the_interpreter",
)
"""Long tests that share nothing: each compiles or starts something of its own."""


def proofs_required() -> bool:
    """Whether a skip is a failure."""
    return os.environ.get("SDP_REQUIRE_PROOFS", "0") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "proof(name): one of the ways a GPU kernel is proven without a GPU")
    config.addinivalue_line("markers", "levels: belongs to the compact set that every SIMD level of the CPU runs")
    os.environ.pop("PYTEST_ADDOPTS", None)  # this run's, and not that of the runs which tests start
    if hasattr(config.option, "maxworkerrestart"):  # a test that ends its worker has failed: said by name, and the end
        config.option.maxworkerrestart = config.option.maxworkerrestart or "0"


def unit(nodeid: str) -> str:
    """The tests of one unit go to one worker, one after the other: a file's, an operator's, or a single one."""
    test, _, parameters = nodeid.partition("[")
    path = test.partition("::")[0]
    if test in ALONE:
        return nodeid
    return f"{path} {parameters.rstrip(']').partition('-')[0]}" if path in BY_OPERATOR else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    if config.option.dist != "load":  # asked for
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    config.option.loadscopereorder = False  # pytest_collection_modifyitems has put them in order
    return Units(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        ranks = {item: next((i for i, path in enumerate(LONG) if item.nodeid.startswith(path)), 99) for item in items}
        items.sort(key=ranks.__getitem__)


def _failed_instead(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"SDP_REQUIRE_PROOFS=1 and this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.skipped and proofs_required() and item.get_closest_marker("gpu") is None:
        _failed_instead(report)
    item.stash[SECONDS] = item.stash.get(SECONDS, 0.0) + report.duration
    if proof := item.get_closest_marker("proof"):
        report.user_properties.append(("proof", proof.args[0]))
        report.user_properties.append(("seconds", item.stash[SECONDS]))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if report.skipped and proofs_required():
        _failed_instead(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests of each proof ran, with what outcome, and their seconds, fixtures included; what tests tell."""
    counts, seconds = defaultdict(Counter), Counter()
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = dict(getattr(report, "user_properties", ()))
            if name := properties.get("proof"):
                counts[name][outcome] += 1
                seconds[name] += properties["seconds"]
            if told := properties.get("told"):
                terminalreporter.write_line(told)
    for name, outcomes in sorted(counts.items()):
        told = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        terminalreporter.write_line(f"proof {name}: {told} in {seconds[name]:.0f} s")
