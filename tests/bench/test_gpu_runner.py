"""bench.gpu's machinery: resuming, time limits, cases that crash, hang or break the schema, rehearsals told apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_toy as toy
import pytest

from bench.gpu import pool, runner
from bench.gpu.part import Setting, all_parts
from bench.gpu.schema import SchemaError, check
from bench.gpu.store import FILE, RECORD, WARNING, Store, StoreError, code_fingerprint, load
from sdp_kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
GPU = {"gpu": {"name": "Some GPU"}}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """run(names, …) runs the toy part over these cases and returns its outcome; records(), log() look inside."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("SDP_TOY_LOG", str(tmp_path / "log"))

    class Bench:
        path = tmp_path / "gpu_toy.json"

        def open(self, *, rehearsal=False, environment=GPU, code="c0de", fresh=False) -> Store:
            return Store(tmp_path, "gpu_toy", rehearsal=rehearsal, environment=environment, code=code, fresh=fresh)

        def run(self, names, *, seconds=60.0, retry=False, only="", brief=False, part=toy, **how) -> runner.Outcome:
            monkeypatch.setenv("SDP_TOY_CASES", names)
            deadline, store = runner.Deadline.after(seconds), self.open(**how)
            self.said = []
            told = {"brief": brief, "say": self.said.append}
            return runner.run_part(part, store, Setting(), deadline, retry=retry, only=only, **told)

        def records(self) -> dict[str, dict]:
            return {record["id"]: record for record in load(self.path)["records"]}

        def log(self) -> list[str]:
            log = tmp_path / "log"
            return log.read_text().split() if log.exists() else []

    return Bench()


def test_every_kind_of_ending_is_recorded_and_ends_nothing(bench):
    names = "good-1,fails-1,absent-1,raises-1,faults-1,dies-1,hangs-1,misfit-1,nan-1,noisy-1,good-2"
    outcome = bench.run(names)
    records = bench.records()
    assert list(records) == names.split(",")
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "good-1": "ok",
        "fails-1": "failed",
        "absent-1": "unavailable",
        "raises-1": "error",
        "faults-1": "error",
        "dies-1": "crashed",
        "hangs-1": "timeout",
        "misfit-1": "error",
        "nan-1": "error",
        "noisy-1": "ok",
        "good-2": "ok",
    }
    assert records["fails-1"]["result"] == {"value": 3.0} and records["fails-1"]["error"] == "off by 3"
    assert "SIGABRT" in records["dies-1"]["error"] and "last words" in records["dies-1"]["error"]
    assert "schema" in records["misfit-1"]["error"] and "'text'" in records["misfit-1"]["error"]
    assert str(ROOT) not in records["raises-1"]["error"] and "in ./tests/bench" in records["raises-1"]["error"]
    assert outcome.complete and not outcome.well
    assert load(bench.path)["summary"] == {"lines": ["3 good"], "good": ["good-1", "good-2", "noisy-1"]}


def test_a_fault_of_the_gpu_costs_the_process_and_an_ordinary_error_does_not(bench):
    bench.run("good-1,raises-1,good-2,faults-1,good-3")
    pids = {name: record["result"] for name, record in bench.records().items() if record["result"]}
    assert pids["good-1"] == pids["good-2"] != pids["good-3"]


def test_a_group_that_only_crashes_is_left_out_and_the_others_go_on(bench, monkeypatch):
    monkeypatch.setattr(runner, "PATIENCE", 2 * runner.LOSS)
    bench.run("dies-1,good-1,dies-2,dies-3,faults-1,good-2,fails-1,fails-2,fails-3")
    records = bench.records()
    assert [records[f"dies-{i}"]["status"] for i in (1, 2, 3)] == ["crashed", "crashed", "unavailable"]
    assert "left out: dies: crashes and hangs took 20 s, the last one in dies-2" in records["dies-3"]["error"]
    assert records["faults-1"]["status"] == "error" and records["good-2"]["status"] == "ok"
    assert {records[f"fails-{i}"]["status"] for i in (1, 2, 3)} == {"failed"}  # which costs no process
    ran = len(bench.log())
    bench.run("dies-1,good-1,dies-2,dies-3,faults-1,good-2,fails-1,fails-2,fails-3")
    assert len(bench.log()) == ran  # what the file tells of the group still holds
    bench.run("dies-1,dies-2,dies-3", retry=True)
    assert bench.log()[ran:] == ["dies-1", "dies-2"]


def test_what_crashes_is_taken_out_and_the_rest_of_the_case_counts(bench):
    outcome = bench.run("parts-1,parts-dies")
    records = bench.records()
    assert records["parts-1"]["status"] == "ok" and bench.log() == ["parts-1", "parts-dies", "parts-dies", "parts-dies"]
    assert records["parts-dies"]["status"] == "failed" and records["parts-dies"]["result"]["value"] == 2.0
    assert "a part of it had to be left out: the process ended with SIGABRT" in records["parts-dies"]["error"]
    assert not outcome.well and load(bench.path)["summary"]["good"] == ["parts-1"]


