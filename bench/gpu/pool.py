"""Worker processes as their owner sees them: asked, timed out, found dead, replaced."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .part import Setting
from .worker import scrubbed

ROOT = Path(__file__).resolve().parents[2]
START = 180.0
"""Seconds for a new worker to import what it needs: torch from a cold disk, say."""


class Crashed(Exception):
    """The process ended without an answer; the message has its exit status and its last words."""


class TimedOut(Exception):
    """No answer within the case's time; the process was ended."""


def environment(setting: Setting) -> dict[str, str]:
    """Of a worker: this checkout first, no backend forced, and in a rehearsal no GPU."""
    ours = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SDP_KERNELS_BACKEND")}
    ours["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Where none is named, Inductor names one of its own once it has compiled something, and what Triton then compiled
    # for one worker another one would not find.
    ours.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    if setting.variant == "interpreter":
        ours["TRITON_INTERPRET"] = "1"
    if setting.rehearsal:
        ours |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return ours


class Worker:
    """One process. ``ask`` raises Crashed or TimedOut, after which it is of no more use."""

    def __init__(self, setting: Setting):
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self.alive = True
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.worker"],
            cwd=ROOT,
            env=environment(setting),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # so that what it starts can be ended with it
        )

    def _last_words(self) -> str:
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 2000))
        return scrubbed(self._said.read().decode("utf-8", "replace").strip())

    def ask(self, request: dict, timeout: float) -> dict:
        pipe, line = self._process.stdout, b""
        deadline = time.monotonic() + timeout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            while b"\n" not in self._pending:
                if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    self.close()
                    raise TimedOut(f"no answer within {timeout:.0f} s")
                chunk = os.read(pipe.fileno(), 1 << 16)
                if not chunk:
                    raise BrokenPipeError
                self._pending += chunk
        except BrokenPipeError:
            code = self._process.wait()
            cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            words = self._last_words()
            self.close()
            raise Crashed(f"the process ended with {cause}; its last words: {words}") from None
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the process and all that it started."""
        if not self.alive:
            return
        self.alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError):
                pipe.close()


class Crew:
    """At most one worker per variant, started when first asked and again after one is lost."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def ask(self, call: str, setting: Setting, arguments: dict | None = None, timeout: float = 120.0) -> dict:
        """The worker's answer (worker.py); a crash or a timeout is an answer too."""

        def request(call: str, arguments: dict) -> dict:
            return {"call": call, "setting": setting.json(), "arguments": arguments}

        worker = self._workers.get(setting.variant)
        try:
            if worker is None:
                worker = self._workers[setting.variant] = Worker(setting)
                worker.ask(request("bench.gpu.part:loaded", {"module": call.partition(":")[0]}), START)
            reply = worker.ask(request(call, arguments or {}), timeout)
        except (Crashed, TimedOut) as end:
            status = "crashed" if isinstance(end, Crashed) else "timeout"
            reply = {"status": status, "result": None, "error": str(end), "poisoned": True}
        if reply["poisoned"]:
            self.dismiss(setting.variant)
        return reply

    def dismiss(self, *variants: str) -> None:
        """End the workers of these variants, of all if none is named."""
        for variant in variants or tuple(self._workers):
            worker = self._workers.pop(variant, None)
            if worker is not None:
                worker.close()
