"""bench.gpu's speed and throughput parts, the goals they are judged by and the environment's facts."""

from __future__ import annotations

import dataclasses
import os
import sys

import pytest
import torch

import bench.cases
from bench import harness
from bench.gpu import goals, machine, warpgroups
from bench.gpu.part import Failure, Setting, Unavailable
from bench.gpu.parts import correctness, environment, speed, throughput
from bench.gpu.schema import check

REHEARSAL = Setting(rehearsal=True)


def row(backend, ratio, which="forward", layout="contiguous"):
    made = {"operator": "kelu", "shape": [256, 768, 16, 16], "dtype": "bfloat16", "layout": layout, "pass": which}
    return made | {"kind": "ours", "backend": backend, "time_over_floor": ratio, "floor": 47e-6}


def test_goals_are_judged_by_the_backend_chosen_first():
    found = {g["goal"]: g for g in goals.judged([row("cuda", 1.04), row("triton", 1.4), row("cuda", 1.2, "backward")])}
    forward = found["kelu 256×768×16×16 contiguous forward"]
    assert forward["verdict"] == goals.REACHED and forward["time_over_floor"] == {"cuda": 1.04, "triton": 1.4}
    assert found["kelu 256×768×16×16 contiguous backward"]["verdict"] == goals.MISSED
    assert found["layer_norm_2d 256×768×16×16 contiguous forward"]["verdict"] == goals.UNMEASURED
    assert any(line.startswith("missed") for line in goals.lines(list(found.values())))


def test_every_goal_of_an_operator_that_is_benchmarked_is_measured():
    benchmarked = speed.operators()
    for goal in goals.GOALS:
        if goal.operator in benchmarked:
            cases = {(c.shape, c.layout, c.dtype_name, c.variant) for c in benchmarked[goal.operator][1]}
            assert (goal.shape, goal.layout, goal.dtype, goal.variant) in cases, goal.name


def test_a_backend_can_have_a_bound_of_its_own():
    attention = {"operator": "register_attention", "shape": [256, 261, 3, 8, 96], "layout": "tokens"}
    rows = [row(backend, 1.8) | attention for backend in ("cuda", "triton")]
    found = {g["goal"]: g for g in goals.judged(rows)}["register_attention 256×261×3×8×96 tokens forward"]
    assert found["verdict"] == goals.MISSED
    assert found["verdicts"] == {"cuda": goals.MISSED, "triton": goals.REACHED}
    told = goals.lines([found])
    assert "cuda 1.800 (missed), triton 1.800 " in told[0] and told[-1] == "0 of 1 goals reached"


def test_the_most_wanted_is_measured_first_and_all_that_is_timed_is_alone(monkeypatch):
    monkeypatch.setattr(speed, "ours", lambda *about: ["cuda", "triton"])
    items = speed.cases(Setting())
    timed = [item for item in items if not item.arguments.get("compile_only")]
    assert timed[0].id.startswith("depthwise_conv2d-k7-256x768x16x16-bfloat16")
    goals_left = {(g.operator, g.shape, g.layout, g.variant) for g in goals.GOALS}
    for item in timed[: len(goals_left) + 2]:
        a = item.arguments
        goals_left.discard((a["operator"], a["shape"], a["layout"], a["variant"]))
    assert not goals_left
    made = [item for item in items if item.arguments.get("compile_only")]
    assert [item.id for item in made] == [f"compile: {item.id}" for item in timed[: len(made)]]
    assert not any(item.alone for item in made) and all(
        item.arguments["without"] == ["cuda", speed.WARPGROUPS] for item in made
    )
    assert [a["without"] for a in timed[0].instead] == [["cuda"], ["triton"], ["cuda", "triton"]]


def test_a_benchmark_that_cannot_be_imported_is_one_case_and_not_the_end(monkeypatch):
    real = speed.importlib.import_module

    def broken(name, *rest):
        if name == "bench.test_encoder":
            raise ModuleNotFoundError("No module named 'pydantic'")
        return real(name, *rest)

    monkeypatch.setattr(speed.importlib, "import_module", broken)
    items = speed.cases(REHEARSAL)
    assert "encoder" not in {item.arguments["operator"] for item in items} and len(items) > 5
    absent = [item for item in items if item.id == "cases of bench.test_encoder"]
    with pytest.raises(Unavailable, match="pydantic"):
        speed.run(REHEARSAL, **absent[0].arguments)


def test_what_needs_a_package_that_is_not_there_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sdpnet.train", None)
    with pytest.raises(Unavailable, match=r"sdpnet\.train"):
        throughput.run(REHEARSAL, "tiny", "kelu", "as they are")
    with pytest.raises(Unavailable, match=r"sdpnet\.train"):
        correctness.run(REHEARSAL, "captured step", {}, "")
    monkeypatch.setitem(sys.modules, "bench.train_throughput.report", None)
    assert throughput.summary({}, REHEARSAL) == {"lines": []}


def test_compiling_beforehand_measures_nothing():
    made = speed.run(REHEARSAL, "kelu", [2, 8, 4, 4], "float32", "contiguous", 0, compile_only=True)
    assert made == {"rows": [], "not_timed": []}


def test_a_backend_that_crashes_can_be_left_out():
    rows = speed.run(REHEARSAL, "kelu", [2, 8, 4, 4], "float32", "contiguous", 0, without=["cpu"])["rows"]
    assert rows and not any(r["kind"] == "ours" for r in rows)