def test_the_result_of_a_failed_case_counts_where_the_part_says_so(bench, monkeypatch):
    monkeypatch.setattr(toy, "PARTIAL", True, raising=False)
    bench.run("parts-dies,good-1,fails-1,raises-1")
    assert load(bench.path)["summary"]["good"] == ["fails-1", "good-1", "parts-dies"]


def test_what_did_not_end_well_is_told_by_group_at_the_end(bench):
    bench.run("good-1,fails-1,good-2,fails-2,raises-1,absent-1", brief=True)
    lines = [line.split()[0] for line in bench.said[:-2]]
    assert lines == ["failed", "failed", "error", "unavailable"]
    assert bench.said[-2] == "  ! 2 × failed in fails: fails-1: off by 3"
    assert bench.said[-1].startswith("  ! 1 × error in raises: raises-1: RuntimeError")
    bench.run("good-1,fails-1,good-2", fresh=True)
    assert [line.split()[0] for line in bench.said] == ["ok", "failed", "ok", "!"]


def test_only_the_cases_named_are_run_and_the_others_stay_planned(bench):
    outcome = bench.run("good-1,good-2,fails-1", only="good 2")
    assert bench.log() == ["good-2"] and not outcome.complete and "2 to go" in outcome.line()
    assert bench.run("good-1,good-2,fails-1").complete and bench.log() == ["good-2", "good-1", "fails-1"]


def test_an_interrupted_part_resumes_where_it_stopped(bench, monkeypatch, tmp_path):
    script = (
        "import gpu_toy as t; from pathlib import Path; from bench.gpu import runner; "
        "from bench.gpu.store import Store; "
        "from bench.gpu.part import Setting;"
        f"s = Store(Path({str(tmp_path)!r}), 'gpu_toy', rehearsal=False, environment={GPU!r}, code='c0de');"
        "runner.run_part(t, s, Setting(), runner.Deadline.after(60))"
    )
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"SDP_TOY_CASES": "good-1,good-2,waits-3,good-4", "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while "waits-3" not in bench.log() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()  # no chance to clean up
    assert process.wait() == -signal.SIGKILL
    assert list(bench.records()) == ["good-1", "good-2"] and not load(bench.path)["complete"]
    (tmp_path / "go").touch()
    outcome = bench.run("good-1,good-2,waits-3,good-4")
    assert outcome.complete and outcome.well and outcome.new == 2
    assert bench.log() == ["good-1", "good-2", "waits-3", "waits-3", "good-4"]


