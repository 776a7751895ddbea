"""Dropout and drop-path in the model: where, how much, from which random numbers; and the token buffer's dtype."""

import pytest
import torch

import sdp_kernels
from sdpnet import SdPNet, SdPNetConfig

RATES = {"dropout": 0.3, "attention_dropout": 0.2, "projection_dropout": 0.3, "head_dropout": 0.3}
RATES["drop_path"] = (0.1, 0.5)
PLAIN = SdPNetConfig(
    num_classes=5, image_size=16, patch_size=4, dim=16, blocks=3, conv_blocks=2, kernel_size=3, heads=2, registers=2,
    conv_ratio=2, ffn_ratio=2, dropout=0.0,
)  # fmt: skip


def model(**options):
    torch.manual_seed(0)
    return SdPNet(PLAIN.replace(**options))


def images(batch=4):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_drop_path_schedule_reaches_both_ends():
    rates = PLAIN.replace(blocks=6, drop_path=(0.1, 0.2)).drop_path_rates
    assert rates == pytest.approx((0.1, 0.12, 0.14, 0.16, 0.18, 0.2))
    for blocks in (2, 3, 7, 17):
        rates = PLAIN.replace(blocks=blocks, drop_path=(0.1, 0.3)).drop_path_rates
        assert len(rates) == blocks and rates[0] == 0.1 and rates[-1] == 0.3
    assert PLAIN.replace(drop_path=0.2).drop_path == (0.0, 0.2)
    assert PLAIN.replace(blocks=1, drop_path=0.2).drop_path_rates == (0.2,)
    net = model(drop_path=(0.1, 0.3))
    assert [block.encoder.drop_path for block in net.blocks] == [block.convs[1].drop_path for block in net.blocks]
    assert [net.blocks[0].encoder.drop_path, net.blocks[2].convs[0].drop_path, net.encoder.drop_path] == [0.1, 0.3, 0.0]


def test_every_call_site_has_its_own_layer():
    net = model(**RATES, gated_ffn=True)
    layers = [
        value
        for module in net.modules()
        for name, value in vars(module).items()
        if name == "layer" or name.endswith("_layer")
    ]
    assert len(layers) == len(set(layers)) == 3 * 2 + 4 * 4 + 1


def test_masks_are_functions_of_the_rng():
    net, x = model(**RATES), images()
    y = net(x, sdp_kernels.make_rng(3, step=1))
    assert torch.equal(y, net(x, sdp_kernels.make_rng(3, step=1)))
    assert not torch.equal(y, net(x, sdp_kernels.make_rng(3, step=2)))
    assert not torch.equal(y, net(x, sdp_kernels.make_rng(4, step=1)))
    second = net(x[2:], sdp_kernels.make_rng(3, step=1, first_sample=2))
    torch.testing.assert_close(y[2:], second)
    assert not torch.allclose(y[2:], net(x[2:], sdp_kernels.make_rng(3, step=1)))


def test_without_an_rng_torchs_default_generator_is_used():
    net, x = model(**RATES), images()
    torch.manual_seed(5)
    first, second = net(x), net(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, net(x))


def test_nothing_is_random_in_evaluation_or_at_rate_0():
    net, x = model(**RATES), images()
    assert not torch.equal(net(x), net.eval()(x))
    plain = model()
    state = torch.get_rng_state()
    assert torch.equal(net(x), net(x)) and torch.equal(net(x), plain(x))
    assert torch.equal(state, torch.get_rng_state())  # and no random number is taken


@pytest.mark.parametrize("name", RATES)
def test_each_rate_acts_alone(name):
    net, x = model(**{name: RATES[name]}), images()
    assert not torch.equal(net(x, sdp_kernels.make_rng(1)), net(x, sdp_kernels.make_rng(2)))


def test_default_dropout_is_in_the_feed_forward_half_only():
    config = SdPNetConfig()
    assert config.dropout == 0.2
    assert (config.attention_dropout, config.projection_dropout, config.head_dropout) == (0, 0, 0)


def test_a_model_without_randomness_ignores_the_rng():
    net, x = model(), images()
    assert torch.equal(net(x), net(x, sdp_kernels.make_rng(1)))


@pytest.mark.parametrize("residual", [None, "float32"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_token_buffer_under_autocast(residual, fused):
    net = model(residual_dtype=residual, activation="kelu").set_fused(fused)
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        block.encoder.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(images())
    assert y.dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.float32 if residual else torch.bfloat16] * 3
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
    torch.testing.assert_close(y.float(), net(images()), rtol=0.1, atol=0.05)


def test_parameters_in_half_precision():
    for residual in (None, "float32"):  # without autocast the parameters decide
        tokens, _ = model(residual_dtype=residual).bfloat16().forward_features(images().bfloat16())
        assert tokens.dtype == torch.bfloat16


def test_the_buffer_is_contiguous_and_registers_come_first():
    net = model()
    tokens = net.forward_tokens(images())
    assert tokens.is_contiguous() and tokens.shape == (4, 2 + 16, 16)
    start = net.embedding(images(), (4, 4))
    assert start.is_contiguous() and torch.equal(start[:, :2], net.embedding.registers.expand(4, -1, -1))
    patch = images()[1, :, 4:8, 8:12].flatten()  # row 1, column 2
    want = net.embedding.patch.weight @ patch + net.embedding.position.rows[1] + net.embedding.position.columns[2]
    torch.testing.assert_close(start[1, 2 + 1 * 4 + 2], want)
