"""Adaptation: which parameters train and how, decided by an ordered table of rules.

Each path is covered by exactly one rule, the first whose pattern matches all of it.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from rich.table import Table

from vlm_jax.config import Config, Rule
from vlm_jax.errors import ConfigError, StorageError
from vlm_jax.models import adapters, params, quantised
from vlm_jax.models.adapters import Spec

Leaf = TypeVar("Leaf")

CATCH_ALL = ".*"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The table, applied to a model's parameters.

    Attributes:
      rules: the table.
      rule_of: index of the rule that covers each path; that of a kernel covers its adapter too.
      shapes: shape and dtype of each leaf, adapters' included; of a kernel that is held in few bits
        the leaves that stand for it.
      adapters: of the kernels that have one, by their paths.
      held: the kernels that are held in few bits, by their paths.
    """

    rules: tuple[Rule, ...]
    rule_of: Mapping[str, int]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    adapters: Mapping[str, Spec] = dataclasses.field(default_factory=dict)
    held: Mapping[str, "Held"] = dataclasses.field(default_factory=dict)

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
        return {
            path: 0.0 if path.endswith(adapters.BIASES) else self.rule(path).weight_decay
            for path in self.rule_of
            if self.trains(path)
        }

    @property
    def dropout(self) -> dict[str, float]:
        """Rate of each adapter's dropout, by path of its kernel."""
        return {path: self.rule(path).dropout for path in self.adapters}


@dataclasses.dataclass(frozen=True)
class Held:
    """A kernel that is held in few bits.

    Attributes:
      kind: how, a key of `models.quantised.KINDS`.
      kernel: what it is as floats, with the layers' axis where it is stacked.
      axes: how many of its axes go in.
      stacked: whether its first axis is that of layers.
    """

    kind: str
    kernel: jax.ShapeDtypeStruct
    axes: int
    stacked: bool

    def leaves(self, path: str) -> dict[str, jax.ShapeDtypeStruct]:
        """What stands for it, given its path."""
        return _beside(path, quantised.shapes(self.kind, self.kernel, self.stacked))

    def hold(self, path: str, kernel: jax.Array) -> dict[str, jax.Array]:
        """The same of the kernel itself."""
        return _beside(path, quantised.hold(self.kind, kernel, self.axes, self.stacked))


