"""Where Examples come from: a table from a name's prefix to what opens it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from vlm_jax.config import Corpus
from vlm_jax.data import emoji, formats
from vlm_jax.data.example import Example
from vlm_jax.errors import ConfigError
from vlm_jax.schema import unknown_key


class Source(Protocol):
    """Random access to examples; pure, and safe to read from several threads."""

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; what it leaves to chance (a question, a layout) is drawn from `rng`.

        Raises:
          BadExample: there is none to be had; it is counted.
        """
        ...

    def groups(self) -> Sequence[Sequence[int]]:
        """Indices of the examples about one and the same thing, for every thing."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """Sources that share a prefix.

    Attributes:
      kinds, splits: what may follow the prefix, and which parts of it there are.
      open: called with a kind, a split and a seed.
    """

    kinds: Sequence[str]
    splits: Sequence[str]
    open: Callable[[str, str, int], Source]


FAMILIES = {
    "emoji": Family(
        emoji.KINDS, emoji.SPLITS, lambda kind, split, seed: emoji.EmojiSource(split, kind, seed)
    ),
}


def names() -> list[str]:
    """Every source there is, e.g. "emoji:caption"."""
    return [f"{prefix}:{kind}" for prefix, family in FAMILIES.items() for kind in family.kinds]


def open_source(
    name: str, split: str, seed: int = 0, corpora: Mapping[str, Corpus] | None = None
) -> Source:
    """A source by name.

    Args:
      name: "PREFIX:KIND", e.g. "emoji:caption", or the name of a corpus.
      split: e.g. "train".
      seed: of what the source itself leaves to chance.
      corpora: of the config.

    Raises:
      ConfigError: no such source or split.
      DataError: a corpus cannot be read.
    """
    corpora = corpora or {}
    if name in corpora:
        return formats.CorpusSource(name, corpora[name], split)
    prefix, _, kind = name.partition(":")
    family = FAMILIES.get(prefix)
    if family is None or kind not in family.kinds:
        raise ConfigError(
            unknown_key(name, [*corpora, *names()]).replace("config key", "data source")
        )
    if split not in family.splits:
        raise ConfigError(f"{name} has no split {split!r}; it has {', '.join(family.splits)}")
    return family.open(kind, split, seed)
