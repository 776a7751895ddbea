"""SdP-Net: every option trains, other image sizes work, and the sizes are the published ones."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sdp_kernels
from sdpnet import SdPNet, SdPNetConfig, create_model, list_models

SMALL = SdPNetConfig(
    num_classes=5, image_size=(16, 24), patch_size=4, dim=16, blocks=2, conv_blocks=1, kernel_size=3, heads=2,
    registers=3, conv_ratio=2, ffn_ratio=2, dropout=0.0,
)  # fmt: skip

OPTIONS = {
    "as it is": {},
    "encoder first": {"conv_first": False},
    "no ConvMLP": {"conv_blocks": 0},
    "three ConvMLPs": {"conv_blocks": 3},
    "one block": {"blocks": 1, "drop_path": 0.3},
    "kernel 5": {"kernel_size": 5},
    "kernel 7": {"kernel_size": 7},
    "kernel 9": {"kernel_size": 9},
    "all biases": {"depthwise_bias": True, "pointwise_bias": True, "head_bias": True},
    "layer scale": {"layer_scale": 0.5},
    "gated": {"gated_ffn": True, "dropout": 0.3},
    "neighbourhood": {"position": "neighbourhood", "position_kernel": 3},
    "even neighbourhood": {"position": "neighbourhood", "position_kernel": 4},
    "frozen neighbourhood": {"position": "neighbourhood", "position_trainable": False},
    "one register": {"registers": 1},
    "seven registers": {"registers": 7},
    "no registers": {"registers": 0, "head": "mean"},
    "simple head": {"head": "simple"},
    "mean head": {"head": "mean"},
    "no q/k norm": {"qk_norm": False},
    "every dropout": {
        "dropout": 0.2, "attention_dropout": 0.2, "projection_dropout": 0.2, "head_dropout": 0.2,
        "drop_path": (0.1, 0.4),
    },
    "fp32 buffer": {"residual_dtype": "float32"},
    "patches of two shapes": {"patch_size": (4, 8)},
    **{f"activation {name}": {"activation": name} for name in sdp_kernels.ACTIVATIONS},
    **{f"embedding {name}": {"embedding_activation": name} for name in sdp_kernels.ACTIVATIONS},
}  # fmt: skip


def images(batch=2, size=(16, 24), channels=3, **kw):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1), **kw)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains_every_parameter(options, fused):
    torch.manual_seed(0)
    model = SdPNet(SMALL.replace(**options), fused=fused)
    with torch.no_grad():  # away from the symmetric start, so that no gradient vanishes by it
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    logits = model(images(8), sdp_kernels.make_rng(7))
    assert logits.shape == (8, 5)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("k_norm.bias") or parameter.grad.abs().max() > 0, name  # a shift of all keys does nothing


@pytest.mark.parametrize("options", [{}, {"activation": "kelu"}, {"gated_ffn": True, "layer_scale": 0.1}], ids=str)
@pytest.mark.parametrize("rates", [{}, {"dropout": 0.2, "attention_dropout": 0.1, "drop_path": 0.3}], ids=str)
def test_fused_equals_unfused(options, rates):
    torch.manual_seed(0)
    model = SdPNet(SMALL.replace(**options, **rates))
    gradients = []
    for fused in (False, True):
        model.set_fused(fused).zero_grad()
        y = model(images(), sdp_kernels.make_rng(3, step=2))
        y.square().sum().backward()
        gradients.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    scale = max(float(g.abs().max()) for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * scale)


def test_registers_used_are_the_registers_asked_for():
    for registers in (1, 3, 4, 5, 9):
        model = SdPNet(SMALL.replace(registers=registers)).eval()
        tokens, used = model.forward_features(images())
        assert used.shape == (2, registers, 16) and tokens.shape == (2, 4 * 6, 16)
        model(images()).sum().backward()
        assert (model.embedding.registers.grad.abs().sum(1) > 0).all()  # each of them is read


@pytest.mark.parametrize("position", ["axial", "neighbourhood"])
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (32, 32), (8, 40), (4, 4)], ids=str)
def test_other_image_sizes(position, size):
    model = SdPNet(SMALL.replace(position=position))
    tokens, _ = model.forward_features(images(size=size))
    assert tokens.shape == (2, size[0] // 4 * (size[1] // 4), 16)
    model(images(size=size)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_positions_are_interpolated_between_native_ones():
    position = SdPNet(SMALL).embedding.position
    native = position((4, 6)).unflatten(0, (4, 6))
    torch.testing.assert_close(native, position.rows[:, None] + position.columns)
    double = position((8, 12)).unflatten(0, (8, 12))
    torch.testing.assert_close(double[0, 0], native[0, 0])
    quarter = 0.75 * position.rows[0] + 0.25 * position.rows[1]  # pixel centres, as images are resized
    torch.testing.assert_close(double[1, 0], quarter + position.columns[0])


@pytest.mark.parametrize("options", [{}, OPTIONS["every dropout"], OPTIONS["neighbourhood"]], ids=str)
@pytest.mark.parametrize("size", [(16, 24), (32, 32)], ids=str)
def test_runs_on_meta_tensors(options, size):
    with torch.device("meta"):
        model = SdPNet(SMALL.replace(**options))
    y = model(images(size=size).to("meta"))
    y.sum().backward()
    assert y.shape == (2, 5) and all(p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize(("fused", "given"), [(False, False), (True, True)], ids=str)
def test_compiles_to_one_graph(fused, given):
    torch.manual_seed(0)
    model = SdPNet(SMALL.replace(activation="kelu", **OPTIONS["every dropout"]), fused=fused)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(images(), sdp_kernels.make_rng(5) if given else None)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if given:
        torch.testing.assert_close(y, model(images(), sdp_kernels.make_rng(5)), rtol=1e-5, atol=1e-6)


def test_sizes():
    millions = {}
    for name in list_models():
        with torch.device("meta"):
            millions[name] = round(sum(p.numel() for p in create_model(name).parameters()) / 1e6, 1)
    assert millions.pop("sdpnet_digits") < 0.5
    assert millions == {
        "sdpnet_xxs": 6.1, "sdpnet_s": 76.4, "sdpnet_m": 85.5, "sdpnet_l": 85.7, "sdpnet_xl": 100.8,
        "sdpnet_xl_bench": 116.0,
    }  # fmt: skip


def test_bench_model_is_the_one_of_the_figures():
    """181 GFLOP per image, forward + backward; register rows that pass through the pointwise products come on top."""

    def depthwise_backward(grad, x, weight, *_, out_shape=None, **__):  # torch's formula forgets the groups
        return 2 * 2 * grad[0] * grad[1] * grad[2] * grad[3] * weight[2] * weight[3]

    with torch.device("meta"):
        model, batch = create_model("sdpnet_xl_bench"), torch.randn(1, 3, 224, 224)
    backward = {torch.ops.aten.convolution_backward: depthwise_backward}
    with FlopCounterMode(display=False, custom_mapping=backward) as counter:
        model(batch).sum().backward()
    on_registers = (
        3 * 2 * 5 * sum(p.numel() for name, p in model.named_parameters() if ".convs." in name and p.dim() == 2)
    )
    assert (counter.get_total_flops() - on_registers) / 1e9 == pytest.approx(181, abs=0.5)


def test_largest_head():
    with torch.device("meta"):
        model = create_model("sdpnet_xl_bench", num_classes=21841, head="simple")
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 21841)


def test_state_dict_round_trip():
    first, second = SdPNet(SMALL), SdPNet(SdPNetConfig.from_dict(SMALL.to_dict()))
    assert not torch.equal(first(images()), second(images()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images()), second(images()))


def test_initialisation():
    torch.manual_seed(0)
    biases = {"depthwise_bias": True, "pointwise_bias": True, "head_bias": True}
    model = SdPNet(SMALL.replace(num_classes=64, dim=128, layer_scale=0.1, **biases))
    for name, p in model.named_parameters():
        if "scale" in name:
            assert (p == 0.1).all(), name
        elif p.dim() == 1 and name.endswith("weight"):
            assert (p == 1).all(), name
        elif p.dim() == 1:
            assert (p == 0).all(), name
        else:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.15), name


def test_no_weight_decay():
    model = SdPNet(SMALL.replace(layer_scale=0.1, depthwise_bias=True, position="neighbourhood"))
    free = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and name != "embedding.registers" and "position" not in name
        assert (name in free) == (not matrix), name
    assert {"embedding.registers", "embedding.position.field", "encoder.scale1"} <= free


def test_double_precision():
    assert SdPNet(SMALL).double()(images(dtype=torch.float64)).dtype == torch.float64


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.dim = 8
