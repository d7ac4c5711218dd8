"""In which order a training source's examples come: a pure function of (seed, name, position)."""

import functools
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlm_jax.data.sources import Source

BLOCK = 256  # indices that are read together


def shuffled(source: Source, name: str, seed: int, views: int, cap: int = 0):
    """Indices of `source` without end, with random access, and how many of them make an epoch.

    Args:
      source: its length, and with `views` its groups, are read.
      name: sources of other names come in other orders.
      seed: of the run.
      views: 1 shuffles the examples, each once an epoch; above 1 the groups are shuffled, and an
        epoch shows up to that many random members of each, one after the other.
      cap: most examples of an epoch, the same ones in every epoch; 0 = all.
    """
    # Here and not above: Grain imports jax where jax is installed, and rendering needs none of it.
    import grain

    seed = (seed + zlib.crc32(name.encode())) % 2**32
    if views > 1:
        groups = _capped(source.groups(), seed, views, cap)
        length = _length(groups, views)
        return grain.MapDataset.range(sys.maxsize).map(by_groups(groups, seed, views)), length
    length = min(cap or len(source), len(source))
    indices = grain.MapDataset.range(length).shuffle(seed=seed).repeat()
    if length < len(source):
        kept = np.random.default_rng(seed).choice(len(source), length, replace=False)
        indices = indices.map(kept.__getitem__)
    return indices, length


def fingerprint(opened: Mapping[str, Source], views: int) -> dict[str, dict[str, int]]:
    """What of the sources' groups decides the order, as plain JSON; nothing where they do not."""
    if views == 1:
        return {}
    return {"groups": {name: zlib.crc32(repr(s.groups()).encode()) for name, s in opened.items()}}


def by_blocks(indices: Sequence[int]) -> Callable[[int], int]:
    """The same, read many at a time: Grain takes as long for one as a small picture's header."""

    @functools.lru_cache(maxsize=4)  # a stream reads forwards, its lanes nearly side by side
    def block(number: int) -> tuple[int, ...]:
        return tuple(int(indices[i]) for i in range(number * BLOCK, (number + 1) * BLOCK))

    return lambda position: block(position // BLOCK)[position % BLOCK]


def by_groups(groups: Sequence[Sequence[int]], seed: int, views: int) -> Callable[[int], int]:
    """The index at each position where groups come in random order, their members together."""
    length = _length(groups, views)

    @functools.lru_cache(maxsize=2)  # a stream reads forwards
    def epoch(number: int) -> tuple[int, ...]:
        rng = np.random.default_rng((seed, number))
        return tuple(
            int(index)
            for g in rng.permutation(len(groups))
            for index in rng.permutation(groups[g])[:views]
        )

    return lambda position: epoch(int(position) // length)[int(position) % length]


def _length(groups: Sequence[Sequence[int]], views: int) -> int:
    return sum(min(len(group), views) for group in groups)


def _capped(
    groups: Sequence[Sequence[int]], seed: int, views: int, cap: int
) -> Sequence[Sequence[int]]:
    """Random groups that show up to `cap` examples an epoch together, at least one group."""
    if not 0 < cap < _length(groups, views):
        return groups
    groups = [groups[g] for g in np.random.default_rng(seed).permutation(len(groups))]
    shown = np.cumsum([min(len(group), views) for group in groups])
    return groups[: max(1, int(np.searchsorted(shown, cap, side="right")))]
