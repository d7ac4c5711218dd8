"""Trees of frozen dataclasses from plain data, checked field by field, and back.

Annotations say what a value must be: numbers, strings, tuples, mappings, other dataclasses, and
unions of these, of which presets name theirs in their field `kind`; `Any` takes plain data.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError


def plain(tree: Any) -> Any:
    """Any part of a tree as plain data: dicts, tuples, numbers and strings."""
    if dataclasses.is_dataclass(tree):
        return {f.name: plain(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(plain(value) for value in tree)
    return tree


def typed(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `kind`.

    Raises:
      ConfigError: it is none; names the part, whose own name is `path`.
    """
    if kind is Any:
        return plain(value)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, types.UnionType) or origin is typing.Union:
        return typed(_member(arguments, value, path), value, path)
    if kind is types.NoneType:
        return None
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} is {value!r}; expected a list")
        inner = arguments if Ellipsis not in arguments else (arguments[0],) * len(value)
        if len(inner) != len(value):
            raise ConfigError(f"{path} has {len(value)} values; expected {len(inner)}")
        return tuple(
            typed(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; expected a dict")
        return {str(k): typed(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    return _scalar(kind, value, path)


def _member(members: tuple, value: Any, path: str) -> Any:
    """The type of a union that a value is meant for; presets say it in their field `kind`."""
    if value is None and types.NoneType in members:
        return types.NoneType
    presets = [member for member in members if dataclasses.is_dataclass(member)]
    if isinstance(value, Mapping) and presets:
        for preset in presets:
            if value.get("kind", preset.CHOICES["kind"][0]) in preset.CHOICES["kind"]:
                return preset
        kinds = [kind for preset in presets for kind in preset.CHOICES["kind"]]
        raise ConfigError(
            f"{path}.kind is {value.get('kind')!r}; expected one of {', '.join(kinds)}"
        )
    sequence = isinstance(value, (list, tuple))
    fitting = [m for m in members if (typing.get_origin(m) is tuple) == sequence]
    return next((m for m in fitting if m is not types.NoneType), members[0])


def _dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} is {value!r}; expected the fields of {kind.__name__}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in known:
            raise ConfigError(unknown_key(f"{path}.{key}", [f"{path}.{name}" for name in known]))
    required = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in value:
            raise ConfigError(f"{path}.{name} is missing; {kind.__name__} needs it")
    hints = typing.get_type_hints(kind)
    return kind(**{k: typed(hints[k], v, f"{path}.{k}") for k, v in value.items()})


def _scalar(kind: type, value: Any, path: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and whole:
        return float(value)
    if isinstance(value, kind) and (whole or kind is not int):
        return value
    raise ConfigError(f"{path} is {value!r}; expected {kind.__name__}")


def paths(kind: type, prefix: str) -> list[str]:
    """Dotted paths of all sections and fields of a tree, e.g. "config.train.steps"."""
    found = []
    for field in dataclasses.fields(kind):
        hint, path = typing.get_type_hints(kind)[field.name], f"{prefix}.{field.name}"
        found.append(path)
        for member in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(member) and typing.get_origin(hint) is not tuple:
                found += paths(member, path)
    return found


def unknown_key(key: str, known: typing.Iterable[str]) -> str:
    """The message for a key that no field answers to, naming the nearest known one."""
    known = list(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"unknown config key {key}{hint}"
