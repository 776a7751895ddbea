"""bench.gpu's parts find what is planted: wrong numbers, unwritten memory, changing bits, broken configurations."""

from __future__ import annotations

import dataclasses
import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from bench import harness
from bench.gpu import blocks, drive, goals, grid, large, machine, workloads
from bench.gpu.judge import judge, same_bits
from bench.gpu.part import Failure, Setting, Unavailable
from bench.gpu.parts import configurations, correctness, environment, sanitizer, speed, throughput
from bench.gpu.problem import GRADIENTS, LAYOUTS, Problem, Surroundings
from bench.gpu.schema import check
from bench.gpu.subjects import EVERYTHING, SUBJECTS, choice_of_gemm, gradients_for, solvable
from sdp_kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = Setting(rehearsal=True)
KELU = Problem("kelu", (3, 8, 4, 4))


def subject(monkeypatch, change, operator="kelu"):
    """Plants ``change(outputs)`` behind the operator's own outputs."""
    right = SUBJECTS[operator]

    def ours(problem, backend, *inputs):
        return change(right.ours(problem, "reference", *inputs))

    for known in (SUBJECTS, EVERYTHING):
        monkeypatch.setitem(known, operator, dataclasses.replace(right, ours=ours))


def run(kind, problem=KELU):
    return correctness.run(REHEARSAL, kind, problem.json(), "reference")


KINDS = ("values", "equal bits", "compile", "graph", "large", "far")


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_operator_passes(kind):
    problem = dataclasses.replace(KELU, shape=(2, 8, 4, 4)) if kind == "far" else KELU
    assert run(kind, problem)["kind"] == kind


def test_a_wrong_factor_is_found(monkeypatch):
    subject(monkeypatch, lambda outputs: tuple(y * 1.0001 for y in outputs))
    with pytest.raises(Failure, match="output 0: error"):
        run("values")
    with pytest.raises(Failure, match="y of samples 0"):
        run("large", dataclasses.replace(KELU, shape=(34, 8, 4, 4), dtype="float32"))
    with pytest.raises(Failure, match="f is off by"):
        run("rounding", Problem("kelu", (1,), "float16"))


def test_a_wrong_gradient_is_found(monkeypatch):
    subject(monkeypatch, lambda outputs: tuple(y + (y - y.detach()) * 1e-3 for y in outputs))
    with pytest.raises(Failure, match="gradient 0: error"):
        run("values")


def test_unwritten_memory_is_found(monkeypatch):
    def unwritten(outputs):
        y = torch.empty_like(outputs[0])
        y[..., :-1] = outputs[0][..., :-1]
        return (y,)

    subject(monkeypatch, unwritten)
    with pytest.raises(Failure, match="not finite"):
        run("values")
    assert torch.are_deterministic_algorithms_enabled() is False


def test_our_own_gemm_is_forced_where_a_problem_wants_it_and_only_there(monkeypatch):
    problem = dataclasses.replace(KELU, own_gemm=True)
    triton = BACKENDS["triton"]
    monkeypatch.setattr(triton, "prefers", lambda kernel, x, weight: False)
    with choice_of_gemm(KELU, "triton"):
        assert not triton.prefers("linear_gemm_fwd", None, None)
    with pytest.raises(ZeroDivisionError), choice_of_gemm(problem, "triton"):
        assert triton.prefers("linear_gemm_fwd", None, None) and triton.prefers("linear_gemm_bwd", None, None)
        _ = 1 / 0
    assert not triton.prefers("linear_gemm_fwd", None, None)
    assert solvable([KELU, problem], "cuda") == [KELU] and solvable([KELU, problem], "triton") == [KELU, problem]
    for found in (grid.problems("linear"), blocks.problems("feed_forward"), large.problems("linear", Setting())):
        assert {p.own_gemm for p in found} == {False, True}


