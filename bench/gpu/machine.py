"""What differs between a GPU and a rehearsal: the clock, waiting, free memory, graph capture, and nothing else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from torch import Tensor

import bench.harness
import bench.measure
from bench import environment, peers
from bench.measure import CudaClock

from .part import Setting

MADE_UP = 1.0
"""Seconds that every call takes in a rehearsal; no kernel does, so nobody takes it for a measurement."""
LARGE = {False: 2**31, True: 2**12}
"""Elements above which 32-bit offsets fail, and what stands for it in a rehearsal."""


class MadeUpClock:
    """Runs the call and claims that it took ``MADE_UP`` seconds. In the place of CUDA's events in a rehearsal."""

    def __init__(self) -> None:
        self._calls = 0

    def run(self, call: Callable[[], object]) -> object:
        self._calls += 1
        return call()

    def take(self) -> list[float]:
        spans, self._calls = [MADE_UP] * self._calls, 0
        return spans


def clock(setting: Setting) -> CudaClock | MadeUpClock:
    """Events on a GPU."""
    return MadeUpClock() if setting.rehearsal else CudaClock()


def synchronise(setting: Setting) -> None:
    if not setting.rehearsal:
        torch.cuda.synchronize()


def free_memory(setting: Setting) -> int:
    """Bytes that a case may take."""
    return 2**28 if setting.rehearsal else torch.cuda.mem_get_info()[0]


@contextlib.contextmanager
def stand_ins(setting: Setting) -> Iterator[None]:
    """In a rehearsal: a made-up clock, no cache and one round for the benchmark, no compiler behind torch.compile."""
    if not setting.rehearsal:
        yield
        return
    traced = functools.partial(torch.compile, backend="aot_eager")
    with (
        patch.object(bench.harness, "CpuClock", MadeUpClock),
        patch.object(bench.measure, "last_level_cache", lambda: (0, "none (rehearsal)")),
        patch.object(bench.measure, "LEAST_ROUNDS", 1),
        patch.object(bench.measure, "BLOCK", 1),
        patch.object(torch, "compile", traced),
    ):
        yield


def captured(setting: Setting, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """(replay, the tensors that a replay fills): ``step`` in a CUDA graph. A rehearsal calls it and copies."""
    if setting.rehearsal:
        results = step()

        def replay() -> None:
            for kept, new in zip(results, step()):
                kept.copy_(new)

        return replay, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


def describe(setting: Setting) -> dict:
    """The environment block of every file, with what other libraries are here."""
    found = environment.describe()
    found["peers"] = {p.name: p.version if p.reason is None else f"no: {p.reason}" for p in _peers(setting)}
    return found


def _peers(setting: Setting) -> list[peers.Peer]:
    return [] if setting.rehearsal else peers.survey(setting.device)
