"""Runs the cases of a part that have no record yet, in workers, within the time there is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from .part import Item, Setting
from .pool import Crew
from .schema import SchemaError, check
from .store import Store
from .worker import tells_of_fault

LOSS = 10.0
"""Seconds that a lost process costs at least: its successor has to start."""
WELL = "  ok "
GRACE = 30.0
"""Seconds that a case which was begun in time may go on for after that; then it is ended and left to the next run."""
PATIENCE = 100.0
"""Seconds that a group's cases may cost by losing their process; what is left of the group is left out then."""


@dataclass(frozen=True)
class Deadline:
    """When no further case is begun."""

    end: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def earlier(self, seconds: float) -> Deadline:
        return Deadline(min(self.end, time.monotonic() + seconds))

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end

    @property
    def left(self) -> float:
        """Seconds that a case which is begun now may take."""
        return max(0.0, self.end - time.monotonic()) + GRACE


@dataclass
class Outcome:
    """What became of a part."""

    part: str
    counts: dict[str, int] = field(default_factory=dict)
    planned: int = 0
    new: int = 0
    seconds: float = 0.0
    trouble: str | None = None
    """Why its cases could not even be listed."""

    @property
    def complete(self) -> bool:
        return self.trouble is None and sum(self.counts.values()) == self.planned

    @property
    def well(self) -> bool:
        return self.trouble is None and not any(n for s, n in self.counts.items() if s not in ("ok", "unavailable"))

    def line(self) -> str:
        """The outcome in one line."""
        counted = ", ".join(f"{n} {status}" for status, n in sorted(self.counts.items())) or "nothing done"
        rest = self.planned - sum(self.counts.values())
        more = f"; {rest} to go, run it again" if rest else ""
        return f"{self.part}: {self.trouble or counted + more} ({self.new} new in {self.seconds:.0f} s)"


MOST_TOLD = 12


def digest(records: list[dict], items: list[Item]) -> list[str]:
    """What did not end well, a line for each group and status: how many, and the first of them with its reason."""
    groups = {item.id: item.group or item.id for item in items}
    bad: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        if record["status"] not in ("ok", "unavailable"):
            bad.setdefault((groups.get(record["id"], record["id"]), record["status"]), []).append(record)
    told = [
        f"{len(few)} × {status} in {group}: {few[0]['id']}{_reason(few[0])}" for (group, status), few in bad.items()
    ]
    more = [f"and {len(told) - MOST_TOLD} more such groups"] if len(told) > MOST_TOLD else []
    return [*told[:MOST_TOLD], *more]


class Losses:
    """What cases that crashed, hung, or left the GPU unusable have cost, by group."""

    def __init__(self, records: list[dict], items: list[Item]):
        self._groups = {item.id: item.group for item in items}
        self._seconds: dict[str, float] = {}
        self._last: dict[str, str] = {}
        for record in records:
            self.note(record)

    def note(self, record: dict) -> None:
        """Count the record, if its case lost its process."""
        lost = record["status"] in ("crashed", "timeout") or tells_of_fault(record["error"] or "")
        if lost and (group := self._groups.get(record["id"])):
            self._seconds[group] = self._seconds.get(group, 0.0) + max(LOSS, record["seconds"])
            self._last[group] = record["id"]

    def reason(self, item: Item) -> str | None:
        """Why the item is not worth another process; None where it is."""
        cost = self._seconds.get(item.group, 0.0)
        if not item.group or cost < PATIENCE:
            return None
        told = f"{item.group}: crashes and hangs took {cost:.0f} s, the last one in {self._last[item.group]}"
        return f"left out: {told}; --retry tries again"


def list_cases(part: ModuleType, setting: Setting, crew: Crew) -> list[Item]:
    """All cases, each variant's from a worker of its kind. Raises RuntimeError where a worker can't tell."""
    items: list[Item] = []
    for variant in setting.variants:
        reply = crew.ask("bench.gpu.part:listed", setting.of(variant), {"module": part.__name__})
        if reply["status"] != "ok":
            raise RuntimeError(f"its cases could not be listed: {reply['error']}")
        mark = f" ({variant})" if variant != "plain" else ""
        items += [Item(**item | {"id": item["id"] + mark}) for item in reply["result"]]
    twice = {item.id for item in items if sum(other.id == item.id for other in items) > 1}
    if twice:
        raise RuntimeError(f"cases of the same name: {', '.join(sorted(twice))}")
    return items


