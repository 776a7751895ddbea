"""A model in one file: weights with the options that they belong to, as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import SdPNetConfig
from .sdpnet import SdPNet

METADATA_KEY = "sdpnet_config"


def check_destination(path: Path, overwrite: bool) -> None:
    """Raises before any work when ``path`` cannot be written: FileExistsError, FileNotFoundError, IsADirectoryError."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, a file name is wanted")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; it is replaced only when asked to (overwrite)")


def file_metadata(config: SdPNetConfig) -> dict[str, str]:
    """What a safetensors file says beside the weights, so that :func:`load_model` can build the model.

    One key: safetensors writes several in random order, and equal models should be equal files.
    """
    return {METADATA_KEY: json.dumps(config.to_dict())}


def save_model(state: Mapping[str, Tensor], config: SdPNetConfig, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes ``state`` with ``config`` in the file's metadata: to a temporary file beside it first, then renamed."""
    path = Path(path)
    check_destination(path, overwrite)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(safetensors.torch.save(tensors, file_metadata(config)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata); ValueError naming the file when it is no whole safetensors file."""
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def load_model(path: str | Path, *, fused: bool = False) -> SdPNet:
    """The model that :func:`save_model` wrote, on the CPU.

    :raises FileNotFoundError: no such file.
    :raises ValueError: a broken file, one without options or with unknown ones, or one whose weights don't fit them.
    """
    state, metadata = read_safetensors(path)
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} holds no {METADATA_KEY!r} in its metadata; it was written neither by save_model nor by the trainer"
        )
    try:
        config = SdPNetConfig.from_dict(json.loads(metadata[METADATA_KEY]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its options are none that this version knows: {error}") from None
    with torch.device("meta"):
        model = SdPNet(config, fused=fused)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None
    return model
