"""Wrong options, names and images are refused by name before any work."""

import math

import pytest
import torch

from sdpnet import SdPNet, SdPNetConfig, create_model, list_models, models

WRONG = {
    "num_classes": [0, -1, 2.5, "10", True],
    "in_channels": [0],
    "image_size": [0, 225, (224, 225), (224,), (1, 2, 3), "224", 224.0],
    "patch_size": [0, 15, -14, (14, 13)],
    "dim": [0, 770, 12],
    "heads": [0, 1, 5, 7, 96 * 2],
    "blocks": [0, 1.5],
    "conv_blocks": [-1],
    "registers": [0, -1, 2.0],
    "kernel_size": [0, 1, 2, 4, 8, 11, -3, "7"],
    "conv_ratio": [0, -1, math.nan, math.inf, "4", 1e-9],
    "ffn_ratio": [0, math.nan],
    "conv_eps": [0, -1e-6, math.nan, math.inf, "1e-6"],
    "token_eps": [0.0, math.nan],
    "layer_scale": [0, -0.1, math.nan, True],
    "dropout": [-0.1, 1, 1.5, math.nan, "0.1", True],
    "attention_dropout": [1.0],
    "projection_dropout": [-1],
    "head_dropout": [math.inf],
    "drop_path": [1, (0.1, 1.0), (-0.1, 0.2), (0.1,), (0.1, 0.2, 0.3), (0, math.nan), "0.1"],
    "position": ["axiall", None, 3],
    "position_kernel": [0, 2.5],
    "activation": ["gellu", "GELU", None, torch.relu],
    "embedding_activation": ["swish"],
    "head": ["tahn", ""],
    "residual_dtype": ["fp32", torch.float32],
    "conv_first": [1, None, "yes"],
    "gated_ffn": [0],
    "qk_norm": ["true"],
    "head_bias": [1.0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs], ids=lambda v: getattr(v, "__name__", str(v))
)
def test_wrong_value_names_the_option(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        SdPNetConfig(**{name: value})


@pytest.mark.parametrize(
    ("call", "error", "hint"),
    [
        (lambda: create_model("sdpnet_diggits"), ValueError, "did you mean 'sdpnet_digits'"),
        (lambda: models.config_class("sdpnet_xll"), ValueError, "did you mean 'sdpnet_xl'"),
        (lambda: create_model("sdpnet_s", kernal_size=3), TypeError, "did you mean 'kernel_size'"),
        (lambda: create_model("sdpnet_s", drop_pth=0.1), TypeError, "did you mean 'drop_path'"),
        (lambda: SdPNetConfig.from_dict({"hedas": 3}), TypeError, "did you mean 'heads'"),
        (lambda: SdPNetConfig(activation="gellu"), ValueError, "did you mean 'gelu'"),
        (lambda: SdPNetConfig(blocks=1, drop_path=(0.1, 0.2)), ValueError, "drop_path"),
        (lambda: SdPNet({"dim": 8}), TypeError, "config"),
    ],
    ids=range(8),
)
def test_unknown_names_come_with_the_nearest_right_one(call, error, hint):
    with pytest.raises(error, match=hint):
        call()


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((2, 3, 8, 8), torch.float32, r"images must be \(B, 1, H, W\)"),
        ((1, 8, 8), torch.float32, "images must be"),
        ((2, 1, 9, 8), torch.float32, "height"),
        ((2, 1, 8, 7), torch.float32, "width"),
        ((2, 1, 0, 8), torch.float32, "height"),
        ((2, 1, 8, 8), torch.uint8, "floating"),
    ],
    ids=str,
)
def test_wrong_images(shape, dtype, text):
    model = create_model("sdpnet_digits", patch_size=2)
    with pytest.raises((ValueError, TypeError), match=text):
        model(torch.zeros(shape, dtype=dtype))


def test_names_and_overrides():
    assert list_models() == sorted(list_models())
    assert {"sdpnet_" + s for s in ("xxs", "s", "m", "l", "xl", "xl_bench", "digits")} <= set(list_models())
    model = create_model("sdpnet_digits", num_classes=3, in_channels=2, image_size=(8, 12), fused=True)
    assert model.fused and model.config.num_classes == 3 and model.config.grid == (4, 6)
    assert not create_model("sdpnet_digits").fused and create_model("sdpnet_digits").config.num_classes == 10
    assert models.config_class("sdpnet_xl") is SdPNetConfig


def test_empty_batch():
    model = create_model("sdpnet_digits", dropout=0.1, attention_dropout=0.1, drop_path=0.1)
    assert model(torch.empty(0, 1, 8, 8)).shape == (0, 10)


def test_set_fused_reaches_every_part():
    model = create_model("sdpnet_digits")
    parts = [m for m in model.modules() if hasattr(m, "backend")]
    assert {m.backend for m in parts} == {"reference"}
    assert model.set_fused(True) is model and {m.backend for m in parts} == {None}


def test_options_survive_json():
    import json

    config = SdPNetConfig(image_size=(28, 56), drop_path=0.2, layer_scale=0.1)
    assert SdPNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
