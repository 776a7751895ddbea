"""Timing in turns, errors and verdicts, and the harness around them, on operators made up for the purpose."""

from __future__ import annotations

import dataclasses
import importlib
import math
import socket
from pathlib import Path

import pytest
import torch

import sdp_kernels
from bench import baselines, environment, measure, peers, report
from bench.cases import Case, Contender, Operator, UnusableError, with_passes
from bench.conftest import Replay
from bench.harness import Harness, missing_backend

SMALL = Case("square", (2, 4, 2, 2), torch.float32)


class FakeClock:
    """A call takes as long as it returns."""

    def __init__(self) -> None:
        self.spans: list[float] = []

    def run(self, call) -> None:
        self.spans.append(call())

    def take(self) -> list[float]:
        spans, self.spans = self.spans, []
        return spans


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def operator(*extra: Contender) -> Operator:
    return Operator(
        name="square",
        oracle=lambda x, case: x * x,
        eager="torch",
        traffic=lambda case: 8 * case.elements,
        contenders=(
            Contender("ours", "ours", lambda case: square),
            Contender("torch", "peer", lambda case: square),
            *extra,
        ),
    )


@pytest.fixture
def small_cache(monkeypatch) -> None:
    monkeypatch.setattr(measure, "last_level_cache", lambda: (256, "made up"))


