"""Which example document k of the training stream is: a pure function of (config, k).

A stage of a mixture draws from its sources in whole-numbered proportions, so that how many of the
first k documents came from each of them is a closed form, and any k can be asked for on its own.
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vlm_jax.config import Config, Data
from vlm_jax.data import order
from vlm_jax.data.sources import Source


class Drawn(NamedTuple):
    """An example of a source."""

    source: str
    index: int


class Stage(NamedTuple):
    """A mixture and where in the stream it begins.

    Attributes:
      start: its first document.
      proportions: of the sources that it draws from.
      before: how many documents of each source came earlier.
    """

    start: int
    proportions: Mapping[str, int]
    before: Mapping[str, int]


class Mixture:
    """The sources of a config, mixed.

    Args:
      config: its seed and `data` are read.
      opened: the sources by name, all that any stage draws from.
    """

    def __init__(self, config: Config, opened: Mapping[str, Source]):
        data = config.data
        orders = {
            name: order.shuffled(source, name, config.seed, data.views, data.caps.get(name, 0))
            for name, source in opened.items()
        }
        self._orders = {name: order.by_blocks(indices) for name, (indices, _) in orders.items()}
        self._epoch = {name: length for name, (_, length) in orders.items()}
        self.stages = stages(data, self._epoch)
        self._starts = [stage.start for stage in self.stages]

    def __getitem__(self, k: int) -> Drawn:
        """Document k."""
        stage = self._stage(k)
        place, position = chosen(k - stage.start, tuple(stage.proportions.values()))
        name = tuple(stage.proportions)[place]
        return Drawn(name, self._orders[name](stage.before[name] + position))

    def epochs(self, k: int) -> dict[str, float]:
        """How many times the first k documents went through each source."""
        stage = self._stage(max(k - 1, 0))
        came = drawn(stage, k)
        return {name: came[name] / length for name, length in self._epoch.items()}

    def _stage(self, k: int) -> Stage:
        return self.stages[bisect.bisect_right(self._starts, k) - 1]


def names(data: Data) -> list[str]:
    """All sources that training draws from, in the order in which they are named."""
    mixtures = data.mixture, *(stage.mixture for stage in data.schedule)
    return list(dict.fromkeys(n for mixture in mixtures for n, w in mixture.items() if w > 0))


def stages(data: Data, sizes: Mapping[str, int]) -> list[Stage]:
    """The stages of a run.

    Args:
      data: its `mixture`, `schedule` and `size_power` are read.
      sizes: examples of an epoch, by source.
    """
    found = [Stage(0, _proportions(data.mixture, data.size_power, sizes), dict.fromkeys(sizes, 0))]
    for later in data.schedule:
        before = drawn(found[-1], later.start)
        proportions = _proportions(later.mixture, data.size_power, sizes)
        found.append(Stage(later.start, proportions, before))
    return found


def drawn(stage: Stage, k: int) -> dict[str, int]:
    """How many of the first k documents came from each source; the stage draws the last of them."""
    here = counts(k - stage.start, tuple(stage.proportions.values()))
    return {**stage.before} | {
        name: stage.before[name] + count
        for name, count in zip(stage.proportions, here, strict=True)
    }


def counts(k: int, proportions: Sequence[int]) -> list[int]:
    """How many of the first k draws fall to each of several sources.

    The first source gets its rounded-up share of all, and the others divide the rest in the same
    way: every count is within one of its exact share for two sources, within a few for many.
    """
    found, left = [], sum(proportions)
    for proportion in proportions:
        rest = k * (left - proportion) // left
        found.append(k - rest)
        k, left = rest, left - proportion
    return found


def chosen(k: int, proportions: Sequence[int]) -> tuple[int, int]:
    """Which source draw k falls to, and how many it had before."""
    now, then = counts(k, proportions), counts(k + 1, proportions)
    place = next(i for i, (a, b) in enumerate(zip(now, then, strict=True)) if a != b)
    return place, now[place]


def _proportions(
    mixture: Mapping[str, float], power: float, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Whole numbers, the smallest 100, in proportion to weight times size to that power."""
    weights = {name: w * sizes[name] ** power for name, w in mixture.items() if w > 0}
    smallest = min(weights.values())
    return {name: int(weight * (100 / smallest)) for name, weight in weights.items()}
