"""Checks of model options: each names the option, says what came and what is wanted, and returns the cleaned value."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Message for a name that is not among ``known``, with the nearest right one first."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})"


def known_keys(kind: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises TypeError when a key of ``given`` is not in ``known``."""
    known = list(known)
    for key in given:
        if key not in known:
            raise TypeError(unknown_name(kind, key, known))


def choice(name: str, value: object, options: Iterable[str]) -> str:
    """``value`` if it is one of ``options``, else ValueError."""
    options = list(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(unknown_name(f"value for {name}:", value, options))
    return value


def integer(name: str, value: object, least: int) -> int:
    """An int ≥ ``least``; TypeError for anything else than an integer, ValueError below."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def number(name: str, value: object) -> float:
    """A finite float; TypeError for anything that is no number, ValueError for NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def positive(name: str, value: object) -> float:
    """A finite float > 0."""
    value = number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be greater than 0, got {value!r}")
    return value


def rate(name: str, value: object) -> float:
    """A probability in [0, 1)."""
    value = number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return value


def flag(name: str, value: object) -> bool:
    """A bool and nothing else."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def pair(name: str, value: object, least: int) -> tuple[int, int]:
    """(height, width), or one integer for both."""
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError(f"{name} must be one integer or (height, width), got {value!r}")
        return integer(f"{name}[0]", value[0], least), integer(f"{name}[1]", value[1], least)
    side = integer(name, value, least)
    return side, side
