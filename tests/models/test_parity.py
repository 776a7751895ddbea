"""The original's golden tensors: logits, image tokens, registers and every gradient, in fp32, unfused and fused."""

import pytest
import torch
from golden import FILES, golden

from sdpnet import SdPNet
from sdpnet.original import INDEX_BUFFERS, from_original, to_original


def run(config, state, images, fused, dtype=torch.float32):
    """What the golden files hold, computed by our model, under the original's names."""
    model = SdPNet(config, fused=fused)
    model.load_state_dict(from_original(state, config))
    model.to(dtype)
    image_tokens, registers = model.forward_features(images.to(dtype))
    logits = model(images.to(dtype))
    logits.square().sum().backward()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    got = {f"grad.{name}": grad for name, grad in to_original(gradients, config, shapes).items()}
    got["logits"], got["registers"] = logits.detach(), registers.detach()
    got["image_tokens"] = image_tokens.detach().transpose(1, 2).unflatten(2, config.grid)
    return got


def largest(tensor):
    return float(tensor.abs().max())


def test_all_three_files_are_there():
    assert len(FILES) == 3


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path, fused):
    config, state, want = golden(path)
    got = run(config, state, want["input"], fused)

    assert want["registers"].shape[1] == config.registers
    assert set(got) | {"input"} == set(want)  # every tensor of the file, and no other
    assert {name for name in state if f"grad.{name}" not in got} == set(state) & set(INDEX_BUFFERS)
    model_scale = max(largest(tensor) for name, tensor in want.items() if name.startswith("grad."))
    errors, scales = {}, {}
    for name, tensor in got.items():
        assert tensor.shape == want[name].shape, name
        # Softmax doesn't see a shift of all keys, so the exact gradient of k_norm.bias is 0 (next test) and the golden
        # value is the rounding of its summands, as large as those of k_norm.weight: that is the scale.
        beside = name.replace("k_norm.bias", "k_norm.weight")
        scales[name] = max(largest(want[beside]), 1e-3 * model_scale)
        errors[name] = largest(tensor - want[name]) / scales[name]
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-5, (worst, errors[worst])


@pytest.mark.parametrize("path", [p for p in FILES if "avgpool" not in p.stem], ids=lambda path: path.stem)
def test_golden_key_bias_is_rounding(path):
    """In fp64 the gradient of every k_norm.bias vanishes: the golden files hold the original's rounding there."""
    config, state, want = golden(path)
    exact = run(config, state, want["input"], fused=False, dtype=torch.float64)
    names = [name for name in exact if name.endswith("k_norm.bias")]
    assert len(names) == config.blocks + 1
    for name in names:
        assert largest(exact[name]) <= 1e-12 * largest(exact[name.replace("bias", "weight")])
    for name, tensor in exact.items():
        assert name in names or largest(tensor - want[name]) <= 1e-5 * largest(want[name]), name
