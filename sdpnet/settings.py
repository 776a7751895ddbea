"""How a configuration comes about: preset < file < command line, every key checked, every value with its origin.

Each layer is flat, {"section.key": value}. A key that no section knows is an error that names the nearest right one; a
value is converted by the annotation of its key (so the string '1e-5' becomes a float where a float is wanted) and
refused when it is NaN, infinite or out of range.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sdpnet import models
from sdpnet.config import SECTIONS, Config, ConfigError, Model


# ---------------------------------------------------------------------------------------------------- layers
class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-5 is a number, and a key that stands twice is an error."""


_Loader.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands twice", node.start_mark)
    return {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error


def flatten(tree: Any, origin: str) -> dict[str, Any]:
    """{"optim": {"lr": 1}} → {"optim.lr": 1}, checking that the tree has exactly sections and keys."""
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: wanted sections with keys, got {tree!r}")
    flat = {}
    for section, values in tree.items():
        if section not in SECTIONS:
            raise ConfigError(f"{origin}: {_unknown(str(section))}")
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{origin}: section {section!r} wants keys, got {values!r}")
        flat.update({f"{section}.{key}": value for key, value in (values or {}).items()})
    return flat


def preset_names() -> list[str]:
    return sorted(
        p.name[: -len(".yaml")] for p in (resources.files("sdpnet") / "presets").iterdir() if p.name.endswith(".yaml")
    )


def read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"preset: no {name!r}, there are: {', '.join(preset_names())}{hint}")
    text = (resources.files("sdpnet") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return flatten(_parse(text, f"preset {name}"), f"preset {name}")


def read_file(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read configuration {path}: {error}") from error
    return flatten(_parse(text, str(path)), str(path))


def read_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """["optim.lr=1e-3", …] → {"optim.lr": 0.001, …}"""
    flat = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"override {argument!r}: wanted section.key=value")
        flat[key] = _parse(text, argument)
    return flat


# ---------------------------------------------------------------------------------------------------- resolution
@dataclasses.dataclass(frozen=True)
class Resolved:
    """A configuration and where each of its values came from."""

    config: Config
    origins: dict[str, str]

    def describe(self) -> str:
        """A valid YAML file of every value, each with its origin as a comment."""
        values = {
            key: yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]
            for key, value in dump(self.config).items()
        }
        lines, section = [], ""
        for key, text in values.items():
            head, _, name = key.partition(".")
            if head != section:
                lines.append(f"{head}:")
                section = head
            lines.append(f"{f'  {name}: {text}':<40}  # {self.origins[key]}")
        return "\n".join(lines) + "\n"


def dump(config: Config) -> dict[str, Any]:
    """All values as {"section.key": plain Python value}."""
    return {f"{s}.{k}": v for s, keys in config.model_dump(mode="json").items() for k, v in keys.items()}


def resolve(*layers: tuple[str, Mapping[str, Any]]) -> Resolved:
    """Puts layers (origin, {"section.key": value}) over the defaults, later ones first in rank, and checks the
    result.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in layers:
        for key in values:
            _check_key(key, origin)
        merged.update(values)
        origins.update(dict.fromkeys(values, origin))
    tree: dict[str, dict[str, Any]] = {}
    for key, value in merged.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    _fill_model(tree.setdefault("model", {}), origins)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, origins) for item in error.errors())) from None
    _check_together(config)
    return Resolved(config, {key: origins.get(key, "default") for key in dump(config)})


def _check_key(key: str, origin: str) -> None:
    section, dot, name = key.partition(".")
    if not dot or section not in SECTIONS or (name not in SECTIONS[section].model_fields and section != "model"):
        raise ConfigError(f"{origin}: {_unknown(key)}")


def _unknown(key: str) -> str:
    section, _, name = key.partition(".")
    known = [f"{s}.{k}" for s, cls in SECTIONS.items() for k in cls.model_fields]
    same_leaf = [k for k in known if k.rpartition(".")[2] == (name or section)]
    in_section = (
        [f"{section}.{k}" for k in difflib.get_close_matches(name, SECTIONS[section].model_fields, 1)]
        if section in SECTIONS
        else []
    )
    leaf = difflib.get_close_matches(name or section, [k.rpartition(".")[2] for k in known], 1)
    by_leaf = [k for k in known if leaf and k.rpartition(".")[2] == leaf[0]]
    near = in_section or same_leaf or difflib.get_close_matches(key, [*known, *SECTIONS], 1, 0.75) or by_leaf
    hint = f"did you mean {near[0]!r}?" if near else f"sections: {', '.join(SECTIONS)}"
    if section in SECTIONS and section != "model":
        hint += f" (section {section!r} has: {', '.join(SECTIONS[section].model_fields)})"
    return f"unknown key {key!r}; {hint}"


def _explain(item: Any, origins: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in item["loc"][:2])
    origin = origins.get(key)
    got = "" if isinstance(item.get("input"), dict) else f": got {item.get('input')!r}"
    return f"{key}{got}{f' ({origin})' if origin else ''}: {item['msg'].removeprefix('Value error, ')}"


def _check_together(config: Config) -> None:
    low, high = config.data.crop_scale
    if not low <= high <= 1.0:
        raise ConfigError(f"data.crop_scale: got {(low, high)}, wanted low ≤ high ≤ 1")
    if config.data.source == "folder" and config.data.path is None:
        raise ConfigError("data.path: data.source=folder needs the folder that holds train/ and val/")
    if config.schedule.warmup_epochs >= config.schedule.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs: got {config.schedule.warmup_epochs:g}, "
            f"wanted less than schedule.epochs = {config.schedule.epochs}"
        )


# ---------------------------------------------------------------------------------------------------- model options
FROM_DATA = ("num_classes", "in_channels", "image_size")  # taken from the data set unless the configuration sets them


def _fill_model(section: dict[str, Any], origins: dict[str, str]) -> None:
    """Checks the model's options as the model itself does, and adds those that its name stands for."""
    name = section.get("name", Model().name)
    given = {key: value for key, value in section.items() if key != "name"}
    try:
        base = models.model_config(name)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.name ({origins.get('model.name', 'default')}): {error}") from None
    options = typing.get_type_hints(type(base))
    for key, value in given.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, 1)
            hint = f"did you mean 'model.{near[0]}'?" if near else f"the model has: {', '.join(options)}"
            raise ConfigError(f"{origins[f'model.{key}']}: unknown key 'model.{key}'; {hint}")
        if isinstance(value, bool):
            continue  # for the model to judge: pydantic would make a number of it
        try:
            given[key] = TypeAdapter(options[key], config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            raise ConfigError(
                f"model.{key}: got {value!r} ({origins[f'model.{key}']}): {error.errors()[0]['msg']}"
            ) from None
    try:
        whole = base.replace(**given).to_dict()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None
    for key, value in whole.items():
        if key in given or key not in FROM_DATA:
            section[key] = value
            origins.setdefault(f"model.{key}", f"model {name}")
