"""Back to an older state and on with later data, as PaLM's training did (Chowdhery et al. 2022)."""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from vlm_jax.config import Config
from vlm_jax.errors import ConfigError
from vlm_jax.training.checkpoints import Checkpoints, Stream
from vlm_jax.training.state import State


@dataclasses.dataclass(frozen=True)
class Row:
    """So many skipped steps in a row that the run is to roll back.

    Attributes:
      step: of the last one of them.
      batch: how many batches had been drawn with it.
      drawn: how many have been drawn by now: the host may learn of the row a step later.
    """

    step: int
    batch: int
    drawn: int


class Rollback:
    """Undoes what came before a row of skips; the batches since then are not read again.

    Args:
      config: the run.
      saved: its checkpoints.
      stream: its data.
      abstract: its abstract state.
      create: its first state, which may move the stream.
    """

    def __init__(
        self,
        config: Config,
        saved: Checkpoints,
        stream: Iterator,
        abstract: State,
        create: Callable[[], State],
    ):
        self._guard, self._saved, self._stream = config.guard, saved, stream
        self._abstract, self._create = abstract, create
        self._tries: collections.Counter[int] = collections.Counter()

    def __call__(self, row: Row) -> State:
        """The state of the newest checkpoint from before the row.

        Raises:
          ConfigError: the run got stuck there before, as often as it may.
        """
        if row.drawn == row.batch:  # one more, so that it does not matter when the host learnt it
            next(self._stream)
        state = _with_stream_unmoved(self._stream, lambda: self._before(row))
        self._tries[state.done] += 1
        if self._tries[state.done] > self._guard.rollbacks:
            raise ConfigError(
                f"training diverges: after step {state.done} it came {self._tries[state.done]} "
                f"times to {self._guard.patience} skipped steps in a row (skipped.jsonl lists "
                "them). Lower config.train.lr, lengthen config.train.warmup_steps, or look at "
                "the data"
            )
        self._saved.forget(after=state.done)
        memory = state.guard
        return dataclasses.replace(
            state,
            guard=memory._replace(
                in_row=_like(memory.in_row, 0), drawn=_like(memory.drawn, row.batch + 1)
            ),
        )

    def _before(self, row: Row) -> State:
        newest = row.step - self._guard.patience
        state = self._saved.restore(self._abstract, self._stream, newest)
        return self._create() if state is None else state


def _with_stream_unmoved(stream: Stream, restore: Callable[[], State]) -> State:
    position = stream.get_state()
    state = restore()
    stream.set_state(position)
    return state


def _like(leaf: jax.Array, value: int) -> jax.Array:
    return jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding)