def test_everybody_has_one_turn_a_round_and_the_inputs_rotate() -> None:
    seen: list[tuple[str, int]] = []

    def prepare(name: str, span: float):
        def on(index: int):
            seen.append((name, index))
            return lambda: span

        return on

    durations = measure.interleave(
        {n: prepare(n, s) for n, s in (("a", 1.0), ("b", 2.0), ("c", 3.0))}, 5, 0.0, FakeClock()
    )
    assert {name: set(spans) for name, spans in durations.items()} == {"a": {1.0}, "b": {2.0}, "c": {3.0}}
    assert {len(spans) for spans in durations.values()} == {measure.LEAST_ROUNDS}
    assert [index for _, index in seen] == [i % 5 for i in range(len(seen))]
    rounds = [tuple(name for name, _ in seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(set(turns) == {"a", "b", "c"} for turns in rounds)
    assert len(set(rounds)) > 1, "the order must change from round to round"


@pytest.mark.parametrize("together, most", [(1, 1), (5, 5), (1000, 3 * measure.BLOCK)])
def test_no_more_calls_are_prepared_at_a_time_than_memory_allows(together, most, monkeypatch) -> None:
    monkeypatch.setattr(measure, "_together", lambda prepare, on_gpu: together)
    waiting, highest = [0], [0]

    def prepare(index: int):
        waiting[0] += 1
        highest[0] = max(highest[0], waiting[0])

        def call() -> float:
            waiting[0] -= 1
            return 1.0

        return call

    durations = measure.interleave(dict.fromkeys("abc", prepare), 5, 0.0, FakeClock())
    assert highest[0] == most and waiting[0] == 0
    assert {len(spans) for spans in durations.values()} == {measure.LEAST_ROUNDS}


def test_what_a_prepared_call_holds_decides_how_many_there_may_be(monkeypatch) -> None:
    held = [100]

    def prepare(size: int):
        def on(index: int):
            held[0] += size
            return lambda: None

        return on

    fakes = {
        "memory_allocated": lambda: held[0],
        "memory_reserved": lambda: held[0] + 200,
        "mem_get_info": lambda: (800, 10_000),
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert measure._together({"a": prepare(10), "b": prepare(100)}, on_gpu=True) == 5  # half of 800 + 200 over 100
    assert measure._together({"a": prepare(10_000)}, on_gpu=True) == 1
    assert measure._together({"a": prepare(0), "b": prepare(0)}, on_gpu=True) == 2 * measure.BLOCK
    assert measure._together({"a": prepare(1)}, on_gpu=False) == measure.BLOCK


def test_inputs_together_exceed_twice_the_cache(monkeypatch) -> None:
    monkeypatch.setattr(measure, "last_level_cache", lambda: (1000, "made up"))
    inputs = measure.Inputs(operator(), SMALL)
    assert sum(x.numel() * x.element_size() for x in inputs.x) > 2000
    assert len({x.data_ptr() for x in inputs.x}) == len(inputs.dy) == inputs.count


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inputs_have_the_layout_of_the_case(layout, small_cache) -> None:
    inputs = measure.Inputs(operator(), Case("square", (2, 4, 2, 2), layout=layout))
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert all(t.is_contiguous(memory_format=memory_format) for t in (*inputs.x, *inputs.dy))


def test_each_pass_times_what_it_says(small_cache) -> None:
    inputs = measure.Inputs(operator(), SMALL)
    x, dy = inputs.x[1], inputs.dy[1]
    calls = []

    def counted(x):
        calls.append(1)
        return x * x

    forward, backward, both = (measure.timed_call(counted, case, inputs, 1) for case in with_passes(SMALL))
    assert len(calls) == 1, "only the backward pass runs the forward before the clock starts"
    torch.testing.assert_close(forward(), x * x)
    assert len(calls) == 2
    torch.testing.assert_close(backward()[0], 2 * x * dy)
    assert len(calls) == 2
    torch.testing.assert_close(both()[0], 2 * x * dy)
    assert len(calls) == 3


def test_errors_are_relative_to_the_largest_value_and_nan_shows() -> None:
    truth = {"y": torch.tensor([1.0, -4.0]), "dx": torch.tensor([2.0])}
    errors = measure.relative_errors({"y": torch.tensor([1.0, -3.0]), "dx": torch.tensor([math.nan])}, truth)
    assert errors["y"] == 0.25 and math.isnan(errors["dx"])
    assert measure.relevant(errors, "forward") == {"y": 0.25}
    assert list(measure.relevant(errors, "backward")) == ["dx"] and len(measure.relevant(errors, "both")) == 2


def test_a_gradient_that_vanishes_is_judged_on_the_scale_of_its_like() -> None:
    truth = {"dx": torch.tensor([[9.0]]), "dweight": torch.tensor([2.0, -4.0]), "dbias": torch.tensor([1e-16, 0.0])}
    got = truth | {"dbias": torch.tensor([0.0, 0.2])}
    assert measure.relative_errors(got, truth)["dbias"] == pytest.approx(0.05)
    small = truth | {"dbias": torch.tensor([1e-6, 0.0])}
    assert measure.relative_errors(got, small)["dbias"] == pytest.approx(2e5)


def test_an_output_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"y has shape \(1, 2\), wanted is \(2,\)"):
        measure.relative_errors({"y": torch.zeros(1, 2)}, {"y": torch.zeros(2)})


@pytest.mark.parametrize(
    ("kind", "error", "right"),
    [("ours", 3e-7, True), ("ours", 5e-7, False), ("peer", 5e-7, True), ("peer", 9e-5, True), ("peer", 2e-4, False),
     ("ours", math.nan, False), ("peer", math.nan, False)],
)  # fmt: skip
def test_ours_is_held_to_twice_torchs_error_and_a_peer_to_the_formula(kind, error, right) -> None:
    told = measure.verdict(
        kind, Case("square", (4, 4), which="forward"), {"y": error, "dx": 9.0}, {"y": 1e-7, "dx": 1e-7}
    )
    assert (told is None) == right
    if not right:
        assert told.startswith("y is off by ")


def test_measured_gives_paired_ratio_noise_and_floor() -> None:
    durations = {
        "ours": [1.0, 2.0, 9.0],
        "ours (again)": [1.0, 2.5, 3.0],
        "torch": [2.0, 6.0, 18.0],
        "copy": [4.0, 4.0, 4.0],
    }
    measured = measure.Measured(SMALL, durations)
    assert measured.paired_ratio("torch", "ours") == 2.0  # of the medians it would be 3
    assert measured.noise("ours") == pytest.approx(0.2) and measured.noise("torch") is None
    five = 5 * 4 * SMALL.elements  # where a copy moves 2 in 4 s
    assert measure.floor(measured.bandwidth, five) == pytest.approx(10.0)
    assert measure.floor(measured.bandwidth, five, 4 * 4 * SMALL.elements, 3.0) == pytest.approx(10.0)
    assert measure.floor(measured.bandwidth, five, 4 * 4 * SMALL.elements, 9.0) == pytest.approx(11.0)


def test_harness_times_who_is_right_and_tells_why_the_others_are_not(small_cache) -> None:
    def absent(case):
        raise UnusableError("not installed")

    def broken(case):
        return lambda x: x.no_such_method()

    extra = [
        Contender("wrong", "peer", lambda case: lambda x: x * x * 1.01),
        Contender("absent", "peer", absent),
        Contender("broken", "peer", broken),
        Contender("cube", "yardstick", lambda case: lambda x: x**3, oracle=lambda x, case: x**3),
    ]
    op, harness = operator(*extra), Harness(seconds=0.0)
    case = Case("square", (2, 4, 2, 2), which="forward")
    measured = harness.measure(op, list(op.contenders), case)
    assert set(measured.durations) == {"ours", "ours (again)", "torch", "cube", "copy"}
    reasons = {c.name: harness.check(op, c, case).reason for c in extra}
    assert reasons["absent"] == "not installed" and reasons["broken"].startswith("AttributeError")
    assert "y is off by 1.0e-02" in harness.wrong(op, harness.check(op, extra[0], case), case)
    measured.durations["cube"] = [1e-12] * len(measured.durations["torch"])
    row = harness.record(op, list(op.contenders), op.contenders[0], case)
    assert row["best_peer"] == "torch", "a yardstick computes something else and is no peer, however fast"
    assert row["time_over_floor"] == pytest.approx(row["median"] / row["floor"]) and row["noise"] is not None
    assert row["bytes"] == 8 * case.elements and row["error"] <= 1e-6


def test_a_crash_of_ours_is_kept_to_be_raised_and_not_timed(small_cache) -> None:
    def crash(case):
        raise RuntimeError("kernel gone")

    op = Operator("square", lambda x, case: x * x, "torch", (
        Contender("ours", "ours", crash), Contender("torch", "peer", lambda case: square)), lambda case: 1)  # fmt: skip
    harness = Harness(seconds=0.0)
    assert set(harness.measure(op, list(op.contenders), SMALL).durations) == {"torch", "copy"}
    assert str(harness.check(op, op.contenders[0], SMALL).crash) == "kernel gone"


def test_the_reference_is_never_timed_as_ours() -> None:
    with sdp_kernels.use_backend("reference"):
        assert "'reference' is forced" in missing_backend("kelu", "cpu", torch.float32)


def test_a_library_that_is_not_built_is_told(monkeypatch) -> None:
    monkeypatch.setattr(sdp_kernels.backends.BACKENDS["cpu"], "absent", "library sdp_kernels._C not built")
    told = missing_backend("kelu", "cpu", torch.float32)
    assert "pip install -e ." in told and "cpu: library sdp_kernels._C not built" in told


def test_replay_hands_the_durations_to_pytest_benchmark() -> None:
    timer = Replay()
    timer.durations = [0.5, 0.25]
    starts_and_ends = [timer() for _ in range(4)]
    assert [b - a for a, b in zip(starts_and_ends[::2], starts_and_ends[1::2])] == [0.5, 0.25]


def test_case_names_are_unique_and_unknown_values_are_refused() -> None:
    cases = with_passes(
        SMALL, Case("square", (2, 4, 4), layout="tokens"), Case("square", (2, 4, 4), layout="tokens", registers=1)
    )
    assert len({case.name for case in cases}) == 9
    with pytest.raises(ValueError, match="which must be one of forward, backward, both, got 'sideways'"):
        Case("square", (2,), which="sideways")
    with pytest.raises(ValueError, match="layout must be one of"):
        Case("square", (2,), layout="rows")


def test_environment_names_neither_host_nor_folders() -> None:
    described = repr(environment.describe())
    assert socket.gethostname() not in described
    assert str(Path.home()) not in described and str(Path(environment.__file__).parent) not in described
    assert environment.last_level_cache()[0] >= 2**18


def test_the_floor_is_the_time_of_the_gemms_and_of_the_bytes_beside_them(small_cache) -> None:
    def twice(case):
        return lambda x: 2 * x

    gemms = Contender("its GEMMs alone", "yardstick", twice, oracle=lambda x, case: 2 * x)
    op = dataclasses.replace(
        operator(gemms),
        gemms="its GEMMs alone",
        traffic=lambda case: 6 * case.bytes,
        hidden=lambda case: 4 * case.bytes,
    )
    harness = Harness(seconds=0.0)
    measured = harness.measure(op, [op.contender("ours"), op.contender("torch")], SMALL)
    assert "its GEMMs alone" in measured.durations, "measured also where it was not asked for"
    for name, seconds in (("copy", 2.0), ("its GEMMs alone", 5.0), ("ours", 14.0)):
        measured.durations[name] = [seconds] * 8
    row = harness.record(op, [op.contender("ours"), op.contender("torch")], op.contender("ours"), SMALL)
    assert (row["floor"], row["time_over_floor"], row["gemm_seconds"]) == pytest.approx((7.0, 2.0, 5.0))
    assert row["bytes"] == 6 * SMALL.bytes and row["copy_bytes_per_second"] == pytest.approx(SMALL.bytes)


def test_a_missing_gradient_is_an_error_and_an_unused_parameter_is_none() -> None:
    x, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    got = measure.outputs(lambda x, unused: x * x, x, [unused], torch.ones(2))
    assert list(got) == ["y", "dx"]
    with pytest.raises(ValueError, match="has gradients y, wanted are y, dx"):
        measure.relative_errors({"y": got["y"]}, got)


def test_dy_has_the_shape_of_y(small_cache) -> None:
    op = dataclasses.replace(operator(), output=lambda case: (*case.shape, 3))
    assert measure.Inputs(op, SMALL).dy[0].shape == (*SMALL.shape, 3)


FILES = sorted(path.stem for path in Path(baselines.__file__).parent.glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_every_benchmark_is_complete(name) -> None:
    module = importlib.import_module(f"bench.{name}")
    known = module.OPERATOR
    assert name == f"test_{known.name}" and [c.kind for c in known.contenders].count("ours") == 1
    assert known.contender("ours").default and known.contender(known.eager).kind == "peer"
    assert known.gemms is None or known.contender(known.gemms).kind == "yardstick"
    for device in ("cpu", "cuda"):
        every = module.CASES["all"][device]
        assert len({case.name for case in every}) == len(every) and set(module.CASES["short"][device]) <= set(every)
        for case in every:
            assert (case.operator, case.device) == (known.name, device)
            assert 0 <= known.hidden(case) <= known.traffic(case)
            assert callable(known.contender("ours").build(dataclasses.replace(case, device="cpu")))


def runs_here(contender: Contender, problem: Case) -> bool:
    try:
        contender.build(problem)
    except UnusableError:
        return False
    return True


@pytest.mark.parametrize("name", FILES)
def test_everybody_computes_what_the_benchmark_says_and_the_report_shows_it(name, monkeypatch) -> None:
    monkeypatch.setattr(measure, "last_level_cache", lambda: (256, "made up"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    module = importlib.import_module(f"bench.{name}")
    known, rows = module.OPERATOR, []
    small = {"tokens": (2, 17, 8), "contiguous": (2, 8, 4, 4), "channels_last": (2, 8, 4, 4)}
    small |= getattr(module, "SMALL", {})
    problems = {(case.layout, case.variant): case for case in module.CASES["all"]["cpu"]}
    harness = Harness(seconds=0.0)
    for case in problems.values():
        shape = small[case.layout]
        problem = dataclasses.replace(
            case, shape=shape, dtype=torch.float32, registers=min(1, case.registers), which="both"
        )
        entering = [c for c in known.contenders if problem.layout in c.layouts and c.name not in peers.DEVICES]
        entering = [c for c in entering if runs_here(c, problem)]
        for contender in entering:
            checked = harness.check(known, contender, problem)
            assert checked.reason is None and harness.wrong(known, checked, problem) is None, (contender.name, problem)
            rows.append(harness.record(known, entering, contender, problem))
    made = {"benchmarks": [{"group": r["operator"], "name": r["contender"], "extra_info": r} for r in rows]}
    text = report.markdown(made)
    assert all(report.case_name(row) in text and f"| {row['contender']} |" in text for row in rows)


@pytest.mark.parametrize("activation", baselines.ACTIVATIONS)
def test_the_convnext_baseline_agrees_with_the_operators_reference(activation) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 1, 3, 3), (5,), (5,), (5,), (20, 5), (20,), (5, 20), (5,), (5,))
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    x = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    wanted = sdp_kernels.convnext_block(
        x, sdp_kernels.ConvNeXtWeights(*weights), activation=activation, eps=1e-5, backend="reference"
    )
    torch.testing.assert_close(
        baselines.convnext_block(x, tuple(weights), baselines.ACTIVATIONS[activation], 1e-5), wanted
    )


@pytest.mark.parametrize("activation", baselines.ACTIVATIONS)
def test_conv_mlp_baselines_agree_with_the_operators_reference(activation) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = (
        normal(5),
        normal(5),
        normal(5, 1, 3, 3),
        normal(5, 5),
        normal(5),
        normal(5),
        normal(20, 5),
        normal(5, 20),
    )
    gain1, shift1, depthwise, pointwise, gain2, shift2, expand, project = weights
    named = sdp_kernels.ConvMLPWeights(
        gain1, shift1, depthwise, None, pointwise, None, None, gain2, shift2, expand, None, project, None, None
    )
    x = normal(2, 14, 5)
    wanted = sdp_kernels.conv_mlp(
        x, named, grid=(3, 4), registers=2, activation=activation, eps=1e-5, backend="reference"
    )
    for form in (baselines.conv_mlp, baselines.conv_mlp_original):
        function = baselines.on_tokens(
            lambda x, form=form: form(x, weights, baselines.ACTIVATIONS[activation], 1e-5), (3, 4), 2
        )
        torch.testing.assert_close(function(x), wanted)


@pytest.mark.parametrize("function", [baselines.kelu_where, baselines.kelu_masks])
def test_kelu_baselines_compute_kelu_and_its_slope(function) -> None:
    x = torch.tensor([-9.0, -3.5, -3.499, -1.0, 0.0, 1.0, 3.499, 3.5, 9.0], dtype=torch.float64, requires_grad=True)
    a, v = 3.5, x.detach()
    bent = v / 2 * (1 + v / a + torch.sin(math.pi * v / a) / math.pi)
    slope = 0.5 * (1 + 2 * v / a + torch.sin(math.pi * v / a) / math.pi + v / a * torch.cos(math.pi * v / a))
    y = function(x)
    torch.testing.assert_close(y, torch.where(v >= a, v, torch.where(v <= -a, 0.0, bent)))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.where(v >= a, 1.0, torch.where(v <= -a, 0.0, slope)), atol=1e-12, rtol=1e-12)


def test_layer_norm_baselines_agree_with_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    weight, bias = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    wanted = (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(baselines.layer_norm_permuted(x, weight, bias, 1e-6), wanted)
    torch.testing.assert_close(baselines.layer_norm_moments(x, weight, bias, 1e-6), wanted)
    tokens = baselines.layer_norm_tokens(x.flatten(2).mT, weight, bias, 1e-6, registers=2)
    torch.testing.assert_close(tokens[:, 2:], wanted.flatten(2).mT[:, 2:])
    assert tokens[:, :2].eq(0).all()


def test_every_output_is_given_the_gradient_and_compared() -> None:
    x, dy = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    found = measure.outputs(lambda x: (x * x, 3 * x), x, [], dy)
    torch.testing.assert_close(found["dx"], (2 * x.detach() + 3) * dy)
    torch.testing.assert_close(found["y"], torch.stack([x * x, 3 * x]).detach())
