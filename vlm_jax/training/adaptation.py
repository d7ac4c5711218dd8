"""Adaptation: which parameters train and how, decided by an ordered table of rules.

Each path is covered by exactly one rule, the first whose pattern matches all of it.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from rich.table import Table

from vlm_jax.config import Config, Rule
from vlm_jax.errors import ConfigError, StorageError
from vlm_jax.models import adapters, params
from vlm_jax.models.adapters import Spec

Leaf = TypeVar("Leaf")

CATCH_ALL = ".*"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The table, applied to a model's parameters.

    Attributes:
      rules: the table.
      rule_of: index of the rule that covers each path; that of a kernel covers its adapter too.
      shapes: shape and dtype of each path, adapters' leaves included.
      adapters: of the kernels that have one, by their paths.
    """

    rules: tuple[Rule, ...]
    rule_of: Mapping[str, int]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    adapters: Mapping[str, Spec] = dataclasses.field(default_factory=dict)

    def rule(self, path: str) -> Rule:
        """The rule that covers `path`."""
        return self.rules[self.rule_of[path]]

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` changes in training."""
        if adapters.is_leaf(path):
            return not path.endswith(f"/{adapters.SCALE}")
        return self.rule(path).mode == "full"

    def split(self, flat: Mapping[str, Leaf]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
        """(trainable, frozen) of anything keyed by path."""
        trainable = {path: leaf for path, leaf in flat.items() if self.trains(path)}
        frozen = {path: leaf for path, leaf in flat.items() if not self.trains(path)}
        return trainable, frozen

    @property
    def lr(self) -> dict[str, float]:
        """Factor on the learning rate of each trainable path."""
        return {path: self.rule(path).lr for path in self.rule_of if self.trains(path)}

    @property
    def weight_decay(self) -> dict[str, float]:
        """Factor on the weight decay of each trainable path."""
        biases = (adapters.DOWN_BIAS, adapters.UP_BIAS)
        return {
            path: 0.0 if path.endswith(biases) else self.rule(path).weight_decay
            for path in self.rule_of
            if self.trains(path)
        }

    @property
    def dropout(self) -> dict[str, float]:
        """Rate of each adapter's dropout, by path of its kernel."""
        return {path: self.rule(path).dropout for path in self.adapters}


def of(config: Config) -> Plan:
    """The plan of a run; see `plan`."""
    model = config.model
    return plan(params.abstract(model), config.adaptation, params.linears(model))


def plan(
    flat: Mapping[str, Any], rules: Sequence[Rule], linears: Mapping[str, int] | None = None
) -> Plan:
    """Applies `rules` to parameters by path.

    Args:
      flat: arrays or ShapeDtypeStructs by path.
      rules: the adaptation table, in order.
      linears: the kernels that adapters can stand beside, as `params.linears` gives them.

    Raises:
      ConfigError: a path that no rule matches, a rule that covers nothing (other than a final
        ".*"), a pattern that is no regular expression, or a table that trains nothing.
    """
    linears = linears or {}
    patterns = [_compile(rule) for rule in rules]
    rule_of = {}
    for path in flat:
        matches = (
            index
            for index, rule in enumerate(rules)
            if patterns[index].fullmatch(path) and (path in linears or not rule.adapts)
        )
        rule_of[path] = next(matches, None)
    missed = [path for path, index in rule_of.items() if index is None]
    if missed:
        raise ConfigError(
            f"config.adaptation: no rule matches {missed[0]!r} (and {len(missed) - 1} others); "
            'add a rule for it, or Rule(".*") at the end'
        )
    _refuse_idle_rules(rules, patterns, rule_of, linears)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    specs = {
        path: Spec(rule.rank, rule.scale, rule.mode == "dora", rule.mode == "bottleneck")
        for path in flat
        if (rule := rules[rule_of[path]]).adapts
    }
    for path, spec in specs.items():
        stacked = "/stack/blocks/" in path
        leaves = adapters.shapes(spec, shapes[path], linears[path], stacked)
        own = {adapters.beside(path, name): leaf for name, leaf in leaves.items()}
        shapes, rule_of = shapes | own, rule_of | dict.fromkeys(own, rule_of[path])
    applied = Plan(tuple(rules), rule_of, shapes, specs)
    if not applied.lr:
        raise ConfigError("config.adaptation freezes every parameter; expected a rule that trains")
    return applied


def _compile(rule: Rule) -> re.Pattern:
    try:
        return re.compile(rule.pattern)
    except re.error as error:
        raise ConfigError(
            f"config.adaptation: {rule.pattern!r} is no regular expression: {error}"
        ) from error


def _refuse_idle_rules(rules, patterns, rule_of: Mapping[str, int], linears) -> None:
    """A rule that covers nothing is a typing error, or stands below a wider one."""
    for index, (rule, pattern) in enumerate(zip(rules, patterns, strict=True)):
        if index in rule_of.values() or (rule.pattern == CATCH_ALL and not rule.adapts):
            continue
        candidates = linears if rule.adapts else rule_of
        taken = [path for path in candidates if pattern.fullmatch(path)]
        if not taken:
            kind = "kernel of a linear layer" if rule.adapts else "parameter"
            raise ConfigError(
                f"config.adaptation: rule {rule.pattern!r} matches no {kind}; paths look like "
                f"{next(iter(candidates), 'none')!r} and the pattern must match all of one"
            )
        earlier = rules[rule_of[taken[0]]].pattern
        raise ConfigError(
            f"config.adaptation: rule {rule.pattern!r} never holds, because {earlier!r} stands "
            f"above it and matches {taken[0]!r} first; move it up"
        )


class Group(NamedTuple):
    """What a rule covers.

    Attributes:
      pattern, mode, rank, lr: of the rule; the learning rate at its peak, 0 where nothing trains.
      tensors, parameters: covered, adapters included.
      trained: parameters that train.
      state_bytes: what the optimizer and the average keep for them.
    """

    pattern: str
    mode: str
    rank: int
    tensors: int
    parameters: int
    trained: int
    state_bytes: int
    lr: float


def groups(plan: Plan, lr: float, state_bytes: Mapping[str, int]) -> list[Group]:
    """The plan in figures, rule by rule.

    Args:
      plan: what to show.
      lr: peak learning rate of the run.
      state_bytes: what the optimizer and the average keep for each trainable path.
    """
    found = []
    for index, rule in enumerate(plan.rules):
        paths = [path for path, covered_by in plan.rule_of.items() if covered_by == index]
        sizes = {path: math.prod(plan.shapes[path].shape) for path in paths}
        trained = sum(size for path, size in sizes.items() if plan.trains(path))
        kept = sum(state_bytes.get(path, 0) for path in paths)
        rate = lr * rule.lr if trained else 0.0
        figures = len(paths), sum(sizes.values()), trained, kept, rate
        found.append(Group(rule.pattern, rule.mode, rule.rank, *figures))
    return found


def table(groups: Sequence[Group]) -> Table:
    """The groups for people: a line per rule, and sums."""
    names = "group", "mode", "tensors", "parameters", "trained", "share", "state", "learning rate"
    shown = Table(*names)
    shown.columns[0].overflow = "fold"
    for column in shown.columns[2:]:
        column.justify = "right"
    total = sum(group.parameters for group in groups)

    def figures(tensors: int, parameters: int, trained: int, kept: int) -> tuple[str, ...]:
        share = f"{trained / max(total, 1):.1%}"
        return str(tensors), f"{parameters:,}", f"{trained:,}", share, readable(kept)

    for group in groups:
        mode = f"{group.mode} {group.rank}" if group.rank else group.mode
        rate = f"{group.lr:.2e}" if group.lr else "-"
        shown.add_row(group.pattern, mode, *figures(*group[3:7]), rate)
    shown.add_section()
    sums = (sum(column) for column in zip(*(group[3:7] for group in groups), strict=True))
    shown.add_row("all", "", *figures(*sums), "")
    return shown


FILE = "adaptation.json"


def write(workdir: Path, groups: Sequence[Group]) -> None:
    """Writes the groups into a run's folder, a list of objects with the fields of `Group`.

    Raises:
      StorageError: the file cannot be written.
    """
    path = workdir / FILE
    try:
        path.write_text(json.dumps([group._asdict() for group in groups], indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def readable(size: float) -> str:
    """Bytes for people, e.g. "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
