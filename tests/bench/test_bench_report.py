"""Tables, charts and the comparison of two results, on synthetic ones."""

from __future__ import annotations

import json

import pytest

from bench import report
from bench.charts import draw


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def ours(make_result, make_row, median: float, floor: float = 1e-3, noise: float = 0.01, **changes) -> dict:
    return make_result(make_row("ours", median, floor=floor, time_over_floor=median / floor, noise=noise), **changes)


def test_summary_has_one_line_per_case_with_ours_the_best_peer_and_both_errors(make_row) -> None:
    rows = [
        make_row("slow", 9e-3),
        make_row("ours", 2e-3, error=3e-8),
        make_row("torch", 5e-3, error=4e-4),
        make_row("ours", 1e-3, **{"pass": "backward"}),
        make_row("torch", 3e-3, **{"pass": "backward"}),
    ]
    title, forward, backward = report.summary_cells(rows)
    assert title[:5] == ["case", "ours", "best peer", "", "ratio"]
    wanted = ["2.00 ms", "5.00 ms", "torch", "2.50×", "3e-08", "4e-04", "2.00", "1.0 %"]
    assert forward == ["kelu 2×3 float32 contiguous forward", *wanted]
    assert backward[0].endswith("backward") and backward[2] == "3.00 ms"


def test_summary_without_any_peer_says_so(make_row) -> None:
    cells = report.summary_cells([make_row("ours", 2e-3, best_peer=None, ratio_to_best_peer=None, noise=None)])
    assert cells[1][2:5] == ["–", "none", "–"] and cells[1][-1] == "–"


def test_summary_table_is_aligned(make_row) -> None:
    rows = [make_row("ours", 2e-3), make_row("torch", 5e-3), make_row("ours", 20e-3, dtype="bfloat16")]
    lines = report.summary_table(rows)
    assert len({line.index(t) + len(t) for line, t in zip(lines, ("ours", "2.00 ms", "20.0 ms"))}) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (4.56e-4, "456 µs"), (7.891e-7, "0.79 µs"), (None, "–")]
)
def test_durations_have_three_digits(value, text) -> None:
    assert report.seconds(value) == text


def test_report_names_what_was_not_timed_and_which_library_is_missing(make_result, make_row) -> None:
    not_timed = [{"case": "case 1", "contender": "timm", "kind": "peer", "status": "wrong", "reason": "y is | off"}]
    peers = [{"name": "apex", "reason": "not NVIDIA's"}, {"name": "timm", "reason": None}]
    text = report.markdown(
        make_result(make_row("ours", 2e-3), make_row("torch", 5e-3), not_timed=not_timed, peers=peers)
    )
    assert "| case 1 | timm | wrong | y is \\| off |" in text
    assert "- apex: not NVIDIA's" in text and "- timm" not in text
    assert "Some CPU" in text and "commit 0123456789ab;" in text


def test_every_contender_is_listed_fastest_first_relative_to_ours(make_row) -> None:
    cells = report.contender_cells([make_row("torch", 5e-3), make_row("ours", 2e-3), make_row("slow", 8e-3)])
    assert [row[1] for row in cells[1:]] == ["ours", "torch", "slow"]
    assert [row[3] for row in cells[1:]] == ["1.00", "2.50", "4.00"]
    assert cells[1][5] == "0.5"  # 1 MB in 2 ms


