"""A tiny recipe on the digits, so that whole runs take a second or two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdpnet.settings import read_overrides, read_preset, resolve
from sdpnet.train import Trainer

TINY = [
    "run.threads=1",
    "model.dim=16",
    "model.heads=2",
    "model.blocks=1",
    "model.conv_blocks=1",
    "model.patch_size=4",
    "model.dropout=0.2",
    "model.drop_path=0.2",
    "data.batch_size=400",  # 1,437 samples: three whole steps and a short one
    "data.micro_batch=150",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "checkpoint.every_epochs=2",
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """tiny("optim.lr=1", …) → Config of the digits preset, made small, with these settings over it."""
    return lambda *settings: (
        resolve(("preset", read_preset("digits")), ("test", read_overrides([*TINY, *settings]))).config
    )


@pytest.fixture(scope="session")
def tiny_words():
    """The same as words of a command line."""
    return list(TINY)


@pytest.fixture
def trainer(tiny, tmp_path):
    """trainer("optim.lr=1", …, folder=…) → Trainer in a folder of its own."""

    def make(*settings: str, folder: Path | None = None) -> Trainer:
        folder = folder or tmp_path / "run"
        folder.mkdir(parents=True, exist_ok=True)
        return Trainer(tiny(*settings), folder)

    return make
