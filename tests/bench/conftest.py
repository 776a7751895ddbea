"""Synthetic results, so that the logic of the benchmark is tested without measuring anything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, ROOT)


def row(contender: str, median: float, **changes) -> dict:
    """A row of a result: 1 MB moved at 1 GB/s copy bandwidth, so that the floor is 1 ms."""
    made = {
        "operator": "kelu",
        "shape": [2, 3],
        "dtype": "float32",
        "layout": "contiguous",
        "registers": 0,
        "pass": "forward",
        "device": "cpu",
        "contender": contender,
        "kind": "ours" if contender == "ours" else "peer",
        "median": median,
        "error": 1e-7,
        "bytes": 1_000_000,
        "floor": 1e-3,
        "time_over_floor": median / 1e-3,
    }
    if contender == "ours":
        made |= {"noise": 0.01, "best_peer": "torch", "ratio_to_best_peer": 2.5}
    return made | changes


def result(*rows: dict, **changes) -> dict:
    """A result file's content around rows."""
    return {
        "benchmarks": [{"group": "case", "name": r["contender"], "extra_info": r} for r in rows],
        "machine_info": {"processor": {"name": "Some CPU"}, "threads": 2, "cores": 4, "torch": "2.99"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "not_timed": [],
        "peers": [],
    } | changes


@pytest.fixture
def make_row() -> Callable[..., dict]:
    return row


@pytest.fixture
def make_result() -> Callable[..., dict]:
    return result
