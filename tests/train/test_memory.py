"""A process that trains on the CPU keeps the memory that it frees."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

import sdpnet
from sdpnet import memory

pytest.importorskip("resource")

ALLOCATION = """
import resource, torch
from sdpnet.memory import keep_memory
told = keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(told), min(faults() for _ in range(12)))
"""
TRAINING = """
import resource, statistics, sys
from sdpnet import memory, train
told, keep, step, faults = [], train.keep_memory, train.train_step, []
train.keep_memory = lambda: told.append(sys.argv[1] == "keep" and keep())
def counted(*args, **options):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loss = step(*args, **options)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return loss
train.train_step = counted
assert train.main(sys.argv[2:]) == 0 and len(told) == 1
print(int(told[0]), int(statistics.median(faults[5:])))
"""


def faults_of(script: str, *words: str) -> tuple[bool, int]:
    """(whether the C library was told, page faults) of a script in a process of its own."""
    root = Path(sdpnet.__file__).parents[1]
    command = [sys.executable, "-c", script, *words]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told, faults = map(int, ran.stdout.splitlines()[-1].split())
    return bool(told), faults


def test_freed_memory_is_not_fetched_again():
    """At least once of several times: a heap may have another place for the same size.

    64 MiB are beyond what glibc ever keeps by itself.
    """
    told, faults = faults_of(ALLOCATION)
    if not told:
        pytest.skip("the C library cannot be told")  # not glibc: there is nothing to test
    assert faults < 64 * 2**20 / mmap.PAGESIZE / 10


def test_training_steps_fetch_next_to_no_memory(tiny_words, tmp_path):
    """After the first few steps, and far less than without: then it is thousands of pages a step."""
    words = [*tiny_words, "model.dim=64", "data.batch_size=160", "data.micro_batch=0", "run.device=cpu"]
    told, kept = faults_of(TRAINING, "keep", *words, "--out", str(tmp_path / "keep"))
    if not told:
        pytest.skip("the C library cannot be told")
    _, default = faults_of(TRAINING, "default", *words, "--out", str(tmp_path / "default"))
    assert kept < default / 20


def test_on_arm_nothing_is_told(monkeypatch):
    """PyTorch asks another allocator there; a C library told to keep everything would change nothing but itself."""
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name))
    for machine in ("aarch64", "arm64"):
        monkeypatch.setattr(memory.platform, "machine", lambda machine=machine: machine)
        assert memory.keep_memory() is False
    assert not asked


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch, error):
    def refuse(_name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert memory.keep_memory() is False
