"""``python -m bench.gpu --rehearse``: every part's code runs, and its files are valid and marked as a rehearsal's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from bench.gpu.part import Setting, all_parts
from bench.gpu.parts import speed
from bench.gpu.store import WARNING, code_fingerprint, load
from bench.gpu.subjects import EVERYTHING

ROOT = Path(__file__).resolve().parents[2]


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("SDP_KERNELS_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("rehearsal")
    done = command_line("--rehearse", "--out", str(folder))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return folder, done.stdout


def test_every_part_is_rehearsed_and_its_file_is_valid(rehearsed):
    folder, said = rehearsed
    parts = all_parts()
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.json" for name in parts)
    for name, part in parts.items():
        content = load(folder / f"{name}.json", rehearsal=True, result=part.RESULT)
        assert content["complete"] and content["records"], name
        assert {record["status"] for record in content["records"]} == {"ok"}, name
        assert content["rehearsal"] is True and content["warning"] == WARNING, name
    assert "none of their numbers was measured" in said


def test_the_rehearsal_reaches_both_kinds_of_kernels(rehearsed):
    folder, _ = rehearsed
    rows = [r["result"] for r in load(folder / "correctness.json", rehearsal=True)["records"]]
    assert {row["backend"] for row in rows if row["kind"] != "captured step"} == {"cpu", "triton"}
    assert {row["operator"] for row in rows} >= {*EVERYTHING, "SdP-Net"}
    kinds = {"values", "rounding", "equal bits", "compile", "graph", "far", "large"}
    assert {row["kind"] for row in rows if row["operator"] == "kelu" and row["backend"] == "triton"} == kinds
    contenders = {
        row["contender"]
        for record in load(folder / "speed.json", rehearsal=True)["records"]
        for row in record["result"]["rows"]
    }
    assert contenders >= {"ours (cpu)", "ours (triton)", "where", "where, compiled", "F.layer_norm"}


def test_the_speed_parts_report_is_one_that_bench_report_reads(rehearsed, tmp_path):
    folder, _ = rehearsed
    files = speed.files(load(folder / "speed.json", rehearsal=True), Setting(rehearsal=True))
    path = tmp_path / speed.REPORT
    path.write_text(files[speed.REPORT])
    read = report.load(path)
    assert "ours (cpu)" in report.markdown(read)
    changes, _ = report.compare(read, read)
    assert changes and all(change.verdict == "same" for change in changes)


def test_no_file_of_a_rehearsal_holds_a_folder_of_this_machine(rehearsed):
    folder, _ = rehearsed
    for path in folder.iterdir():
        text = path.read_text()
        for place in (str(ROOT), str(Path.home()), sys.prefix):
            assert place not in text, f"{path.name} holds {place}"


def test_a_finished_rehearsal_is_not_done_again(rehearsed):
    folder, _ = rehearsed
    before = load(folder / "environment.json", rehearsal=True)
    done = command_line("--rehearse", "--out", str(folder), "--part", "environment")
    if before["code"] != code_fingerprint():  # somebody edited the sources meanwhile
        assert done.returncode == 2 and "was made with other sources" in done.stderr
        return
    assert done.returncode == 0 and "(0 new in" in done.stdout
    assert load(folder / "environment.json", rehearsal=True)["records"] == before["records"]


def test_a_measurement_needs_a_gpu_and_does_not_mix_with_a_rehearsal(rehearsed, tmp_path):
    if torch.cuda.is_available():
        done = command_line("--part", "environment", "--out", str(rehearsed[0]))
        assert done.returncode == 2 and "is a rehearsal, wanted is a measured result" in done.stderr
    else:
        done = command_line("--part", "environment", "--out", str(tmp_path))
        assert done.returncode == 2 and "no CUDA device here; --rehearse" in done.stderr
        assert not list(tmp_path.iterdir())


def test_the_time_limit_stops_the_rehearsal_and_says_so(tmp_path):
    done = command_line("--rehearse", "--out", str(tmp_path), "--time-limit", "0.01", "--part", "environment", "speed")
    assert done.returncode == 3 and "to go, run it again" in done.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--part", "nonsense"], "invalid choice: 'nonsense'"),
        (["--time-limit", "-1"], "--time-limit must be positive, got -1"),
        (["--write", "--rehearse"], "a rehearsal has none"),
    ],
)
def test_bad_arguments_are_refused(arguments, said):
    done = command_line(*arguments)
    assert done.returncode == 2 and said in done.stderr


def test_the_list_names_every_part():
    done = command_line("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(all_parts())
