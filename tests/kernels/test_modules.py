"""The modules' options: wrong ones are refused when the module is made, and the printed module shows what it is."""

import pytest

import sdp_kernels as K


@pytest.mark.parametrize("block", [K.ConvMLP, K.ConvNeXtBlock])
@pytest.mark.parametrize(
    "options, error",
    [
        ({"drop_path": 1.0}, ValueError),
        ({"eps": 0.0}, ValueError),
        ({"layer": -1}, ValueError),
        ({"layer_scale": "1e-6"}, TypeError),
        ({"activation": "swish"}, ValueError),
        ({"kernel_size": 4}, ValueError),
        ({"mlp_ratio": 0.0}, ValueError),
    ],
)
def test_a_block_refuses_a_wrong_option_when_it_is_made(block, options, error):
    with pytest.raises(error, match=next(iter(options))):
        block(8, **options)


def test_a_norm_refuses_a_wrong_eps_when_it_is_made():
    with pytest.raises(ValueError, match="eps must be positive"):
        K.LayerNorm2d(8, eps=0.0)


def test_a_layer_scale_may_be_an_int():
    assert K.ConvMLP(8, layer_scale=1).layer_scale1.tolist() == [1.0] * 8
    assert K.ConvNeXtBlock(8, layer_scale=0).layer_scale.tolist() == [0.0] * 8


@pytest.mark.parametrize(
    "module, text",
    [
        (K.DepthwiseConv2d(8, 5, bias=False), "DepthwiseConv2d(8, kernel_size=5, bias=False)"),
        (
            K.ConvMLP(8, 3, 2.0, "kelu", drop_path=0.1),
            "ConvMLP(8, kernel_size=3, hidden=16, activation='kelu', drop_path=0.1)",
        ),
        (K.ConvNeXtBlock(8), "ConvNeXtBlock(8, kernel_size=7, hidden=32, activation='gelu', drop_path=0.0)"),
    ],
)
def test_a_printed_module_shows_what_it_is(module, text):
    assert repr(module) == text
