"""``python -m bench.train_throughput``: forms that compute the same, FLOPs that agree, figures that are true."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from bench.train_throughput import __main__ as command
from bench.train_throughput import flops, forms, measure, profile, report
from bench.train_throughput.presets import PRESETS
from sdpnet.models import create_model

TINY = PRESETS["tiny"]
EAGER = ("original", "eager", "fused")


def trainee(form: str, activation: str = "kelu", **options) -> measure.Trainee:
    preset = measure.Preset(TINY.model, TINY.batch, (activation,), TINY.options | options)
    return measure.Trainee(form, preset, activation, 2, "cpu")


@pytest.mark.parametrize("activation", ["kelu", "gelu"])
@pytest.mark.parametrize("form", ["original", "eager"])
def test_plain_forms_compute_the_model(form, activation):
    """Logits and every gradient in fp32."""
    ours, plain = trainee("fused", activation), trainee(form, activation)
    outputs = {}
    for name, one in (("ours", ours), ("plain", plain)):
        logits = one.model(one.images, one.rng)
        F.cross_entropy(logits, one.targets).backward()
        gradients = {n: p.grad for n, p in one.base.named_parameters()}
        outputs[name] = {"logits": logits.detach(), **gradients}
    for name, wanted in outputs["ours"].items():
        if name.endswith("k_norm.bias"):
            continue  # zero but for rounding: softmax ignores a shift of all keys
        torch.testing.assert_close(outputs["plain"][name], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_forms_refuse_models_they_are_not_written_for():
    for options in ({"dropout": 0.1}, {"layer_scale": 0.1}, {"conv_first": False}):
        model = create_model(TINY.model, activation="kelu", **(TINY.options | options))
        with pytest.raises(ValueError, match=next(iter(options))):
            forms.build("eager", model)


def test_flops_agree_and_are_the_models():
    """Against the number of weights: each takes part in 2 · 3 operations per token, and attention comes on top."""
    counted = {form: flops.count(one.step) for form in EAGER if (one := trainee(form))}
    model = trainee("eager").base
    surplus = flops.register_rows(model, 2)
    assert counted["original"] == counted["eager"] == counted["fused"] - surplus and surplus > 0
    c, tokens, batch = model.config, 4, 2
    assert c.grid == (2, 2)
    everywhere, total = tokens + c.registers, 0
    for name, p in model.named_parameters():
        matrix = p.dim() > 1 and not name.startswith("embedding.") and "head" not in name
        rows = tokens if ".convs." in name else everywhere
        total += 6 * batch * rows * p.numel() * matrix
    total += 4 * batch * tokens * model.embedding.patch.weight.numel()  # pixels want no gradient
    total += 6 * batch * sum(p.numel() for n, p in model.named_parameters() if "head" in n and p.dim() > 1)
    total += 2 * 12 * batch * c.heads * everywhere**2 * (c.dim // c.heads)  # two encoders
    assert counted["eager"] == total


def test_a_form_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setitem(forms.ACTIVATIONS, "kelu", F.relu)
    with pytest.raises(ValueError, match="original: its logits are off"):
        measure.run(TINY, "kelu", batch=2, device="cpu", seconds=0.0, wanted=("original",), say=lambda text: None)


def test_a_form_that_runs_something_else_is_not_believed(monkeypatch):
    monkeypatch.setattr(flops, "register_rows", lambda model, batch: 7)
    with pytest.raises(ValueError, match="FLOPs differ"):
        measure.run(TINY, "kelu", batch=2, device="cpu", seconds=0.0, wanted=("eager", "fused"), say=lambda text: None)


def test_figures_without_flops_are_told():
    """On a GPU a vendor's kernel that nobody has counted costs the FLOPs, not the times."""
    uncounted = measure.Result("eager", seconds=[2.0], memory=2**20, error=1e-3)
    told = report.record("tiny", "kelu", 2, "cuda", [uncounted])
    assert "n/a       n/a" in report.lines(told)[2] and "1 MiB" in report.lines(told)[2]


def test_the_command_writes_figures_and_bars(tmp_path, capsys):
    arguments = ["--preset", "tiny", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]
    assert command.main([*arguments, *(word for form in EAGER for word in ("--form", form))]) == 0
    told = json.loads((tmp_path / "train_throughput-tiny-kelu.json").read_text())
    assert [row["form"] for row in told["forms"]] == list(EAGER)
    for row in told["forms"]:
        assert row["images_per_second"] == pytest.approx(2 / row["median"]) and len(row["seconds"]) >= 5
        assert sum(row["shares"].values()) == pytest.approx(1) and row["mfu"] is None and row["memory"] > 0
    assert (tmp_path / "train_throughput-tiny-kelu.png").stat().st_size > 5000
    assert "fused" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.parse(["--batch", "0"])


def test_goals_and_peaks():
    rows = [
        {"form": "eager", "median": 3.0},
        {"form": "fused", "median": 1.0},
        {"form": "fused, compiled", "median": 2.0},
    ]
    found = {goal["against"]: goal for goal in report.goals("cpu", "kelu", rows)}
    assert found["eager"]["reached"] and found["eager"]["ratio"] == 3
    assert not found["fused, by compiling it"]["reached"]
    assert flops.peak_rate("NVIDIA H200") == flops.peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_rate("NVIDIA H100 PCIe") is None and flops.peak_rate("some chip") is None


def test_time_is_put_down_to_the_right_group():
    groups = {
        "aten::addmm": "matrix products",
        "sdp_kernels_cpp::depthwise_conv2d_bwd": "depthwise convolution",
        "aten::mkldnn_convolution": "depthwise convolution",
        "aten::native_layer_norm_backward": "LayerNorm",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "sdp_kernels_cpp::linear_epilogue_fwd": "activation and epilogue",
        "aten::copy_": "copies and casts",
        "aten::_fused_adamw_": "optimizer and average",
        "something else": "other",
    }
    assert {name: profile.group_of(name) for name in groups} == groups


def test_a_kernels_time_counts_once():
    def event(key, time, on="CUDA", annotation=False):
        kind = getattr(torch.autograd.DeviceType, on)
        return SimpleNamespace(
            key=key, device_type=kind, is_user_annotation=annotation, self_device_time_total=time, self_cpu_time_total=1
        )

    ops = [event("aten::mm", 60, "CPU"), event("sdp_kernels_cpp::kelu_fwd", 20, "CPU")]
    marks = [event("step", 100, "CPU", annotation=True), event("step", 100, annotation=True)]
    kernels = [event("nvjet_tst_128x256", 60), event("void sdp::kelu_dense<…>", 20), event("launched by nobody", 20)]
    found = profile.shares_of([*ops, *marks, *kernels], "cuda")
    assert found == pytest.approx({"matrix products": 0.6, "activation and epilogue": 0.2, "other": 0.2})
    assert profile.shares_of(ops, "cpu") == {"matrix products": 0.5, "activation and epilogue": 0.5}


def test_peak_memory_counts_what_a_step_holds():
    held = []

    def step():
        held.append(torch.ones(2**20))
        (held[-1] * 2).sum()

    assert profile.peak_memory(step, held.clear, "cpu") == pytest.approx(2 * 4 * 2**20, rel=0.01)
