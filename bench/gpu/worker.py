"""The process that cases run in: reads a request per line, answers with a line. ``python -m bench.gpu.worker``

A request names a function of a module; it is called with the setting and its arguments. Whatever the code under test
prints goes to stderr. A fault of the GPU makes the whole process useless; the answer then says "poisoned".
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from .part import Failure, Setting, Unavailable

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ("CUDA error", "AcceleratorError", "CUDNN_STATUS")
KEEP = 2**31
"""Bytes of GPU memory that a worker keeps between cases; asking for it anew takes longer than most of them."""


def scrubbed(text: str) -> str:
    """Text without this machine's folders: results are published."""
    places = {str(ROOT): ".", sys.prefix: "<python>", sys.base_prefix: "<python>", tempfile.gettempdir(): "<tmp>"}
    places[str(Path.home())] = "~"
    for place, name in sorted(places.items(), key=lambda item: -len(item[0])):
        if len(place) > 1:
            text = text.replace(place, name)
    return text


def _settle() -> None:
    """Wait for the GPU, so that a fault is blamed on the case that caused it, and give the memory back."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > KEEP:
            gc.collect()
            torch.cuda.empty_cache()


def tells_of_fault(text: str) -> bool:
    """Whether an error's text is that of a fault that makes the process useless."""
    return "out of memory" not in text and any(sign in text for sign in FAULTS)


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
    return scrubbed(f"{type(error).__name__}: {str(error).strip()[:1500]}{place}")


def answer(request: dict) -> dict:
    """Call what the request names; every outcome is an answer."""
    reply: dict = {"status": "ok", "result": None, "error": None, "poisoned": False}
    try:
        module, _, function = request["call"].partition(":")
        arguments = request.get("arguments", {})
        reply["result"] = getattr(importlib.import_module(module), function)(Setting(**request["setting"]), **arguments)
        _settle()
    except Failure as failure:
        reply.update(status="failed", error=scrubbed(str(failure)), result=failure.result)
    except Unavailable as reason:
        reply.update(status="unavailable", error=scrubbed(str(reason)))
    except Exception as error:
        poisoned = tells_of_fault(f"{type(error).__name__}: {error}")
        reply.update(status="error", error=_told(error), result=None, poisoned=poisoned)
        error.__traceback__ = None  # which holds tensors
    if reply["status"] != "ok":
        try:
            _settle()
        except Exception as error:
            reply.update(status="error", error=f"{reply['error']}; then {_told(error)}", poisoned=True)
    return reply


def mend_interpreter() -> None:
    """Triton's interpreter calculates with bf16's bits, and slowly; the tests know how to mend both."""
    folder = ROOT / "tests" / "triton" / "interpreted"
    if os.environ.get("TRITON_INTERPRET") != "1" or not folder.exists():
        return
    for name in ("bfloat16", "language"):
        found = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        module.install()


def main() -> None:
    mend_interpreter()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            text = json.dumps(answer(json.loads(line)), allow_nan=False)
        except (TypeError, ValueError) as error:
            text = json.dumps({"status": "error", "result": None, "error": _told(error), "poisoned": False})
        answers.write(text + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
