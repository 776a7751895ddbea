"""Checkpoints that are either whole or not there.

    run folder/
      model.safetensors  ema.safetensors       the newest checkpoint's weights (hard links where possible)
      checkpoints/step-00000123/
        model.safetensors  ema.safetensors     weights and averages, loadable on their own
        optimizer.safetensors                  AdamW's moments and step counts, by parameter name
        state.json                             where the run stands, and the sha256 of the three files above

A checkpoint is written into a hidden temporary folder, flushed to the disk and renamed. On reading every file is
checked against its sha256 first, and a file that is missing, cut short or changed is refused by name before any
weight is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sdpnet.models.files import file_metadata

MODEL_FILES = ("model.safetensors", "ema.safetensors")  # load_model reads each on its own
TENSOR_FILES = (*MODEL_FILES, "optimizer.safetensors")
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint is missing, broken or does not belong to this model; the message names the file."""


@dataclass
class Progress:
    """Where a run stands. position: steps done in ``epoch``; loss_sum, samples: of this epoch so far; rows: metrics
    of the epochs before.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    loss_sum: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    best: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------- files
def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is never seen half-written: temporary file, fsync, rename. Its OSErrors name the file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's own error names none
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _link_atomically(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU. Raises CheckpointError naming a file that is missing or broken."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path} is broken: its content is not what was written (sha256 differs)")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is broken: {error}") from error


# ---------------------------------------------------------------------------------------------------- write
def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"exp_avg.<parameter>": …} of an optimizer made by optim.build_optimizer."""
    return {
        f"{key}.{name}": value
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state[p].items()
    }


def save(
    run: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> Path:
    """Writes run/checkpoints/step-N, makes it the run's model.safetensors and ema.safetensors, and removes all but
    ``keep``.
    """
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    for unfinished in folder.parent.glob(".step-*.tmp"):  # of a run that was killed, or whose disk was full
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary.mkdir(parents=True)
    contents = (model.state_dict(), ema.state_dict(), optimizer_tensors(optimizer))
    hashes = {}
    for name, tensors in zip(TENSOR_FILES, contents, strict=True):
        metadata = file_metadata(model.config) if name in MODEL_FILES and hasattr(model, "config") else None
        data = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
        hashes[name] = hashlib.sha256(data).hexdigest()
        write_atomically(temporary / name, data)
    state = {"format": FORMAT, "sha256": hashes, "progress": asdict(progress)}
    write_atomically(temporary / "state.json", json.dumps(state, indent=1).encode())
    # the same step again (an interrupted run that was resumed and stopped at once) is the same content: replace it
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    _sync_folder(folder.parent)
    for name in MODEL_FILES:
        _link_atomically(folder / name, run / name)
    for outdated in list_checkpoints(run)[:-keep]:
        shutil.rmtree(outdated, ignore_errors=True)
    return folder


# ---------------------------------------------------------------------------------------------------- read
def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    found = {path: path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")}
    return sorted((path for path, number in found.items() if number.isdecimal()), key=lambda path: int(found[path]))


def newest(run: Path) -> Path:
    """The newest checkpoint of a run folder; a checkpoint folder itself is returned as it is."""
    if (run / "state.json").is_file():
        return run
    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {run / 'checkpoints'}: the run ended before its first; to start again, move {run} away"
        )
    return found[-1]


def load(folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Reads and checks a whole checkpoint folder, then fills model, ema and optimizer.

    Raises CheckpointError, touching nothing.
    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
        hashes, progress = state["sha256"], Progress(**state["progress"])
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {state['format']}, this version reads {FORMAT}")
        tensors = [read_tensors(folder / name, hashes[name]) for name in TENSOR_FILES]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is broken: {error!r}") from error
    moments = _optimizer_state(tensors[2], optimizer, folder / TENSOR_FILES[2])
    for module, content, name in zip((model, ema), tensors[:2], MODEL_FILES, strict=True):
        check_fits(module, content, folder / name)
    model.load_state_dict(tensors[0])
    ema.load_state_dict(tensors[1])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def check_fits(module: nn.Module, content: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError when names or shapes in a file are not the module's."""
    wanted = module.state_dict()
    wrong = [f"{k} missing" for k in wanted.keys() - content.keys()] + [
        f"{k} unknown" for k in content.keys() - wanted.keys()
    ]
    wrong += [
        f"{k} has shape {tuple(content[k].shape)}, the model's has {tuple(wanted[k].shape)}"
        for k in wanted.keys() & content.keys()
        if content[k].shape != wanted[k].shape
    ]
    if wrong:
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(sorted(wrong)[:5])}")


def _optimizer_state(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, path: Path) -> dict[int, Any]:
    """AdamW's state by index; a parameter that never had a gradient has none."""
    names = [name for group in optimizer.param_groups for name in group["names"]]
    kinds = ("step", "exp_avg", "exp_avg_sq")
    state = {
        i: {kind: tensors[f"{kind}.{name}"] for kind in kinds}
        for i, name in enumerate(names)
        if all(f"{kind}.{name}" in tensors for kind in kinds)
    }
    if len(tensors) != len(kinds) * len(state):
        raise CheckpointError(f"{path} does not fit the model: it has moments of other parameters")
    return state