def test_workers_share_what_triton_compiles(monkeypatch):
    """Inductor names a folder of its own, in the middle of a worker's life, where the environment names none."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert Path(pool.environment(Setting())["TRITON_CACHE_DIR"]).is_absolute()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/there/already")
    assert pool.environment(Setting())["TRITON_CACHE_DIR"] == "/there/already"


def test_ctrl_c_ends_the_workers_and_keeps_what_is_done(bench, monkeypatch):
    started = []
    init = pool.Worker.__init__

    def noted(self, setting):
        init(self, setting)
        started.append(self)

    monkeypatch.setattr(pool.Worker, "__init__", noted)

    def interrupt(line):
        raise KeyboardInterrupt

    monkeypatch.setenv("SDP_TOY_CASES", "good-1,good-2")
    with pytest.raises(KeyboardInterrupt):
        runner.run_part(toy, bench.open(), Setting(), runner.Deadline.after(60), say=interrupt)
    assert list(bench.records()) == ["good-1"]
    assert started and not any(worker.alive for worker in started)


def test_the_time_limit_is_kept_between_cases(bench, monkeypatch):
    monkeypatch.setattr(toy, "BUDGET", 0.01)
    outcome = bench.run("slow-1,slow-2")
    assert not outcome.complete and outcome.new == 0 and "2 to go" in outcome.line()
    monkeypatch.undo()


def test_a_case_that_goes_on_for_too_long_after_the_limit_is_left_to_the_next_run(bench, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.5)
    outcome = bench.run("waits-1,good-1", seconds=3.0)
    assert bench.log()[:1] == ["waits-1"] and "waits-1" not in bench.records()
    assert not outcome.complete and outcome.well and outcome.seconds < 30
    monkeypatch.undo()


def test_a_limit_in_the_middle_leaves_the_rest_for_the_next_run(bench):
    first = bench.run("slow-1,slow-2,slow-3,slow-4,slow-5,slow-6", seconds=1.5)
    assert 0 < first.new < 6 and not first.complete
    second = bench.run("slow-1,slow-2,slow-3,slow-4,slow-5,slow-6")
    assert second.complete and second.new == 6 - first.new
    assert sorted(bench.log()) == [f"slow-{i}" for i in range(1, 7)]


def test_what_failed_is_done_again_only_when_asked(bench):
    bench.run("good-1,fails-1,dies-1,absent-1,again-1")
    bench.run("good-1,fails-1,dies-1,absent-1,again-1")
    assert bench.log()[5:] == ["absent-1", "again-1"]
    bench.run("good-1,fails-1,dies-1", retry=True)
    assert bench.log()[7:] == ["fails-1", "dies-1"]
    assert list(bench.records()) == ["good-1", "fails-1", "dies-1"]


def test_several_workers_share_the_cases(bench, monkeypatch):
    monkeypatch.setattr(toy, "PARALLEL", 3, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    names = ",".join(f"slow-{i}" for i in range(6))
    assert bench.run(names + ",dies-1").complete
    records = bench.records()
    assert list(records) == [*names.split(","), "dies-1"]  # in the planned order, whoever was first
    assert len({r["result"]["value"] for r in records.values() if r["result"]}) > 1


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"code": "other"}, "other sources"),
        ({"environment": {"gpu": {"name": "Another"}}}, "Some GPU, this is Another"),
        ({"rehearsal": True}, "is a measured result, wanted is a rehearsal"),
    ],
)
def test_results_of_something_else_are_not_resumed(bench, changed, said):
    bench.run("good-1")
    with pytest.raises(StoreError, match=said):
        bench.open(**changed)
    assert bench.open(fresh=True, **changed).content["records"] == []


def test_a_rehearsal_never_passes_for_a_measurement(bench):
    bench.run("good-1", rehearsal=True)
    content = json.loads(bench.path.read_text())
    assert content["rehearsal"] is True and "REHEARSAL" in content["format"] and content["warning"] == WARNING
    with pytest.raises(StoreError, match="is a rehearsal, wanted is a measured result"):
        load(bench.path)
    for disguise in ({"rehearsal": False}, {"rehearsal": False, "warning": None}, {"warning": None}):
        bench.path.write_text(json.dumps(content | disguise))
        with pytest.raises(StoreError, match="contradict"):
            load(bench.path)
    done = subprocess.run(
        [sys.executable, "-m", "bench.report", str(bench.path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "bench.report:" in done.stderr


def test_a_damaged_file_is_refused_by_name(bench):
    for text, said in (("{", "not JSON"), ("{}", "no field 'format'"), ("[]", "wanted is an object")):
        bench.path.write_text(text)
        with pytest.raises(StoreError, match=f"gpu_toy.json: .*{said}"):
            bench.open()


def test_two_cases_of_one_name_are_refused(bench):
    assert "same name: good-1" in bench.run("good-1,good-1").trouble


def test_the_fingerprint_follows_the_sources(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cuh").write_text("1")
    before = code_fingerprint(tmp_path)
    (tmp_path / "csrc" / "a.cuh").write_text("2")
    assert code_fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    "value, schema, said",
    [
        (float("inf"), float, "value is inf, wanted is float"),
        (True, float, "wanted is float"),
        (True, int, "wanted is int"),
        ({"a": 1}, {"a": int, "b": int}, "no field 'b'"),
        ({"a": 1, "c": 2}, {"a": int}, "unknown field 'c'"),
        ({"a": [1, "x"]}, {"a": [int]}, r"value\.a\[1\] is 'x'"),
        ("x", ("y", None), "wanted is 'y' or null"),
    ],
)
def test_the_schema_check_says_what_is_wrong(value, schema, said):
    with pytest.raises(SchemaError, match=said):
        check(value, schema)


def test_the_schema_check_lets_pass_what_is_right():
    check({"a": 1, "n": None, "list": [1.5, 2]}, {"a": float, "n": (None, str), "list": [float], "b?": int})
    check({"anything": object()}, {"*": any})
    check({"id": "x", "status": "ok", "seconds": 1, "result": None, "error": None}, RECORD)
    assert set(FILE) >= {"rehearsal", "records"}


def test_every_part_keeps_the_agreement():
    parts = all_parts()
    assert list(parts) == ["environment", "correctness", "sanitizer", "speed", "throughput", "configurations"]
    for name, part in parts.items():
        assert part.TITLE and 0 < part.BUDGET < 480, name
        assert callable(part.cases) and callable(part.run) and part.RESULT, name


@pytest.mark.parametrize("name", ["environment", "speed", "throughput", "configurations"])
def test_what_is_timed_is_timed_alone(name, monkeypatch):
    part = all_parts()[name]
    monkeypatch.setattr(BACKENDS["triton"], "absent", None)
    cases = [case for variant in ("plain", "interpreter") for case in part.cases(Setting(True, variant))]
    timed = [case for case in cases if not case.arguments.get("compile_only")]
    assert timed and (getattr(part, "PARALLEL", 1) == 1 or all(case.alone for case in timed))
