"""bench.gpu's sanitizer part: what a log says, and what follows from it."""

from __future__ import annotations

import stat

import pytest

from bench.gpu import drive
from bench.gpu.part import Failure, Setting, Unavailable
from bench.gpu.parts import sanitizer

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at beyond+0x70
=========     Address 0x7f is out of bounds
========= ERROR SUMMARY: 32 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at kernel+0x1 and Read access at kernel+0x2 [8 hazards]
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


def test_a_sanitizers_log_is_read():
    errors, told = sanitizer.read_log(MEMCHECK)
    assert errors == 32 and told.startswith("Invalid __global__ write of size 4 bytes; at beyond")
    assert sanitizer.read_log(RACE)[0] == 2
    assert sanitizer.read_log("========= ERROR SUMMARY: 0 errors\n")[0] == 0
    assert sanitizer.read_log("========= Error: Device not supported\n")[0] is None


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    """Puts a compute-sanitizer on the PATH that writes ``log`` and ends with ``status``."""

    def make(log: str, status: int) -> None:
        (tmp_path / "text").write_text(log)
        program = tmp_path / "compute-sanitizer"
        program.write_text(
            f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\ncp "{tmp_path}/text" "$2"\nexit {status}\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return make


@pytest.mark.parametrize(
    "log, status, operator, ending",
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0, "kelu", None),
        (MEMCHECK, sanitizer.FOUND, "kelu", (Failure, "32 errors: Invalid __global__ write")),
        (MEMCHECK, sanitizer.FOUND, drive.CONTROL, None),
        ("========= ERROR SUMMARY: 0 errors\n", 0, drive.CONTROL, (Failure, "went unnoticed")),
        ("========= Error: Device not supported\n", 1, "kelu", (Unavailable, "can't work here")),
        ("", 0, "kelu", (Failure, "no verdict")),
    ],
)
def test_a_sanitizers_verdict_is_followed(fake_sanitizer, log, status, operator, ending):
    fake_sanitizer(log, status)
    arguments = {"tool": "memcheck", "operator": operator, "backend": "cuda"}
    if ending is None:
        assert sanitizer.run(Setting(), **arguments)["operator"] == operator
    else:
        with pytest.raises(ending[0], match=ending[1]):
            sanitizer.run(Setting(), **arguments)


def test_a_missing_sanitizer_is_a_reason(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    with pytest.raises(Unavailable, match="neither on the PATH"):
        sanitizer.run(Setting(), tool="memcheck", operator="kelu", backend="cuda")
