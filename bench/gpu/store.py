"""The result file of a part: written whole and atomically after every case, checked when read, resumed when it fits.

A rehearsal's file can't pass for a measured one: it has another format name, says so in ``rehearsal`` and ``warning``,
and :func:`load` refuses it unless asked for a rehearsal.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from .schema import SchemaError, check

ROOT = Path(__file__).resolve().parents[2]
FORMAT = {False: "sdp_kernels.bench.gpu/1", True: "sdp_kernels.bench.gpu/1 REHEARSAL"}
WARNING = "A rehearsal on a CPU with made-up times: nothing in this file was measured."
STATUSES = ("ok", "failed", "unavailable", "error", "crashed", "timeout")
RECORD = {"id": str, "status": STATUSES, "seconds": float, "result": (None, {"*": any}), "error": (None, str)}
FILE = {
    "format": tuple(FORMAT.values()),
    "rehearsal": bool,
    "warning": (None, WARNING),
    "part": str,
    "code": str,
    "environment": {"*": any},
    "planned": [str],
    "complete": bool,
    "summary": (None, {"lines": [str], "*": any}),
    "records": [RECORD],
}


class StoreError(ValueError):
    """A result file cannot be used; the message names it and says why."""


def code_fingerprint(root: Path = ROOT) -> str:
    """Of the sources that decide a result, committed or not."""
    digest = hashlib.sha256()
    for folder, endings in (("sdp_kernels", {".py", ".json"}), ("csrc", None), ("bench", {".py"})):
        for path in sorted((root / folder).rglob("*")):
            if path.name.startswith("_build_report") or "__pycache__" in path.parts or not path.is_file():
                continue
            if endings is None or path.suffix in endings:
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """The file is either the old one or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def as_text(content: dict, texts: dict[str, str]) -> str:
    """JSON with one line per field and per record, so that differences can be read. ``texts``: of records, by id; made
    once, because a part has thousands and is written after each."""
    lines = [f'  "{key}": {json.dumps(value, allow_nan=False)}' for key, value in content.items() if key != "records"]
    for record in content["records"]:
        if record["id"] not in texts:
            texts[record["id"]] = json.dumps(record, allow_nan=False)
    records = ",\n".join("    " + texts[record["id"]] for record in content["records"])
    return "{\n" + ",\n".join([*lines, '  "records": [\n' + records + "\n  ]"]) + "\n}\n"


def load(path: str | Path, *, rehearsal: bool = False, result: object = None) -> dict:
    """A result file, checked against the schema (and its results against ``result``). Raises StoreError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StoreError(f"{path}: is not JSON: {error}") from None
    try:
        check(content, FILE, "file")
        if (content["format"], content["warning"]) != (
            FORMAT[content["rehearsal"]],
            WARNING if content["rehearsal"] else None,
        ):
            raise SchemaError("file: format, rehearsal and warning contradict each other")
        for i, record in enumerate(content["records"]):
            if (record["status"] == "ok") != (record["error"] is None):
                raise SchemaError(f"file.records[{i}] is {record['status']} and its error is {record['error']!r}")
            if result is not None and record["status"] == "ok":
                check(record["result"], result, f"file.records[{i}].result")
    except SchemaError as error:
        raise StoreError(f"{path}: {error}") from None
    if content["rehearsal"] != rehearsal:
        was, wanted = (("a rehearsal", "a measured result"), ("a measured result", "a rehearsal"))[rehearsal]
        raise StoreError(f"{path}: is {was}, wanted is {wanted}")
    return content


class Store:
    """The file of one part, open for adding records.

    Raises StoreError where the folder holds results of other code, of another GPU, or of the other kind.
    """

    def __init__(self, folder: Path, part: str, *, rehearsal: bool, environment: dict, code: str, fresh: bool = False):
        self.path = folder / f"{part}.json"
        self._texts: dict[str, str] = {}
        self.content = {
            "format": FORMAT[rehearsal],
            "rehearsal": rehearsal,
            "warning": WARNING if rehearsal else None,
            "part": part,
            "code": code,
            "environment": environment,
            "planned": [],
            "complete": False,
            "summary": None,
            "records": [],
        }
        if self.path.exists() and not fresh:
            before = load(self.path, rehearsal=rehearsal)
            gpu = [(c["environment"].get("gpu") or {}).get("name") for c in (before, self.content)]
            if before["code"] != code:
                raise StoreError(f"{self.path}: was made with other sources; use --fresh or another --out")
            if gpu[0] != gpu[1]:
                raise StoreError(f"{self.path}: was made on {gpu[0]}, this is {gpu[1]}; --out names another folder")
            self.content["records"] = before["records"]

    def plan(self, ids: list[str], discard: set[str]) -> None:
        """What the part consists of; records of anything else, and those to be done anew, are dropped."""
        self.content["planned"] = ids
        wanted = set(ids) - discard
        self.content["records"] = [r for r in self.content["records"] if r["id"] in wanted]
        self._texts.clear()
        self._write()

    @property
    def done(self) -> set[str]:
        return {record["id"] for record in self.content["records"]}

    @property
    def complete(self) -> bool:
        return self.done == set(self.content["planned"])

    def add(self, record: dict) -> None:
        check(record, RECORD, "record")
        self.content["records"].append(record)
        self._write()

    def summarise(self, summary: dict | None) -> None:
        self.content["summary"] = summary
        self._write()

    def _write(self) -> None:
        order = {name: i for i, name in enumerate(self.content["planned"])}
        self.content["records"].sort(key=lambda record: order[record["id"]])
        self.content["complete"] = self.complete
        write_atomically(self.path, as_text(self.content, self._texts))
