"""``pytest bench``: every contender of a case is an item of its own; all of a case are measured together, interleaved.

pytest-benchmark keeps and prints the results; it is handed the measured rounds through a timer that replays them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from . import environment, peers
from .cases import Case, Contender, Operator
from .harness import Harness, missing_backend
from .report import summary_table

HARNESS = pytest.StashKey[Harness]()
ROWS = pytest.StashKey[list]()
NOT_TIMED = pytest.StashKey[list]()
ALL_COLUMNS = ["min", "max", "mean", "stddev", "median", "iqr", "outliers", "ops", "rounds", "iterations"]


class Replay:
    """A timer for pytest-benchmark that plays back measured durations: start 0, end the duration, and so on."""

    __name__ = "perf_counter_ns, interleaved"
    __module__ = "bench"

    def __init__(self) -> None:
        self.durations: list[float] = []
        self._calls = 0

    def __call__(self) -> float:
        index, at_end = divmod(self._calls, 2)
        self._calls += 1
        return self.durations[index] if at_end else 0.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "benchmarks of the fused operators (pytest bench)")
    group.addoption("--bench-all", action="store_true", help="every case and contender, not the short selection")
    group.addoption("--bench-seconds", type=float, default=0.5, help="time for the rounds of one case (default: 0.5)")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    group.addoption("--bench-threads", type=int, default=None, help="CPU threads (default: torch's own choice)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('pytest bench needs pytest-benchmark: pip install -e ".[bench]"')
    option = config.option
    if option.bench_device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda: torch finds no CUDA device here")
    # pytest-benchmark's table, unless asked otherwise: what is compared, and no more columns than fit
    if option.benchmark_columns in (None, ALL_COLUMNS):
        option.benchmark_columns = ["median", "iqr", "min", "max", "rounds"]
    if option.benchmark_sort == "min":
        option.benchmark_sort = "median"
    config.stash[HARNESS] = Harness(option.bench_seconds, option.bench_threads)
    config.stash[ROWS], config.stash[NOT_TIMED] = [], []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contest" not in metafunc.fixturenames:
        return
    option, operator = metafunc.config.option, metafunc.module.OPERATOR
    cases = metafunc.module.CASES["all" if option.bench_all else "short"][option.bench_device]
    contenders = [c for c in operator.contenders if c.default or option.bench_all]
    usable = {peer.name for peer in peers.survey(option.bench_device) if peer.reason is None}
    contenders = [c for c in contenders if c.name not in peers.DEVICES or c.name in usable]
    metafunc.parametrize(
        "contest",
        [
            pytest.param(
                (operator, case, contender),
                id=f"{case.name.partition('-')[2]}: {contender.name}",
                marks=pytest.mark.benchmark(group=case.name, timer=Replay()),
            )
            for case in cases
            for contender in contenders
            if case.layout in contender.layouts
        ],
        indirect=True,
    )


def _contest_of(item: pytest.Item) -> tuple[Operator, Case, Contender] | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("contest") if callspec else None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to time the reference against itself: every case needs a fused kernel here."""
    if session.config.option.collectonly:
        return
    reasons = dict.fromkeys(
        missing_backend(kernel, contest[1].device, contest[1].dtype)
        for contest in map(_contest_of, session.items)
        if contest
        for kernel in contest[0].kernels
    )
    if told := [reason for reason in reasons if reason]:
        raise pytest.UsageError("the fused operators cannot be measured:\n" + "\n".join(told))


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark) -> Callable[[], None]:
    """Runs one contender's item: check its numbers, measure its case if nobody has yet, report its share."""
    operator, case, contender = request.param
    config = request.config
    harness = config.stash[HARNESS]
    benchmark.name = contender.name  # the group names the case
    rivals = [c[2] for c in map(_contest_of, request.session.items) if c and c[0] is operator and c[1] == case]

    def leave_out(status: str, reason: str) -> None:
        row = {
            "case": case.name,
            "contender": contender.name,
            "kind": contender.kind,
            "status": status,
            "reason": reason,
        }
        config.stash[NOT_TIMED].append(row)
        benchmark.skipped = True  # says that an unused fixture is meant
        if contender.kind == "ours":
            pytest.fail(f"{contender.name} is {status} in {case.name}: {reason}", pytrace=False)
        pytest.skip(f"{contender.name} is {status}: {reason}")  # a peer; ours would have failed above

    def run() -> None:
        checked = harness.check(operator, contender, case)
        if checked.crash is not None:
            raise checked.crash
        if checked.function is None:
            leave_out("unusable", checked.reason or "no reason given")
        if wrong := harness.wrong(operator, checked, case):
            leave_out("wrong", wrong)
        if benchmark.disabled:
            benchmark.pedantic(lambda: None)
            return
        durations = harness.measure(operator, rivals, case).durations[contender.name]
        row = harness.record(operator, rivals, contender, case)
        benchmark.extra_info.update(row)
        benchmark._timer.durations = durations
        benchmark.pedantic(lambda: None, rounds=len(durations))
        config.stash[ROWS].append(row)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Our own block in place of pytest-benchmark's, which holds the host's name."""
    machine_info.clear()
    machine_info.update(environment.describe())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info.clear()
    commit_info.update(environment.commit())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    output_json["not_timed"] = config.stash[NOT_TIMED]
    output_json["peers"] = [vars(peer) for peer in peers.survey(config.option.bench_device)]
    for entry in output_json["benchmarks"]:
        entry["params"] = None  # objects of the harness; extra_info says it better


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    write = terminalreporter.write_line
    described = environment.describe()
    terminalreporter.section("bench: ours against the best peer")
    cache = described["last_level_cache_bytes"] / 2**20
    write(
        f"{described['processor']['name']}, {described['threads']} threads, torch {described['torch']}; inputs rotate "
        f"through more than 2 × {cache:.0f} MiB ({described['last_level_cache_source']}); load {described['load']}"
    )
    for line in summary_table(rows):
        write(line)
    absent = [p for p in peers.survey(config.option.bench_device) if p.reason]
    if absent:
        write("not here: " + "; ".join(f"{p.name}: {p.reason}" for p in absent))
