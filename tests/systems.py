"""The configs of published systems, and the parameters of their parts."""

import collections
import dataclasses
import functools
import importlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from configs import common
from vlm_jax import config as c
from vlm_jax import schema
from vlm_jax.models import params

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# Configs of no published system, without words.
OURS = ("captioner", "emoji", "siglip", "tiny")
FIRST = ("blip2:stage1",)  # of models without a decoder, which are no words of variants


def systems() -> list[str]:
    """Every config file that has words of variants, with every variant: "llava15:13b-align"."""
    return [
        f"{path.stem}:{variant}"
        for path in sorted(CONFIGS.glob("*.py"))
        if hasattr(_module(path.stem), "WORDS")
        for variant in common.variants(*_module(path.stem).WORDS)
    ]


def local() -> list[str]:
    """The same variants at sizes for a CPU, and those of FIRST."""
    return [f"{name}-local".replace(":-", ":") for name in [*systems(), *FIRST]]


def structures(names: Iterable[str]) -> list[str]:
    """One of those that differ in numbers alone, as to model and what of it trains."""
    found: dict[str, str] = {}
    for name in names:
        made = config(name)
        found.setdefault(repr((numberless(made.model), made.adaptation)), name)
    return list(found.values())


def numberless(value: Any) -> Any:
    """A tree without what its numbers are, and how often the same comes again; 0 often stands for
    a part that is not there."""
    if dataclasses.is_dataclass(value):
        return [numberless(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return list(dict.fromkeys(repr(numberless(v)) for v in value))
    return value > 0 if type(value) in (int, float) else value


def _module(file: str):
    return importlib.import_module(f"configs.{file}")


@functools.cache
def config(name: str) -> c.Config:
    """The resolved config "file:variant"."""
    file, _, variant = name.partition(":")
    return c.resolve(_module(file).get_config(variant))


@functools.cache
def counts(model: c.Model) -> dict[str, int]:
    """Parameters of "encoder" (all of them), "connector" and "decoder" (with what is fused)."""
    found = collections.Counter()
    for path, leaf in params.abstract(model).items():
        part = path.split("/")[0]
        found["encoder" if part == "extra_encoders" else part] += math.prod(leaf.shape)
    return dict(found)


def golden() -> dict[str, Any]:
    """What a golden file holds: each config as its difference from the defaults, those, and what is
    smaller in local variants."""
    defaults: dict[str, dict[str, Any]] = {}
    others = [f"{path.stem}:" for path in sorted(CONFIGS.glob("*.py")) if path.stem in OURS]
    names = [*systems(), *FIRST, *others]
    return {
        "configs": {name: _stated(config(name), defaults) for name in names},
        "defaults": defaults,
        "local": _local(),
    }


def _local() -> dict[str, dict[str, Any]]:
    """What differs between variants and those at sizes for a CPU, by the names of those alike; of
    those in stages nothing, as each stage is another variant."""
    alike: dict[str, list[str]] = {}
    for name, small in zip([*systems(), *FIRST], local(), strict=True):
        if config(name).stages:
            continue
        made = dict(_changed(*map(schema.plain, (config(name), config(small)))))
        alike.setdefault(json.dumps(made), []).append(name)
    return {" ".join(names): json.loads(made) for made, names in alike.items()}


def _changed(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of what differs, and the new values; of names, nothing."""
    if isinstance(new, dict):
        for key, value in new.items():
            yield from _changed(old[key], value, f"{path}.{key}".lstrip("."))
    elif isinstance(new, tuple) and any(isinstance(value, dict) for value in new):
        for place, (was, value) in enumerate(zip(old, new, strict=True)):
            yield from _changed(was, value, f"{path}.{place}")
    elif old != new and path != "name":
        yield path, new


def _stated(value: Any, defaults: dict[str, dict[str, Any]]) -> Any:
    """Plain data without the fields that have their default; notes the defaults by class."""
    if dataclasses.is_dataclass(value):
        known = {f.name: _default(f) for f in dataclasses.fields(value)}
        defaults.setdefault(
            type(value).__name__,
            {k: _plain(d) for k, d in known.items() if d is not dataclasses.MISSING},
        )
        given = {k: getattr(value, k) for k in known}
        found = {k: _stated(v, defaults) for k, v in given.items() if v != known[k] or k == "kind"}
        staged = isinstance(value, c.Config) and value.stages
        return found | ({"stages": _stages(value, defaults)} if staged else {})
    if isinstance(value, dict):
        return {k: _stated(v, defaults) for k, v in value.items()}
    return [_stated(v, defaults) for v in value] if isinstance(value, tuple) else value


def _stages(config: c.Config, defaults: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By stage what it changes, as the config that it resolves to has it."""
    return {
        stage.name: {path: _stated(_at(each, path), defaults) for path in stage.changes}
        for stage, each in zip(config.stages, c.walked(config), strict=True)
    }


def _at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = getattr(tree, name) if dataclasses.is_dataclass(tree) else tree[name]
    return tree


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(schema.plain(value)))
