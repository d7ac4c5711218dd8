"""Stages: runs that follow each other, each the same config with some of its fields changed.

A stage changes the config and not the stage before it: what a stage trains is read in two places,
and stays the same where another one is changed, left out or moved.
"""

import ast
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from vlm_jax import schema
from vlm_jax.config.checks import check
from vlm_jax.config.tree import Config, Stage
from vlm_jax.errors import ConfigError

NAME = re.compile(r"[a-z0-9_-]+")
BASELINE = "eval.text_only_steps"
OWN = ("name", "stages")  # what stages cannot change


def walked(config: Config) -> tuple[Config, ...]:
    """The config of every stage, in order, each without stages; of one without them itself alone.

    `init` of a stage after the first holds what its changes name beside the last stage. The
    text-only baseline is the last stage's, and another's where its changes ask for it.

    Raises:
      ConfigError: a stage's name is none, or stands for two; it changes what is not there; or its
        values contradict each other. Names the stage.
    """
    if not config.stages:
        return (config,)
    _check_names([stage.name for stage in config.stages])
    base = schema.plain(dataclasses.replace(config, stages=()))
    return tuple(
        _resolved(base, stage, first=i == 0, last=i == len(config.stages) - 1)
        for i, stage in enumerate(config.stages)
    )


def _resolved(base: dict[str, Any], stage: Stage, first: bool, last: bool) -> Config:
    tree = base | {"name": f"{base['name']}-{stage.name}"}
    if not first:
        tree["init"] = ()
    if not last:
        tree = _put(tree, BASELINE, 0)
    try:
        for path, value in stage.changes.items():
            if path.partition(".")[0] in OWN:
                raise ConfigError(f"{path} is no field that a stage can change")
            tree = _put(tree, path, schema.plain(value))
        found = schema.typed(Config, tree, "config")
        check(found)
        _check_init(found, first)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.name!r}: {error}") from error
    return found


def one_stage(config: Config, name: str = "") -> Config:
    """The config of a stage by its name, by default of the last one.

    Raises:
      ConfigError: there is no such stage.
    """
    names = [stage.name for stage in config.stages]
    if name and name not in names:
        raise ConfigError(f"{config.name} has no stage {name!r}; it has: {_known(names)}")
    return walked(config)[names.index(name) if name else -1]


def _known(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _check_names(names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if not NAME.fullmatch(name) or name in names[:i]:
            raise ConfigError(
                f"config.stages[{i}].name is {name!r}; expected a name of its own of lower-case "
                'letters, digits, "_" and "-"'
            )


def _check_init(config: Config, first: bool) -> None:
    whole = [init.folder for init in config.init if not init.part]
    if whole and not first:
        raise ConfigError(
            f"config.init takes the whole model from {whole[0]}; expected parts of it, as all else "
            "comes from the last stage"
        )


def _put(tree: Any, path: str, value: Any) -> Any:
    """A copy of a tree with another value at a dotted path."""

    def put(tree: Any, names: list[str]) -> Any:
        if not names:
            return value
        name, *rest = names
        if isinstance(tree, Mapping) and (name in tree or not rest):
            return {**tree, name: put(tree.get(name), rest)}
        if isinstance(tree, tuple) and name.isdigit() and int(name) < len(tree):
            place = int(name)
            return (*tree[:place], put(tree[place], rest), *tree[place + 1 :])
        raise ConfigError(schema.unknown_key(f"config.{path}", schema.paths(Config, "config")))

    return put(tree, path.split("."))


def in_stages(
    name: str, **stages: Mapping[str, Any] | ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """A config that walks others, which are stated as what differs between them.

    Args:
      name: of the config.
      **stages: the config of each stage by its name, as files of configs/ return them.
    """
    trees = [ml_collections.ConfigDict(stage).to_dict() for stage in stages.values()]
    differing = [path for path in _differing(trees) if path not in OWN]
    listed = tuple(
        schema.plain(Stage(stage, {path: _at(tree, path) for path in differing}))
        for stage, tree in zip(stages, trees, strict=True)
    )
    return ml_collections.ConfigDict(trees[-1] | {"name": name, "stages": listed})


def _differing(trees: Sequence[Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths at which trees differ, as deep as all of them have the same keys."""
    first = trees[0]
    if all(tree == first for tree in trees):
        return
    alike = all(isinstance(tree, Mapping) and tree.keys() == first.keys() for tree in trees)
    if not alike or any("." in key for key in first):
        yield prefix
        return
    for key in first:
        yield from _differing([tree[key] for tree in trees], f"{prefix}.{key}" if prefix else key)


def _at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def overridden(config: Config, said: Iterable[str]) -> Config:
    """The config with further changes of single stages, checked.

    Args:
      config: a run in stages.
      said: each "STAGE.FIELD=VALUE", e.g. "align.train.steps=100"; a value that is no Python
        literal is a string.

    Raises:
      ConfigError: there is no such stage or field, or a value does not fit.
    """
    stages = {stage.name: stage for stage in config.stages}
    for each in said:
        target, equals, text = each.partition("=")
        name, dot, path = target.partition(".")
        if not (equals and dot) or name not in stages:
            raise ConfigError(
                f"--stage={each}; expected STAGE.FIELD=VALUE, where the stages of "
                f"{config.name} are: {_known(stages)}"
            )
        changes = {**stages[name].changes, path: schema.plain(_literal(text))}
        stages[name] = Stage(name, changes)
    found = dataclasses.replace(config, stages=tuple(stages.values()))
    walked(found)
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def refuse_hidden(config: Config, paths: Iterable[str]) -> None:
    """Raises ConfigError where a stage has its own value for a field that was overridden.

    Args:
      config: the run.
      paths: of the overrides, as the command line has them: "train.steps", 'data.mixture["a:b"]'.
    """
    for path in paths:
        dotted = re.sub(r"\[[\"']?([^\]\"']*)[\"']?\]", r".\1", path)
        for stage in config.stages:
            hidden = [known for known in stage.changes if _overlap(known, dotted)]
            if hidden and not dotted.startswith("stages."):
                raise ConfigError(
                    f"--config.{path} would not hold in the stage {stage.name!r}, which has a "
                    f"{hidden[0]} of its own; say it for each stage that it is meant for: "
                    f"--stage={stage.name}.{dotted}=..."
                )


def _overlap(a: str, b: str) -> bool:
    """Whether one path is the other or part of it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
