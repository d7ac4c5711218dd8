"""Adaptation: which parameters train and how, decided by an ordered table of rules.

Each path is covered by exactly one rule, the first whose pattern matches all of it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from rich.table import Table

from vlm_jax.config import Rule
from vlm_jax.errors import ConfigError

Leaf = TypeVar("Leaf")

CATCH_ALL = ".*"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The table, applied to a model's parameters.

    Attributes:
      rules: the table.
      rule_of: index of the rule that covers each path.
      shapes: shape and dtype of each path.
    """

    rules: tuple[Rule, ...]
    rule_of: Mapping[str, int]
    shapes: Mapping[str, jax.ShapeDtypeStruct]

    def rule(self, path: str) -> Rule:
        """The rule that covers `path`."""
        return self.rules[self.rule_of[path]]

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` changes in training."""
        return self.rule(path).mode != "frozen"

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
        return {path: self.rule(path).weight_decay for path in self.rule_of if self.trains(path)}


def plan(flat: Mapping[str, Any], rules: Sequence[Rule]) -> Plan:
    """Applies `rules` to parameters by path.

    Args:
      flat: arrays or ShapeDtypeStructs by path.
      rules: the adaptation table, in order.

    Raises:
      ConfigError: a path that no rule matches, a rule that covers nothing (other than a final
        ".*"), a pattern that is no regular expression, or a table that trains nothing.
    """
    patterns = [_compile(rule) for rule in rules]
    rule_of = {}
    for path in flat:
        matches = (index for index, pattern in enumerate(patterns) if pattern.fullmatch(path))
        rule_of[path] = next(matches, None)
    missed = [path for path, index in rule_of.items() if index is None]
    if missed:
        raise ConfigError(
            f"config.adaptation: no rule matches {missed[0]!r} (and {len(missed) - 1} others); "
            'add a rule for it, or Rule(".*") at the end'
        )
    _refuse_idle_rules(rules, patterns, rule_of)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    applied = Plan(tuple(rules), rule_of, shapes)
    if not applied.lr:
        raise ConfigError('config.adaptation freezes every parameter; expected one "full" rule')
    return applied


def _compile(rule: Rule) -> re.Pattern:
    try:
        return re.compile(rule.pattern)
    except re.error as error:
        raise ConfigError(
            f"config.adaptation: {rule.pattern!r} is no regular expression: {error}"
        ) from error


def _refuse_idle_rules(rules, patterns, rule_of: Mapping[str, int]) -> None:
    """A rule that covers nothing is a typing error, or stands below a wider one."""
    for index, (rule, pattern) in enumerate(zip(rules, patterns, strict=True)):
        if index in rule_of.values() or rule.pattern == CATCH_ALL:
            continue
        taken = [path for path in rule_of if pattern.fullmatch(path)]
        if not taken:
            raise ConfigError(
                f"config.adaptation: rule {rule.pattern!r} matches no parameter; paths look like "
                f"{next(iter(rule_of))!r} and the pattern must match all of one"
            )
        earlier = rules[rule_of[taken[0]]].pattern
        raise ConfigError(
            f"config.adaptation: rule {rule.pattern!r} never holds, because {earlier!r} stands "
            f"above it and matches {taken[0]!r} first; move it up"
        )


def table(plan: Plan, lr: float, state_bytes: Mapping[str, int]) -> Table:
    """The plan for people: a line per rule.

    Args:
      plan: what to show.
      lr: peak learning rate of the run.
      state_bytes: what the optimizer and the average keep for each trainable path.
    """
    shown = Table("group", "mode", "tensors", "parameters", "share", "state", "learning rate")
    shown.columns[0].overflow = "fold"
    for column in shown.columns[2:]:
        column.justify = "right"
    sizes = {path: math.prod(shape.shape) for path, shape in plan.shapes.items()}
    total = sum(sizes.values())
    for index, rule in enumerate(plan.rules):
        paths = [path for path, covered_by in plan.rule_of.items() if covered_by == index]
        count, trains = sum(sizes[path] for path in paths), rule.mode != "frozen"
        shown.add_row(
            rule.pattern,
            rule.mode,
            str(len(paths)),
            f"{count:,}",
            f"{count / total:.1%}",
            readable(sum(state_bytes.get(path, 0) for path in paths)),
            f"{lr * rule.lr:.2e}" if trains else "-",
        )
    trained = sum(sizes[path] for path in plan.lr)
    shown.add_section()
    shown.add_row(
        "trainable",
        "",
        str(len(plan.lr)),
        f"{trained:,}",
        f"{trained / total:.1%}",
        readable(sum(state_bytes.values())),
        "",
    )
    shown.add_row("all", "", str(len(sizes)), f"{total:,}", "100.0%", "", "")
    return shown


def readable(size: float) -> str:
    """Bytes for people, e.g. "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