def test_charts_are_one_picture_per_operator_and_device(make_row, tmp_path) -> None:
    rows = [make_row("ours", 2e-3), make_row("torch", 50e-3), make_row("ours", 2e-3, operator="linear", device="cuda")]
    names = draw(rows, tmp_path / "new")
    assert names == ["kelu-cpu.png", "linear-cuda.png"]
    assert all((tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.parametrize(
    ("median", "floor", "noise", "verdict"),
    [
        (2.4e-3, 1.0e-3, 0.01, "slower"),
        (2.4e-3, 1.2e-3, 0.01, "same"),  # the copy slowed down as much: the machine, not the kernel
        (2.4e-3, 1.0e-3, 0.30, "same"),  # within what the run itself cannot tell apart
        (2.05e-3, 1.0e-3, 0.0, "slower"),
        (2.05e-3, 1.0e-3, 0.04, "same"),
        (1.5e-3, 1.0e-3, 0.01, "faster"),
        (1.5e-3, 0.7e-3, 0.01, "same"),
    ],
)
def test_a_change_counts_when_time_and_time_over_floor_exceed_the_noise(
    make_result, make_row, median, floor, noise, verdict
) -> None:
    before = ours(make_result, make_row, 2.0e-3, noise=0.01)
    after = ours(make_result, make_row, median, floor, noise)
    assert [change.verdict for change in report.compare(before, after)[0]] == [verdict]
    assert [change.noise >= report.LEAST_NOISE for change in report.compare(before, before)[0]] == [True]


def test_noise_of_the_whole_run_covers_a_case_whose_own_figure_is_lucky(make_result, make_row) -> None:
    def run(slowdown: float) -> dict:
        lucky = make_row("ours", 2e-3 * slowdown, shape=[0], time_over_floor=2 * slowdown, noise=0.001)
        return make_result(lucky, *(make_row("ours", 2e-3, shape=[i], noise=0.08) for i in range(1, 10)))

    assert report.compare(run(1.0), run(1.07))[0][0].verdict == "same"
    assert report.compare(run(1.0), run(1.09))[0][0].verdict == "slower"


def test_comparison_tells_of_other_machines_and_cases_that_only_one_has(make_result, make_row) -> None:
    before = make_result(make_row("ours", 2e-3), make_row("ours", 2e-3, shape=[7]))
    after = make_result(make_row("ours", 2e-3), make_row("ours", 2e-3, shape=[9]), machine_info={"threads": 8})
    changes, remarks = report.compare(before, after)
    assert len(changes) == 1
    assert "only before: kelu 7 float32 contiguous forward" in remarks
    assert "only after: kelu 9 float32 contiguous forward" in remarks
    assert "threads differs: 2 before, 8 after" in remarks


def test_command_line_returns_1_on_a_regression_and_0_without(make_result, make_row, tmp_path, capsys) -> None:
    fast = write(tmp_path / "a.json", ours(make_result, make_row, 2e-3))
    slow = write(tmp_path / "b.json", ours(make_result, make_row, 3e-3))
    assert report.main(["--compare", fast, slow]) == 1
    assert "+50.0 %" in capsys.readouterr().out
    assert report.main(["--compare", slow, fast]) == 0
    assert capsys.readouterr().out.rstrip().endswith("0 slower, 0 same, 1 faster; median change -33.3 %")


def test_command_line_writes_the_report_with_its_charts(make_result, make_row, tmp_path, capsys) -> None:
    path = write(tmp_path / "a.json", make_result(make_row("ours", 2e-3), make_row("torch", 5e-3)))
    assert report.main([path, "--out", f"{path}/below a file"]) == 2
    assert "--out" in capsys.readouterr().err
    assert report.main([path, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "![kelu-cpu.png](kelu-cpu.png)" in text and (tmp_path / "out" / "kelu-cpu.png").exists()
    assert "| torch | 5.00 ms |" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ([], "no list of benchmarks"),
        ({"benchmarks": [{"group": None, "extra_info": {}}]}, "another benchmark"),
    ],
)
def test_a_file_that_is_no_result_is_named_and_explained(content, said, tmp_path, capsys) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        write(path, content)
    assert report.main([str(path)]) == 2
    told = capsys.readouterr().err
    assert "bad.json" in told and said in told


def test_results_without_a_common_case_are_an_error(make_result, make_row, tmp_path, capsys) -> None:
    a = write(tmp_path / "a.json", make_result(make_row("ours", 2e-3)))
    b = write(tmp_path / "b.json", make_result(make_row("ours", 2e-3, dtype="float16")))
    assert report.main(["--compare", a, b]) == 2
    assert "no case in common" in capsys.readouterr().err