def test_a_write_beside_an_input_and_a_read_from_there_are_found(monkeypatch):
    kept = []

    def careless(problem, backend, *inputs):
        x = inputs[0].detach()
        around = x.as_strided((x.numel() + 2,), (1,), x.storage_offset() - 1)
        kept.append(around)
        if len(kept) == 1:
            around[0] = 7.0
        return SUBJECTS["kelu"].plain(problem, *inputs)

    def reads_too_far(problem, backend, *inputs):
        x = inputs[0].detach()
        behind = x.as_strided(x.shape, x.stride(), x.storage_offset() + x.numel())
        return tuple(y + 0 * behind for y in SUBJECTS["kelu"].plain(problem, *inputs))

    right = SUBJECTS["kelu"]
    monkeypatch.setitem(EVERYTHING, "kelu", dataclasses.replace(right, ours=careless))
    with pytest.raises(Failure, match="memory around or in input 0 was written"):
        run("values")
    monkeypatch.setitem(EVERYTHING, "kelu", dataclasses.replace(right, ours=reads_too_far))
    with pytest.raises(Failure, match="not finite"):
        run("values")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_surroundings_keep_values_strides_and_alignment(layout):
    shape = (2, 12, 5) if layout == "tokens" else (2, 3, 4, 5)
    original = LAYOUTS[layout](torch.randn(shape))
    surroundings = Surroundings(original)
    copy = surroundings.tensor
    assert torch.equal(copy, original) and copy.stride() == original.stride() and surroundings.untouched()
    assert copy.data_ptr() % 16 == original.data_ptr() % 16
    copy.as_strided((1,), (1,), copy.storage_offset() - 1).zero_()
    assert not surroundings.untouched()
    expanded = torch.zeros(1).expand(4)
    assert Surroundings(expanded).tensor is expanded and Surroundings(torch.empty(0)).untouched()


def test_changing_bits_are_found(monkeypatch):
    calls = iter(range(100))
    subject(monkeypatch, lambda outputs: tuple(y + 1e-6 * (next(calls) == 1) for y in outputs))
    with pytest.raises(Failure, match="run to run"):
        run("equal bits")


def test_bits_that_depend_on_the_batch_are_found(monkeypatch):
    subject(monkeypatch, lambda outputs: tuple(y + 1e-6 * (y.shape[0] == 3) for y in outputs))
    with pytest.raises(Failure, match="samples 0 to 1 alone"):
        run("equal bits")


def test_a_graph_that_does_not_follow_its_input_is_found(monkeypatch):
    results = []

    def captured(setting, step):
        results.append(step())
        return (lambda: None), results[0]

    monkeypatch.setattr(machine, "captured", captured)
    with pytest.raises(Failure, match="eager and replayed"):
        run("graph")


def test_wrapped_offsets_are_found(monkeypatch):
    border = machine.LARGE[True]

    def wrapped(outputs):
        y = outputs[0]
        if y.numel() > border:
            y = y.clone()
            y.view(-1)[border:] = 0
        return (y,)

    subject(monkeypatch, wrapped)
    with pytest.raises(Failure, match="alone and in the batch"):
        run("large", dataclasses.replace(KELU, shape=(34, 8, 4, 4)))


def test_too_little_memory_is_a_reason(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda setting: 1000)
    with pytest.raises(Unavailable, match="GiB of GPU memory"):
        run("large")


