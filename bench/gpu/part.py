"""What a part is. To add one, put a file into ``parts/`` with the names below; nothing else needs to know of it.

ORDER: int                 its place; lower runs first
TITLE: str                 one line for --list
BUDGET: int                seconds after which no further case is begun
PARALLEL: int = 1          worker processes at most; 1 where anything is timed
PARTIAL: bool = False      whether the result of a case that failed counts in the summary too
RESULT: schema             of what ``run`` returns (schema.py)
cases(setting) -> [Item]   runs in a worker of each of the setting's variants
run(setting, **arguments) -> dict     runs one case, in a worker; may raise Failure or Unavailable
summary(results, setting) -> dict     optional: {"lines": [text], …} of the records that are ok
files(file, setting) -> {name: text}  optional: what else belongs into the folder, never written in a rehearsal
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType

VARIANTS = ("plain", "interpreter")


class Failure(Exception):
    """What was checked is wrong. ``result`` is kept all the same."""

    def __init__(self, message: str, result: dict | None = None):
        super().__init__(message)
        self.result = result


class Unavailable(Exception):
    """The case cannot be run here; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """Where a case runs. ``facts`` is what earlier parts found out, by part."""

    rehearsal: bool = False
    variant: str = "plain"
    facts: dict = field(default_factory=dict)
    prebuilt: bool = False
    """A library that is there and can be loaded need not be built again."""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def variants(self) -> tuple[str, ...]:
        """Triton's kernels run on a CPU in its interpreter only, which a process is or is not."""
        return VARIANTS if self.rehearsal else ("plain",)

    def of(self, variant: str) -> Setting:
        return replace(self, variant=variant)

    def json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Item:
    """One case. ``timeout``: seconds; ``alone``: when no other worker runs; ``again``: also when a record is there;
    ``renew``: what it did, workers see only when started anew; ``group``: of cases that one broken kernel would crash
    or hang all alike, and which are left out when they have cost too much (runner.py); ``instead``: arguments to try
    one after the other when the case lost its process, so that what crashed does not take the rest with it."""

    id: str
    arguments: dict = field(default_factory=dict)
    timeout: float = 120.0
    variant: str = "plain"
    alone: bool = False
    again: bool = False
    renew: bool = False
    group: str = ""
    instead: list[dict] = field(default_factory=list)


def all_parts(package: str = "bench.gpu.parts") -> dict[str, ModuleType]:
    """Name → module of every file in the folder, in order."""
    folder = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(folder)]
    return {module.__name__.rpartition(".")[2]: module for module in sorted(modules, key=lambda m: m.ORDER)}


def listed(setting: Setting, module: str) -> list[dict]:
    """A part's cases as JSON, for the process that hands them out."""
    return [asdict(item) for item in importlib.import_module(module).cases(setting)]


def loaded(setting: Setting, module: str) -> None:
    """Imports a module, which takes its time in a new process and should not count as a case's."""
    importlib.import_module(module)
