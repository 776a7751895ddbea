"""Reads checkpoints of the original SdP-Net and writes ours: ``python -m sdpnet.convert SRC DST``.

SRC is a .safetensors file, or a .pt/.pth file of ``torch.save`` (read with ``weights_only=True``: nothing in it is
run): a state dict, or a dict with one under "model_state_dict" or "state_dict". The original's options come from the
file ("model_config" or "config"; in safetensors the metadata's "config" as JSON), or from ``--config``, a JSON or YAML
file with them at its top or under "model_config". Prefixes ``module.`` and ``_orig_mod.`` are dropped.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .models import SdPNet, SdPNetConfig
from .models.files import METADATA_KEY, check_destination, read_safetensors, save_model
from .original import config_from_original, from_original

__all__ = ["convert", "main", "read_checkpoint", "read_options"]

_PREFIXES = ("module.", "_orig_mod.")
_STATE_KEYS = ("model_state_dict", "state_dict")
_CONFIG_KEYS = ("model_config", "config")


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(state dict with plain names, the original's options or None).

    :raises FileNotFoundError: no such file.
    :raises ValueError: not a checkpoint; names the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        if METADATA_KEY in metadata:
            raise ValueError(f"{path} is a model of sdpnet already: sdpnet.load_model reads it as it is")
        options = _json(metadata["config"], f"{path}: metadata 'config'") if "config" in metadata else None
    else:
        state, options = _unpack(_torch_load(path), path)
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}, a tensor is wanted")
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        plain[name] = tensor
    return plain, options


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects beside tensors and plain values, which are not loaded from a file of unknown origin "
            f"(the original's trainer stores its options so); save its state dict alone and give --config: {error}"
        ) from None
    except Exception as error:  # over arbitrary bytes PyTorch's unpickler raises whatever comes up
        raise ValueError(f"{path} is not a whole PyTorch checkpoint: {error}") from None


def _unpack(loaded: Any, path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, a dict of tensors is wanted")
    for key in _STATE_KEYS:
        if isinstance(loaded.get(key), Mapping):
            options = next((loaded[k] for k in _CONFIG_KEYS if loaded.get(k)), None)
            return loaded[key], None if options is None else dict(options)
    return loaded, None


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping of options, got {type(value).__name__}")
    return value


def read_options(path: str | Path) -> dict[str, Any]:
    """The original's options from a JSON or YAML file, at its top or under "model_config"."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist or is not a file")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither JSON nor YAML: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("model_config"), dict):
        value = value["model_config"]
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping of options, got {type(value).__name__}")
    return value


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    registers: int | None = None,
    grid: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> SdPNetConfig:
    """Converts a file; nothing is written unless every weight fits.

    :param options: the original's options; None reads them from ``source``.
    :param registers: how many registers the model was used with; None = what the original's forward does by default
        (4, or all there are if fewer).
    :param grid: rows and columns of tokens that the model was used with; None = as many as its embedding tables hold.
    :param overwrite: allows ``destination`` to exist.
    :returns: the options of the model written.
    :raises ValueError, TypeError, OSError: naming the file, option or tensors at fault.
    """
    destination = Path(destination)
    check_destination(destination, overwrite)
    state, found = read_checkpoint(source)
    if options is None:
        options = found
    if options is None:
        raise ValueError(f"{source} does not hold the model's options; give them as a JSON or YAML file (--config)")
    config = config_from_original(options, registers=registers, grid=grid)
    converted = {k: v.float() for k, v in from_original(state, config).items()}
    with torch.device("meta"):
        SdPNet(config).load_state_dict(converted, assign=True)  # the whole of it and nothing else, or an error
    save_model(converted, config, destination, overwrite=overwrite)
    return config


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sdpnet.convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="SRC", help="the original's checkpoint: .safetensors, .pt or .pth")
    parser.add_argument("destination", metavar="DST", help="file to write, for example model.safetensors")
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML with the original's model options")
    parser.add_argument("--registers", type=int, metavar="R", help="registers the model was used with (default 4)")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("H", "W"), help="token grid it was used with")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    given = parser.parse_args(arguments)
    try:
        config = convert(
            given.source, given.destination, overwrite=given.overwrite, registers=given.registers,
            options=None if given.config is None else read_options(given.config),
            grid=None if given.grid is None else tuple(given.grid),
        )  # fmt: skip
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    height, width = config.image_size
    size = f"{config.blocks} blocks, dim {config.dim}, {config.registers} registers, {height}×{width} px"
    print(f"{given.destination}: {size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