def test_the_judge_asks_for_finite_values_of_the_right_shape():
    exact = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = exact.float()
    assert judge("y", got, exact, got)["error"] < 1e-7
    for broken, said in ((got[:99], "shape"), (got / 0, "not finite"), (got * 1.001, "error")):
        with pytest.raises(Failure, match=said):
            judge("y", broken, exact, got)
    assert judge("y", got * 1.001, exact, got * 1.002)["error"] > 1e-4  # no worse than PyTorch
    with pytest.raises(Failure, match="1 of 100"):
        same_bits("y", got, torch.cat([got[:99], got[99:] + 1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values_and_change_strides(layout):
    shape = (2, 12, 5) if layout == "tokens" else (2, 3, 4, 5)
    x = torch.randn(shape)
    laid = LAYOUTS[layout](x)
    assert torch.equal(laid, x)
    assert (laid.stride() == x.stride()) == (layout in ("contiguous", "tokens"))


def test_gradients_come_in_the_asked_layout():
    x = torch.randn(3, 4, 5)
    assert {name: lay(x).stride() for name, lay in GRADIENTS.items()} == {
        "like y": (20, 5, 1),
        "expanded": (0, 0, 0),
        "expanded per sample": (20, 0, 0),
        "swapped": (20, 1, 4),
        "gaps": (40, 10, 2),
    }
    assert gradients_for(Problem("kelu", (0, 4), grad="expanded"), "cpu")[0].shape == (0, 4)


def test_the_grid_has_what_it_promises():
    for operator in SUBJECTS:
        problems = grid.problems(operator)
        assert len(set(problems)) == len(problems)
        assert {p.dtype for p in problems} == {"float32", "bfloat16", "float16"}
        assert any(0 in p.shape for p in problems) and any(p.grad == "expanded" for p in problems)
        if operator != "register_attention":  # which has no pictures
            assert any(p.shape[2:] == (7, 7) for p in problems) and any(p.shape[2:] == (1, 1) for p in problems)
    norms = grid.problems("layer_norm_2d")
    assert {p.channels for p in norms} >= {1, 3, 768, 2049, 8192}
    assert any(p.registers == p.shape[1] for p in norms) and any(p.residual for p in norms)


def test_every_operator_with_a_gpu_kernel_is_tested():
    written = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"library"}
    written |= {path.stem for path in (ROOT / "sdp_kernels" / "triton").glob("[a-z]*.py")}
    assert written and written <= set(SUBJECTS), "an entry in bench/gpu/subjects.py is missing"
    assert all(drive.problems(operator) for operator in SUBJECTS)


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at beyond+0x70
=========     Address 0x7f is out of bounds
========= ERROR SUMMARY: 32 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at kernel+0x1 and Read access at kernel+0x2 [8 hazards]
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


def test_a_sanitizers_log_is_read():
    errors, told = sanitizer.read_log(MEMCHECK)
    assert errors == 32 and told.startswith("Invalid __global__ write of size 4 bytes; at beyond")
    assert sanitizer.read_log(RACE)[0] == 2
    assert sanitizer.read_log("========= ERROR SUMMARY: 0 errors\n")[0] == 0
    assert sanitizer.read_log("========= Error: Device not supported\n")[0] is None


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    """Puts a compute-sanitizer on the PATH that writes ``log`` and ends with ``status``."""

    def make(log: str, status: int) -> None:
        (tmp_path / "text").write_text(log)
        program = tmp_path / "compute-sanitizer"
        program.write_text(
            f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\ncp "{tmp_path}/text" "$2"\nexit {status}\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return make


@pytest.mark.parametrize(
    "log, status, operator, ending",
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0, "kelu", None),
        (MEMCHECK, sanitizer.FOUND, "kelu", (Failure, "32 errors: Invalid __global__ write")),
        (MEMCHECK, sanitizer.FOUND, drive.CONTROL, None),
        ("========= ERROR SUMMARY: 0 errors\n", 0, drive.CONTROL, (Failure, "went unnoticed")),
        ("========= Error: Device not supported\n", 1, "kelu", (Unavailable, "can't work here")),
        ("", 0, "kelu", (Failure, "no verdict")),
    ],
)
def test_a_sanitizers_verdict_is_followed(fake_sanitizer, log, status, operator, ending):
    fake_sanitizer(log, status)
    arguments = {"tool": "memcheck", "operator": operator, "backend": "cuda"}
    if ending is None:
        assert sanitizer.run(Setting(), **arguments)["operator"] == operator
    else:
        with pytest.raises(ending[0], match=ending[1]):
            sanitizer.run(Setting(), **arguments)


def test_a_missing_sanitizer_is_a_reason(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    with pytest.raises(Unavailable, match="neither on the PATH"):
        sanitizer.run(Setting(), tool="memcheck", operator="kelu", backend="cuda")


def test_climbing_finds_the_valley_and_respects_its_allowance():
    def seconds_of(c):
        return None if c["warps"] > 8 else 1 + abs(c["block"] - 4096) / 4096 + abs(c["warps"] - 8)

    best, seconds = configurations.climb({"block": 1024, "warps": 2}, seconds_of, most=50)
    assert best == {"block": 4096, "warps": 8} and seconds == 1
    tried = []
    configurations.climb({"block": 1024, "warps": 2}, lambda c: tried.append(c) or seconds_of(c), most=3)
    assert len(tried) == 3
    with pytest.raises(RuntimeError, match="does not run"):
        configurations.climb({"block": 1, "warps": 16}, seconds_of, most=5)


def test_neighbours_stay_within_limits():
    found = list(configurations.neighbours({"pixels": 1, "warps": 32, "ahead": 1}))
    assert found == [
        {"pixels": 2, "warps": 32, "ahead": 1},
        {"pixels": 1, "warps": 16, "ahead": 1},
        {"pixels": 1, "warps": 32, "ahead": 0},
    ]


def searched(entry="kelu/forward/dense/16bit", **best):
    committed = {"block": 8192, "warps": 8}
    row = {"capability": "90", "entry": entry, "committed": committed, "best": committed | best}
    return row | {"committed_seconds": 2.0, "best_seconds": 1.0, "tried": []}


def test_a_proposal_has_the_committed_tables_format(tmp_path):
    text = configurations.COMMITTED.read_text()
    committed = json.loads(text)
    assert configurations.as_text(committed) == text
    proposed = configurations.proposal([searched(block=4096), searched(entry="kelu/x")], committed)
    assert proposed["90"]["kelu/forward/dense/16bit"] == {"block": 4096, "warps": 8} and "kelu/x" not in proposed["90"]
    file = {"rehearsal": False, "records": [{"status": "ok", "result": searched(block=4096)}]}
    assert configurations.files(file, Setting())[configurations.PROPOSAL] == configurations.as_text(proposed)
    path = tmp_path / "table.json"
    path.write_text(text)
    assert "1 entries changed" in configurations.write(file, path) and json.loads(path.read_text()) == proposed
    path.write_text(text)
    assert "rehearsal" in configurations.write(file | {"rehearsal": True}, path) and path.read_text() == text


def test_every_entry_of_the_table_has_a_workload_that_uses_it(monkeypatch):
    from sdp_kernels.triton import _linear_gemm, depthwise_conv2d, kelu, layer_norm_2d, linear, register_attention

    for module in (_linear_gemm, depthwise_conv2d, kelu, layer_norm_2d, linear, register_attention):
        monkeypatch.setattr(module, "launch", lambda *arguments, **constants: None)
    table = configurations.table("90")
    unused = []
    for entry in table:
        load = workloads.workload(entry, "cpu", tiny=True)
        if not configurations.is_used(load, load.make(0), table, entry):
            unused.append(entry)
    assert table and not unused
    with pytest.raises(workloads.NoWorkloadError):
        workloads.workload("unknown/forward/16bit", "cpu", tiny=True)


def test_a_candidate_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(configurations, "table", lambda found: {"kelu/forward/dense/32bit": {"block": 64, "warps": 4}})
    constants = configurations.table("90")
    monkeypatch.setattr(configurations, "table", lambda found: constants)
    load = workloads.Workload(
        lambda seed: [torch.ones(4)], lambda x: [x * (1 if constants["kelu/forward/dense/32bit"]["block"] < 100 else 2)]
    )
    monkeypatch.setattr(configurations, "workload", lambda *a, **k: load)
    result = configurations.run(REHEARSAL, "kelu/forward/dense/32bit")
    wrong = [t for t in result["tried"] if t["constants"]["block"] == 128]
    assert wrong[0]["seconds"] is None and "differs from the committed" in wrong[0]["reason"]
    assert result["best"] == {"block": 64, "warps": 4} == constants["kelu/forward/dense/32bit"]


def test_the_vendors_gemm_is_compared_with_the_best_of_ours_that_this_process_found(monkeypatch):
    entry, gemm = "linear/form/forward/square/16bit", "linear/gemm_forward/descriptors/16bit"
    constants = {entry: {"gemm": 0}, gemm: {"warps": 4}}
    seen = set()

    def call(x):
        seen.add((constants[entry]["gemm"], constants[gemm]["warps"]))
        return [x]

    monkeypatch.setattr(configurations, "table", lambda found: constants)
    monkeypatch.setattr(configurations, "workload", lambda *a, **k: workloads.Workload(lambda s: [torch.ones(4)], call))
    monkeypatch.setattr(configurations, "FOUND", {gemm: {"warps": 8}})
    configurations.run(REHEARSAL, entry)
    assert seen == {(0, 4), (0, 8), (1, 8)} or seen == {(0, 8), (1, 8)}
    assert constants == {entry: {"gemm": 0}, gemm: {"warps": 4}}


def test_what_was_only_compiled_is_no_result(monkeypatch):
    entry = "kelu/forward/dense/16bit"
    constants = {entry: {"block": 64, "warps": 4}}
    monkeypatch.setattr(configurations, "table", lambda found: constants)
    load = workloads.Workload(lambda s: [torch.ones(4)], lambda x: [x * (1 / (constants[entry]["block"] < 100))])
    monkeypatch.setattr(configurations, "workload", lambda *a, **k: load)
    made = configurations.run(REHEARSAL, entry, compile_only=True)
    assert [t["reason"] for t in made["tried"]] == [None, "ZeroDivisionError: division by zero"]
    assert constants == {entry: {"block": 64, "warps": 4}}
    file = {"rehearsal": False, "records": [{"status": "ok", "result": made}]}
    assert configurations.files(file, Setting()) == {} and "nothing written" in configurations.write(file)
    assert configurations.summary({"a": made}, Setting())["lines"] == ["0 entries searched, 0 can be faster"]


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
    assert not any(item.alone for item in made) and all(item.arguments["without"] == ["cuda"] for item in made)
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