def test_a_wrong_form_of_the_model_does_not_take_the_others_with_it(monkeypatch):
    from bench.train_throughput import measure

    asked = []

    def measured(preset, activation, *, wanted, **rest):
        asked.append(wanted)
        if "fused" in wanted:
            raise ValueError("fused: its logits are off by 1e+00 of the largest, allowed is 5e-02")
        return [measure.Result(form, seconds=[1.0, 1.0], memory=1, flops=1, error=0.0) for form in wanted]

    monkeypatch.setattr(measure, "run", measured)
    with pytest.raises(Failure, match="fused: its logits are off") as failure:
        throughput.run(REHEARSAL, "tiny", "kelu", "as they are")
    assert asked == [("original", "eager", "fused"), ("original", "eager")]
    assert [form["form"] for form in failure.value.result["forms"]] == ["original", "eager"]
    check(failure.value.result, throughput.RESULT)


def speed_of_kelu(setting=REHEARSAL):
    return speed.run(setting, "kelu", [2, 8, 4, 4], "float32", "contiguous", 0)


def test_speed_reports_the_floor_of_the_environment_part():
    facts = {"environment": {"copy_bytes_per_second": 1024.0}}
    rows = speed_of_kelu(Setting(rehearsal=True, facts=facts))["rows"]
    forward = next(r for r in rows if r["kind"] == "ours" and r["pass"] == "forward")
    assert forward["floor"] == 2.0 and forward["time_over_floor"] == machine.MADE_UP / 2.0
    assert {r["median"] for r in rows} == {machine.MADE_UP}
    assert {r["contender"] for r in rows} >= {"ours (cpu)", "where", "where, compiled"}


def test_no_time_for_who_is_wrong(monkeypatch):
    known, cases = speed.operators()["kelu"]
    plant = dataclasses.replace(known.contenders[3], build=lambda case: lambda x: x * 0.5, name="planted")
    wrong = dataclasses.replace(known, contenders=(*known.contenders[:3], plant))
    monkeypatch.setattr(speed, "operators", lambda: {"kelu": (wrong, cases)})
    result = speed_of_kelu()
    assert "planted" not in {r["contender"] for r in result["rows"]}
    assert {(r["contender"], r["status"]) for r in result["not_timed"]} == {("planted", "wrong")}
    ours = dataclasses.replace(known.contenders[0], build=lambda case: lambda x: x * 0.5)
    wrong = dataclasses.replace(known, contenders=(ours, *known.contenders[1:3]))
    with pytest.raises(Failure, match=r"ours \(cpu\) is wrong in kelu-2x8x4x4") as failure:
        speed_of_kelu()
    assert {r["kind"] for r in failure.value.result["rows"]} == {"peer"}


def test_the_stand_ins_are_gone_after_a_rehearsal_and_absent_from_a_measurement():
    kept = harness.CpuClock, torch.compile
    with machine.stand_ins(REHEARSAL):
        assert harness.CpuClock is machine.MadeUpClock
    with machine.stand_ins(Setting()):
        assert (harness.CpuClock, torch.compile) == kept
    assert (harness.CpuClock, torch.compile) == kept


def test_clocks_are_read_from_nvidia_smi_and_never_set(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "1980 MHz, 3201 MHz, 1, 2, 580.1, 700 W, 33"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.clocks()["clocks.sm"] == "1980 MHz" and environment.clocks()["driver_version"] == "580.1"
    asked = (tmp_path / "asked").read_text().split()
    assert [a.partition("=")[0] for a in asked] == ["--query-gpu", "--format"]


def test_cudas_attention_is_timed_with_warpgroups_too_where_there_are_any(monkeypatch):
    attention, _ = speed.operators()["register_attention"]
    linear, _ = speed.operators()["linear"]
    monkeypatch.setattr(speed, "ours", lambda *about: ["cuda", "triton"])
    monkeypatch.setattr(warpgroups, "there", lambda: False)
    assert speed.forms(Setting(), attention, torch.bfloat16) == ["cuda", "triton"]
    monkeypatch.setattr(warpgroups, "there", lambda: True)
    assert speed.forms(Setting(), attention, torch.bfloat16) == ["cuda", "triton", speed.WARPGROUPS]
    assert speed.forms(Setting(), attention, torch.float32) == ["cuda", "triton"]
    assert speed.forms(Setting(), linear, torch.bfloat16) == ["cuda", "triton"]
    items = [i for i in speed.cases(Setting()) if i.id.startswith("register_attention") and "float32" not in i.id]
    assert items and all([speed.WARPGROUPS] in [a["without"] for a in i.instead] for i in items)

    monkeypatch.setenv(warpgroups.VARIABLE, "before")
    seen, problem = [], bench.cases.Case("register_attention", (2, 5, 3, 1, 8), layout="tokens")

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append(os.environ[warpgroups.VARIABLE])
            return grad * 2

    watched = dataclasses.replace(attention.contender("ours"), build=lambda case: Watched.apply)
    x = torch.ones(3, requires_grad=True)
    made = [speed._on(name, watched)(problem)(x) for name in (speed.WARPGROUPS, "cuda", "triton")]
    for y in reversed(made):
        y.sum().backward()
    assert seen == ["before", speed.DEFAULT, "wgmma"] and torch.equal(x.grad, torch.full((3,), 6.0))
