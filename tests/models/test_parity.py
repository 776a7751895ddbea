"""The original's golden tensors: logits, image tokens, registers and every gradient, in fp32, unfused and fused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sdpnet import SdPNet
from sdpnet.original import INDEX_BUFFERS, config_from_original, from_original, to_original

FILES = sorted((Path(__file__).parents[1] / "parity").glob("*.safetensors"))


def golden(path):
    """(model options, state dict, the rest of the tensors)."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    rest = {k: v for k, v in tensors.items() if not k.startswith("state.")}
    config = config_from_original(json.loads(metadata["config"]), registers=int(metadata["registers_used"]))
    return config, state, rest


def test_all_three_files_are_there():
    assert len(FILES) == 3


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path, fused):
    config, state, want = golden(path)
    model = SdPNet(config, fused=fused)
    model.load_state_dict(from_original(state, config))
    image_tokens, registers = model.forward_features(want["input"])
    logits = model(want["input"])
    logits.square().sum().backward()

    assert registers.shape[1] == config.registers
    got = {
        "logits": logits,
        "image_tokens": image_tokens.transpose(1, 2).unflatten(2, config.grid),
        "registers": registers,
    }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    got |= {f"grad.{name}": grad for name, grad in to_original(gradients, config, shapes).items()}

    assert set(got) | {"input"} == set(want)
    assert {k for k in state if f"grad.{k}" not in got} == set(state) & set(INDEX_BUFFERS)
    largest = max(float(tensor.abs().max()) for name, tensor in want.items() if name.startswith("grad."))
    errors = {}
    for name, tensor in got.items():
        assert tensor.shape == want[name].shape, name
        error = float((tensor.detach() - want[name]).abs().max())
        errors[name] = error / max(float(want[name].abs().max()), 1e-3 * largest)
    worst = max(errors, key=errors.get)
    print(f"{path.stem}: worst {worst} {errors[worst]:.2e}")
    assert errors[worst] <= 1e-5, (worst, errors[worst])