def _beside(kernel: str, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    return {quantised.beside(kernel, name): leaf for name, leaf in leaves.items()}


def of(config: Config) -> Plan:
    """The plan of a run; see `plan`.

    Raises:
      ConfigError: besides, a prefix that the decoder cannot have.
    """
    model = config.model
    found = plan(
        params.abstract(model), config.adaptation, params.linears(model), params.prefixable(model)
    )
    _check_prefix(config, found)
    return found


def _check_prefix(config: Config, plan: Plan) -> None:
    """Of the decoder: how others count positions is known where nothing but positions does."""
    decoder = config.model.decoder
    lengths = [
        spec.rank
        for path, spec in plan.adapters.items()
        if spec.prefix and path.startswith("decoder/")
    ]
    if not lengths:
        return
    for there, name in (
        (decoder.position == "alibi", "linear biases (ALiBi)"),
        ("local" in decoder.layers, "a sliding window"),
    ):
        if there:
            raise ConfigError(
                f"config.adaptation gives a prefix to a decoder with {name}; expected one without, "
                "as no reference says how far from a token its prefix is"
            )
    longest = config.data.tokens + max(lengths)
    for field, expected in decoder.problems(longest):
        raise ConfigError(
            f"config.model.decoder.{field} is {getattr(decoder, field)!r}; with a prefix of "
            f"{max(lengths)} expected {expected.replace(' of data.tokens', ' positions')}"
        )


def plan(
    flat: Mapping[str, Any],
    rules: Sequence[Rule],
    linears: Mapping[str, int] | None = None,
    prefixable: Collection[str] = (),
) -> Plan:
    """Applies `rules` to parameters by path.

    Args:
      flat: arrays or ShapeDtypeStructs by path.
      rules: the adaptation table, in order.
      linears: the kernels that adapters can stand beside, as `params.linears` gives them.
      prefixable: those that prefixes can stand beside, as `params.prefixable` gives them.

    Raises:
      ConfigError: a path that no rule matches, a rule that covers nothing (other than a final
        ".*"), a pattern that is no regular expression, or a table that trains nothing.
    """
    linears = linears or {}
    places = linears, prefixable
    patterns = [_compile(rule) for rule in rules]
    rule_of = {}
    for path in flat:
        matches = (
            index
            for index, rule in enumerate(rules)
            if patterns[index].fullmatch(path) and path in _allowed(rule, flat, *places)
        )
        rule_of[path] = next(matches, None)
    missed = [path for path, index in rule_of.items() if index is None]
    if missed:
        raise ConfigError(
            f"config.adaptation: no rule matches {missed[0]!r} (and {len(missed) - 1} others); "
            'add a rule for it, or Rule(".*") at the end'
        )
    _refuse_idle_rules(rules, patterns, rule_of, *places)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    specs = {path: _spec(rule) for path in flat if (rule := rules[rule_of[path]]).adapts}
    held = {
        path: Held(rule.base, shapes[path], linears[path], "/stack/blocks/" in path)
        for path in flat
        if (rule := rules[rule_of[path]]).quantises
    }
    for path, spec in specs.items():
        stacked = "/stack/blocks/" in path
        own = _beside(path, adapters.shapes(spec, shapes[path], linears[path], stacked))
        shapes, rule_of = shapes | own, rule_of | dict.fromkeys(own, rule_of[path])
    for path, kernel in held.items():
        own = kernel.leaves(path)
        shapes, rule_of = shapes | own, rule_of | dict.fromkeys(own, rule_of[path])
        del shapes[path]
    applied = Plan(tuple(rules), rule_of, shapes, specs, held)
    if not applied.lr:
        raise ConfigError("config.adaptation freezes every parameter; expected a rule that trains")
    return applied


def _spec(rule: Rule) -> Spec:
    kinds = {name: rule.mode == name for name in ("bottleneck", "prefix")}
    scale = rule.scale if rule.alpha else 1.0
    return Spec(rule.rank, scale, magnitude=rule.mode == "dora", hidden=rule.hidden, **kinds)


def _allowed(
    rule: Rule, flat: Collection[str], linears: Collection[str], prefixable: Collection[str]
) -> Collection[str]:
    """The paths that a rule may hold for."""
    if rule.mode == "prefix":
        return prefixable
    return linears if rule.adapts or rule.quantises else flat


def _compile(rule: Rule) -> re.Pattern:
    try:
        return re.compile(rule.pattern)
    except re.error as error:
        raise ConfigError(
            f"config.adaptation: {rule.pattern!r} is no regular expression: {error}"
        ) from error


def _refuse_idle_rules(rules, patterns, rule_of: Mapping[str, int], linears, prefixable) -> None:
    """A rule that covers nothing is a typing error, or stands below a wider one."""
    for index, (rule, pattern) in enumerate(zip(rules, patterns, strict=True)):
        candidates = _allowed(rule, rule_of, linears, prefixable)
        limited = candidates is not rule_of
        if index in rule_of.values() or (rule.pattern == CATCH_ALL and not limited):
            continue
        taken = [path for path in candidates if pattern.fullmatch(path)]
        if not taken:
            kind = "kernel of a linear layer" if limited else "parameter"
            if rule.mode == "prefix":
                kind = "kernel of the keys of an attention that a prefix can stand before"
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
      pattern, mode, base, rank, lr: of the rule; the learning rate at its peak, 0 where nothing
        trains.
      tensors, parameters: covered, adapters included; a kernel in few bits counts as floats.
      trained: parameters that train.
      bytes: of all these parameters.
      state_bytes: what the optimizer and the average keep for them.
    """

    pattern: str
    mode: str
    base: str
    rank: int
    tensors: int
    parameters: int
    trained: int
    bytes: int
    state_bytes: int
    lr: float


def groups(
    plan: Plan,
    lr: float,
    state_bytes: Mapping[str, int],
    own_bytes: Mapping[str, int] | None = None,
) -> list[Group]:
    """The plan in figures, rule by rule.

    Args:
      plan: what to show.
      lr: peak learning rate of the run.
      state_bytes: what the optimizer and the average keep for each trainable path.
      own_bytes: of leaves by path, where they are of other dtypes than the model's.
    """
    found = []
    for index, rule in enumerate(plan.rules):
        leaves = {p: leaf for p, leaf in plan.shapes.items() if plan.rule_of[p] == index}
        held = [kernel.kernel for p, kernel in plan.held.items() if plan.rule_of[p] == index]
        floats = [leaf for path, leaf in leaves.items() if not quantised.is_leaf(path)]
        trained = sum(leaf.size for path, leaf in leaves.items() if plan.trains(path))
        size = sum((own_bytes or {}).get(p, _bytes(leaf)) for p, leaf in leaves.items())
        kept = sum(state_bytes.get(path, 0) for path in leaves)
        rate = lr * rule.lr if trained else 0.0
        parameters = sum(leaf.size for leaf in floats + held)
        figures = len(leaves), parameters, trained, size, kept, rate
        found.append(Group(rule.pattern, rule.mode, rule.base, rule.rank, *figures))
    return found


def table(groups: Sequence[Group]) -> Table:
    """The groups for people: a line per rule, and sums."""
    figures_of = "tensors", "parameters", "bytes", "trained", "share", "state", "learning rate"
    shown = Table("group", "mode", *figures_of)
    shown.columns[0].overflow = "fold"
    for column in shown.columns[2:]:
        column.justify = "right"
    total = sum(group.parameters for group in groups)

    def figures(tensors: int, parameters: int, trained: int, size: int, kept: int):
        share = f"{trained / max(total, 1):.1%}"
        counts = str(tensors), f"{parameters:,}", readable(size), f"{trained:,}"
        return *counts, share, readable(kept)

    for group in groups:
        mode = f"{group.mode} {group.rank}" if group.rank else group.mode
        mode = mode if group.base == "float" else f"{mode}, {group.base}"
        rate = f"{group.lr:.2e}" if group.lr else "-"
        shown.add_row(group.pattern, mode, *figures(*group[4:9]), rate)
    shown.add_section()
    sums = (sum(column) for column in zip(*(group[4:9] for group in groups), strict=True))
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


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def readable(size: float) -> str:
    """Bytes for people, e.g. "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