def run_item(part: ModuleType, item: Item, setting: Setting, crew: Crew, deadline: Deadline) -> dict | None:
    """The record of one case; failed, with what the rest found, where it only got through without a part of it. None
    where there was no time for it."""
    start, lost = time.monotonic(), None
    for arguments in (item.arguments, *item.instead):
        timeout = min(item.timeout, deadline.left)
        reply = crew.ask(f"{part.__name__}:run", setting.of(item.variant), arguments, timeout)
        if reply["status"] == "timeout" and timeout < item.timeout:
            return None
        if not reply["poisoned"]:
            break
        lost = reply
    if lost and reply["status"] == "ok":
        reply |= {"status": "failed", "error": f"a part of it had to be left out: {lost['error']}"}
    if item.renew:
        crew.dismiss()
    if reply["status"] == "ok":
        try:
            check(reply["result"], part.RESULT, "result")
        except SchemaError as error:
            reply.update(status="error", error=f"the part broke its own schema: {error}", result=None)
    record = {key: reply[key] for key in ("status", "result", "error")}
    return {"id": item.id, "seconds": round(time.monotonic() - start, 3), **record}


def run_part(
    part: ModuleType,
    store: Store,
    setting: Setting,
    deadline: Deadline,
    *,
    retry: bool = False,
    only: str = "",
    brief: bool = False,
    crew: Crew | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run what is missing until done or out of time. ``retry``: also what did not end well before; ``only``: cases
    with these words in their name; ``brief``: nothing is said of cases that end well; ``crew``: workers that outlive
    the part, instead of its own.

    A case that fails, crashes or hangs becomes a record, and the part goes on. Interrupting loses what is in flight.
    """
    outcome, start = Outcome(store.content["part"]), time.monotonic()
    crew, keep = crew or Crew(), crew is not None
    deadline = deadline.earlier(part.BUDGET)
    try:
        try:
            items = list_cases(part, setting, crew)
        except RuntimeError as error:
            outcome.trouble = str(error)
            return outcome
        again = {item.id for item in items if item.again}
        if retry:
            again |= {r["id"] for r in store.content["records"] if r["status"] not in ("ok", "unavailable")}
        # What was unavailable may have become possible.
        again |= {r["id"] for r in store.content["records"] if r["status"] == "unavailable"}
        store.plan([item.id for item in items], again)
        words = only.split()
        todo = [i for i in items if i.id not in store.done and all(word in i.id for word in words)]
        losses = Losses(store.content["records"], items)
        told = (lambda line: None if line.startswith(WELL) else say(line)) if brief else say
        _work(part, store, setting, deadline, crew, todo, losses, outcome, told)
        for line in digest(store.content["records"], items):
            say(f"  ! {line}")
        outcome.planned = len(items)
    finally:
        if not keep:
            crew.dismiss()
    for record in store.content["records"]:
        outcome.counts[record["status"]] = outcome.counts.get(record["status"], 0) + 1
    _summarise(part, store, setting, outcome)
    outcome.seconds = time.monotonic() - start
    return outcome


def _work(part, store, setting, deadline, crew, todo: list[Item], losses: Losses, outcome: Outcome, say) -> None:
    lock, stop = threading.Lock(), threading.Event()

    def loop(queue: list[Item], crew: Crew) -> None:
        while not stop.is_set():
            with lock:
                if not queue or deadline.over:
                    return
                item = queue.pop(0)
                useless = losses.reason(item)
            if useless:
                record: dict | None = {
                    "id": item.id,
                    "status": "unavailable",
                    "seconds": 0.0,
                    "result": None,
                    "error": useless,
                }
            else:
                record = run_item(part, item, setting, crew, deadline)
            if stop.is_set() or record is None:
                return  # ended from outside, which is no finding about the case
            with lock:
                store.add(record)
                outcome.new += 1
                if not useless:
                    losses.note(record)
                say(f"  {record['status']:<11} {record['seconds']:7.1f} s  {item.id}" + _reason(record))

    shared, alone = ([item for item in todo if item.alone is is_alone] for is_alone in (False, True))
    hands = min(getattr(part, "PARALLEL", 1), max(1, (os.cpu_count() or 1) - 1), max(1, len(shared)))
    crews = [crew, *(Crew() for _ in range(hands - 1))]
    threads = [threading.Thread(target=loop, args=(shared, c), daemon=True) for c in crews[1:]]
    try:
        for thread in threads:
            thread.start()
        loop(shared, crew)
        for thread in threads:
            thread.join()
        for other in crews[1:]:
            other.dismiss()
        loop(alone, crew)
    finally:
        stop.set()
        for other in crews[1:]:
            other.dismiss()


def _reason(record: dict) -> str:
    return f": {record['error'].splitlines()[0][:160]}" if record["error"] else ""


def _summarise(part: ModuleType, store: Store, setting: Setting, outcome: Outcome) -> None:
    summary = getattr(part, "summary", None)
    if summary is None:
        return
    counted = ("ok", "failed") if getattr(part, "PARTIAL", False) else ("ok",)
    records = [r for r in store.content["records"] if r["status"] in counted and r["result"]]
    good = {record["id"]: record["result"] for record in records}
    try:
        store.summarise(summary(good, setting))
    except Exception as error:  # the records are worth more than their summary
        store.summarise(None)
        outcome.trouble = f"its summary failed: {type(error).__name__}: {error}"
