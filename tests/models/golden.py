"""The golden files of tests/parity, read."""

import json
from pathlib import Path

from safetensors import safe_open

from sdpnet.original import config_from_original

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
