"""A schema check by hand, so that nothing needs to be installed for it.

A schema is a type (``str``, ``float`` takes whole numbers too), a tuple of alternatives, also ``None``, a list of one
schema, a dict of field name → schema (a name ending in "?" may be missing, "*" stands for any other), or ``any``.
"""

from __future__ import annotations

import math


class SchemaError(ValueError):
    """A value does not have the wanted form; the message says where, what came and what is wanted."""


def describe(schema: object) -> str:
    """The schema in a few words."""
    if schema is None:
        return "null"
    if isinstance(schema, type):
        return schema.__name__
    if isinstance(schema, tuple):
        return " or ".join(describe(s) if not isinstance(s, str) else repr(s) for s in schema)
    return {list: "a list", dict: "an object"}.get(type(schema), repr(schema))


def _fits(value: object, schema: object) -> bool:
    try:
        check(value, schema)
    except SchemaError:
        return False
    return True


def check(value: object, schema: object, where: str = "value") -> None:
    """Raise SchemaError unless ``value`` has the form ``schema``. Numbers must be finite."""
    wrong = SchemaError(f"{where} is {value!r:.80}, wanted is {describe(schema)}")
    if schema is any:
        return
    if isinstance(schema, tuple):
        if not any(_fits(value, s) for s in schema):
            raise wrong
    elif isinstance(schema, dict):
        if not isinstance(value, dict):
            raise wrong
        fields = {name.rstrip("?"): inner for name, inner in schema.items() if name != "*"}
        for name in schema:
            if not name.endswith("?") and name != "*" and name not in value:
                raise SchemaError(f"{where} has no field {name!r}")
        for name, inner in value.items():
            if name not in fields and "*" not in schema:
                raise SchemaError(f"{where} has an unknown field {name!r}; known are {', '.join(fields)}")
            check(inner, fields.get(name, schema.get("*")), f"{where}.{name}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise wrong
        for i, inner in enumerate(value):
            check(inner, schema[0], f"{where}[{i}]")
    elif schema is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise wrong
    elif isinstance(schema, type):
        if not isinstance(value, schema) or (schema is int and isinstance(value, bool)):
            raise wrong
    elif value != schema or type(value) is not type(schema):
        raise wrong
