"""bench.gpu's configurations part: the search, the table it proposes, the entries it covers."""

from __future__ import annotations

import json
import os

import pytest
import torch

from bench.gpu import warpgroups, workloads
from bench.gpu.part import Setting
from bench.gpu.parts import configurations

REHEARSAL = Setting(rehearsal=True)


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


def test_cudas_two_kernels_are_compared_and_no_table_changes(monkeypatch):
    (entry, *_), seen = workloads.CUDA, []
    monkeypatch.delenv("SDP_KERNELS_CUDA_ATTENTION", raising=False)

    class Library:
        def register_attention_fwd(self, qkv, *more):
            return qkv[:, :, 0].flatten(2), torch.ones(2)

        def register_attention_bwd(self, grad, qkv, *more):
            seen.append(os.environ["SDP_KERNELS_CUDA_ATTENTION"])
            return qkv, qkv[0, 0, 0, 0], None, None, None

    monkeypatch.setattr(torch.ops, "sdp_kernels_cpp", Library())
    result = configurations.run(REHEARSAL, entry)
    assert [t["constants"] for t in result["tried"]] == [{"wgmma": 0}, {"wgmma": 1}]
    assert set(seen) == {"mma", "wgmma"} and all(t["seconds"] is not None for t in result["tried"])
    assert workloads.CUDA[entry] == {"wgmma": 0} and "SDP_KERNELS_CUDA_ATTENTION" not in os.environ
    found = result | {"best": {"wgmma": 1}, "best_seconds": 1.0, "committed_seconds": 2.0}
    assert configurations.proposal([found], {"90": {}}) == {"90": {}}
    file = {"rehearsal": False, "records": [{"status": "ok", "result": found}]}
    assert "nothing written" in configurations.write(file)
    assert "kAttentionWgmma" in configurations.summary({"a": found}, Setting())["lines"][1]


def test_cudas_kernels_are_compared_where_there_are_two(monkeypatch):
    from sdp_kernels.backends import BACKENDS

    monkeypatch.setattr(BACKENDS["cuda"], "absent", None)
    monkeypatch.setattr(configurations, "capability", lambda setting: "90")
    for there in (False, True):
        monkeypatch.setattr(warpgroups, "there", lambda there=there: there)
        entries = [item.arguments["entry"] for item in configurations.cases(Setting())]
        assert [entry for entry in entries if entry.startswith("cuda/")] == (list(workloads.CUDA) if there else [])
    assert not any(i.arguments["entry"].startswith("cuda/") for i in configurations.cases(REHEARSAL))
