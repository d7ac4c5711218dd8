"""Documents by number, made here, in threads or in processes: the same ones whichever it is.

Packing asks for words and sizes alone, so pictures wait for their row before they are decoded: a
pool of a thousand documents holds no pixels. (Worker processes give documents with their pixels.)
Words are made in groups. A picture drives all else out of the processor's caches, so that code that
runs once a picture runs from memory, several times slower than in a row (`benchmarks/input.py`).
"""

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.config import Config
from vlm_jax.data import allocation, documents, engines, sources
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.documents import Draft, Seen
from vlm_jax.data.example import BadExample
from vlm_jax.data.mixing import Drawn
from vlm_jax.data.sources import Source
from vlm_jax.errors import PeerError

GROUP = 8  # documents whose words are made together
AHEAD = 2 * GROUP  # documents that are made ahead by each thread or process
PATIENCE = 600.0  # seconds after which a worker process that gives nothing is taken for hung

Asked = Sequence[tuple[int, Drawn]]


class Renderer:
    """Makes documents.

    Args:
      config: the run.
      split: of the sources.
      opened: the sources by name.
    """

    def __init__(self, config: Config, split: str, opened: Mapping[str, Source]):
        self._config, self._split, self._opened = config, split, opened
        self._tokenizer = tokenizers.for_config(config)
        allocation.keep_freed()

    def __call__(self, asked: Asked) -> list[Draft]:
        """Documents k: each a pure function of the seed, k and the example that it is made of."""
        return [self._drafted(k, *drawn) for k, drawn in asked]

    def _drafted(self, k: int, name: str, index: int) -> Draft:
        # A counter of its own for every k; what Grain's `random_map` draws.
        rng = np.random.Generator(
            np.random.Philox(self._config.seed % 2**32, counter=[0, 0, 0, int(k)])
        )
        try:
            example = self._opened[name].example(index, rng)
        except BadExample as bad:
            key = f"{name}/{self._split}/{index}"
            return documents.rejected(key, name, bad.reason, self._config)
        weight = self._config.data.loss_weights.get(name, 1.0)
        return documents.drafted(example, self._config, self._tokenizer, rng, weight)


class Group:
    """Documents that are made together, once there are GROUP of them or one is waited for.

    Args:
      begin: begins to make them; what it returns waits for them.
    """

    def __init__(self, begin: Callable[[Asked], Callable[[], Sequence[Draft]]]):
        self._begin, self._asked = begin, []
        self._wait: Callable[[], Sequence[Draft]] | None = None
        self._made: list[Draft | None] | None = None

    @property
    def begun(self) -> bool:
        """Whether it takes no more."""
        return self._wait is not None

    def add(self, k: int, drawn: Drawn) -> Callable[[], Draft]:
        """One more; what is returned waits for it, once."""
        place = len(self._asked)
        self._asked.append((k, drawn))
        if len(self._asked) == GROUP:
            self._wait = self._begin(self._asked)
        return lambda: self._take(place)

    def _take(self, place: int) -> Draft:
        if self._wait is None:
            self._wait = self._begin(self._asked)
        if self._made is None:
            self._made = list(self._wait())
        found, self._made[place] = self._made[place], None
        return found


class Coming:
    """A document that was asked for.

    Args:
      wait: gives its draft.
      begin: begins to decode its pictures; what it returns waits for them.
    """

    def __init__(self, wait: Callable[[], Draft], begin: Callable[[Draft], Callable[[], Seen]]):
        self._wait, self._begin = wait, begin
        self._seen: Callable[[], Seen] | None = None

    @functools.cached_property
    def draft(self) -> Draft:
        """What packing asks of it.

        Raises:
          PeerError: a worker process died or hangs.
        """
        return self._wait()

    def begin(self) -> None:
        """Begins to decode its pictures, where others do that beside whoever asks."""
        self._seen = self._begin(self.draft)

    def see(self) -> Seen:
        """Its pictures, once."""
        if self._seen is None:
            self.begin()
        seen, self._seen = self._seen, None  # a future would hold them
        return seen()


class Reader:
    """Makes documents ahead of their use. `close()` ends its threads or processes.

    Args:
      config: the run; its `data.workers` processes or `data.threads` threads do the work, or
        whoever asks where both are 0.
      split: of the sources.
      opened: the sources by name.
    """

    def __init__(self, config: Config, split: str, opened: Mapping[str, Source]):
        self._render = Renderer(config, split, opened)
        self._processes = config.data.workers > 0
        self.ahead = AHEAD * (config.data.workers or config.data.threads) or GROUP - 1
        self._group = Group(self._begin)
        self._pool: concurrent.futures.Executor | None = None
        if self._processes:
            # Spawned: a fork of a process with threads may hang.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                config.data.workers,
                multiprocessing.get_context("spawn"),
                _start,
                (config, split),
            )
        elif config.data.threads:
            self._pool = concurrent.futures.ThreadPoolExecutor(config.data.threads, "vlm-read")

    @property
    def beside(self) -> bool:
        """Whether `Coming.begin` leaves the work to others."""
        return self._pool is not None and not self._processes

    def ask(self, k: int, drawn: Drawn) -> Coming:
        """Begins to make document k."""
        if self._group.begun:
            self._group = Group(self._begin)
        return Coming(self._group.add(k, drawn), self._see)

    def _begin(self, asked: Asked) -> Callable[[], Sequence[Draft]]:
        if self._pool is None:
            return lambda: self._render(asked)
        if not self._processes:
            return self._pool.submit(self._render, asked).result
        try:
            future = self._pool.submit(_make, asked)
        except concurrent.futures.BrokenExecutor as error:
            raise _lost(error) from error
        return lambda: _waited(future)

    def _see(self, draft: Draft) -> Callable[[], Seen]:
        return self._pool.submit(draft.see).result if self.beside else draft.see

    def close(self) -> None:
        """Ends the threads or processes; what was begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def open_all(config: Config, split: str, names: list[str]) -> dict[str, Source]:
    """Sources by name.

    Raises:
      ConfigError: no such source or split.
      DataError: a corpus cannot be read.
    """
    return {
        name: sources.open_source(name, split, config.seed, config.data.corpora) for name in names
    }


# In a worker process ----------------------------------------------------------------------------

_state: dict[str, Any] = {}


def _start(config: Config, split: str) -> None:
    from vlm_jax.data import mixing

    engines.end_with_parent()
    _state["render"] = Renderer(config, split, open_all(config, split, mixing.names(config.data)))


def _make(asked: Asked) -> list[Draft]:
    return [draft.decoded() for draft in _state["render"](asked)]


# ------------------------------------------------------------------------------------------------


def _waited(future: concurrent.futures.Future) -> list[Draft]:
    try:
        return future.result(PATIENCE)
    except (concurrent.futures.BrokenExecutor, TimeoutError) as error:
        raise _lost(error) from error


def _lost(error: BaseException) -> PeerError:
    return PeerError(
        f"a process that reads data died or hangs ({error or type(error).__name__}): was it killed "
        "for want of memory? The same command goes on from the last checkpoint"
    )
