"""The stream of training batches.

Batch s of the stream is a pure function of (config, s), and so is what each host reads of it:
document k is one of (seed, k), and a lane of documents is packed on its own (`lanes.py`). The
position of the stream is that of its lanes.
"""

import collections
import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.batch import Batch
from vlm_jax.config import Config
from vlm_jax.data import fingerprint, lanes, mixing, packing, reading
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.documents import Document
from vlm_jax.data.lanes import Lane, Position
from vlm_jax.data.packing import Info
from vlm_jax.data.reading import Coming
from vlm_jax.errors import ConfigError, DataError

PREFETCH = 2  # batches made ahead of the trainer


def train_stream(
    config: Config, split: str = "train", host: int = 0, hosts: int = 1
) -> "TrainStream":
    """Packed training batches without end; see `TrainStream`.

    Raises:
      ConfigError: an unknown source or template, a tokenizer that does not fit the decoder, or
        lanes that cannot be dealt out to that many hosts.
    """
    return TrainStream(config, split, host, hosts)


class TrainStream:
    """Batches whose order and content are a pure function of (config, step).

    An iterator of (Batch, Info) that makes a few batches ahead in a thread (none where
    `data.threads` is 0). `get_state()` describes the position after the last batch handed out,
    whatever was made ahead. Use it as a context manager, or `close()` it: threads and processes end
    there.

    Args:
      config: the run.
      split: of its sources.
      host, hosts: which of how many hosts reads here. It gives its own rows of the global batch,
        in order, and the state of its own lanes (`merged` joins those of all hosts).
    """

    def __init__(self, config: Config, split: str, host: int = 0, hosts: int = 1):
        if config.data.lanes % hosts:
            raise ConfigError(
                f"config.data.lanes is {config.data.lanes}; expected a multiple of {hosts} hosts"
            )
        self._config, self._split = config, split
        self._tokenizer = tokenizers.for_config(config)
        rows = config.data.rows // hosts
        self._shape = packing.shape_of(config, self._tokenizer.pad, rows=rows)
        self._opened = reading.open_all(config, split, mixing.names(config.data))
        self._mixture = mixing.Mixture(config, self._opened)
        self._fingerprint = fingerprint.of(config, split, self._opened, self._tokenizer)
        share = config.data.lanes // hosts
        self._positions = {lane: Position() for lane in range(host * share, (host + 1) * share)}
        self._batches = None

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> tuple[Batch, Info]:
        """The next batch.

        Raises:
          DataError: too many bad samples, or a batch without anything to learn.
          PeerError: a process that reads for it died or hangs.
        """
        if self._batches is None:
            self._batches = self._made()
            if self._config.data.threads:
                self._batches = _Prefetched(self._batches, PREFETCH)
        batch, info, self._positions = next(self._batches)
        return batch, info

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out, as plain JSON."""
        positions = {str(lane): position.plain() for lane, position in self._positions.items()}
        return {"fingerprint": self._fingerprint, "lanes": positions}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` or `merged` gave.

        Raises:
          ConfigError: it belongs to another stream, naming what differs, or lacks lanes.
        """
        fingerprint.require_same(state["fingerprint"], self._fingerprint)
        missing = [lane for lane in self._positions if str(lane) not in state["lanes"]]
        if missing:
            raise ConfigError(
                f"the saved position of the data lacks lane {missing[0]}: it is of some hosts "
                "only; restore a checkpoint that all of them wrote"
            )
        self.close()
        self._positions = {n: Position.parse(state["lanes"][str(n)]) for n in self._positions}

    def close(self) -> None:
        """Ends threads and processes; the next batch would start them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _made(self) -> Iterator[tuple[Batch, Info, dict[int, Position]]]:
        """Batches from the current position on, each with the position after it."""
        reader = reading.Reader(self._config, self._split, self._opened)
        with contextlib.closing(reader):
            opened = self._lanes(reader)
            chosen, failed = collections.deque(), None
            # Where others decode, they go on with the next batch while one is put together.
            depth = 2 if reader.beside else 1
            while True:
                while len(chosen) < depth and failed is None:
                    try:
                        chosen.append(self._chosen(opened))
                    except DataError as error:
                        failed = error
                if not chosen:
                    raise failed
                yield self._assembled(chosen.popleft(), opened)

    def _lanes(self, reader: reading.Reader) -> dict[int, Lane]:
        """This host's lanes, each at its position."""
        data, total = self._config.data, self._config.data.lanes
        ahead = -(-reader.ahead // len(self._positions))

        def ask(lane: int):
            return lambda n: reader.ask(n * total + lane, self._mixture[n * total + lane])

        return {
            number: Lane(ask(number), data, self._shape, position, ahead)
            for number, position in self._positions.items()
        }

    def _chosen(self, opened: Mapping[int, Lane]) -> "_Chosen":
        useless: list[Document] = []

        def note(document: Document) -> None:
            useless.append(document)
            self._check(opened, {n: lane.position for n, lane in opened.items()}, document)

        each = self._shape.rows // len(opened)
        rows = [(n, lane.row(note)) for n, lane in opened.items() for _ in range(each)]
        return _Chosen(rows, useless, {n: lane.position for n, lane in opened.items()})

    def _check(
        self, opened: Mapping[int, Lane], positions: Mapping[int, Position], bad: Document
    ) -> None:
        settled = [opened[n].settled(position) for n, position in positions.items()]
        lanes.check_budget(settled, self._config.data.bad_samples, bad)

    def _assembled(
        self, chosen: "_Chosen", opened: Mapping[int, Lane]
    ) -> tuple[Batch, Info, dict[int, Position]]:
        bad = list(chosen.useless)
        if bad:  # which came when pictures of the batch before were not yet known to be bad
            self._check(opened, chosen.positions, bad[-1])
        rows = [[coming.draft.words for _, coming in row] for _, row in chosen.rows]
        batch, places = packing.begun(rows, self._shape)
        every = ((number, n, coming) for number, row in chosen.rows for n, coming in row)
        for place, (number, n, coming) in zip(places, every, strict=True):
            # At once: a picture is put into its place while the processor has it at hand.
            seen = coming.see()
            packing.show(batch, place, seen.views, self._shape)
            if seen.rejects:
                packing.unlearn(batch, place)
                opened[number].spoiled(n)
                bad.append(coming.draft.words.unlearned(seen.rejects))
                self._check(opened, chosen.positions, bad[-1])
        batch = packing.finished(batch)
        at = {n: opened[n].settled(position) for n, position in chosen.positions.items()}
        for n, position in at.items():
            opened[n].forget(position)
        info = self._info(rows, bad, at)
        _require_supervision(batch, info)
        return batch, info, at

    def _info(
        self,
        rows: Sequence[Sequence[Document]],
        bad: Sequence[Document],
        positions: Mapping[int, Position],
    ) -> Info:
        rejected = tuple((d.key, d.source, why) for d in bad for why in d.rejects)
        newest = max(at.next * self._config.data.lanes + n for n, at in positions.items())
        return Info(
            packing.names(rows),
            dict(collections.Counter((source, why) for _, source, why in rejected)),
            rejected,
            dict(collections.Counter(d.source for row in rows for d in row if d.truncated)),
            self._mixture.epochs(newest),
        )


class _Chosen(NamedTuple):
    """What becomes a batch.

    Attributes:
      rows: the lane of each and its documents.
      useless: what came meanwhile and fits no row.
      positions: of the lanes after it, without their bad documents.
    """

    rows: list[tuple[int, list[tuple[int, Coming]]]]
    useless: list[Document]
    positions: dict[int, Position]


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of the whole stream, from those of all hosts; any number of hosts goes on from it.

    Raises:
      ConfigError: they are not of one stream.
    """
    first, *others = states
    for other in others:
        fingerprint.require_same(first["fingerprint"], other["fingerprint"])
    return {**first, "lanes": {n: p for state in states for n, p in state["lanes"].items()}}


class _Prefetched:
    """Runs a generator in a thread, `depth` items ahead of the consumer."""

    def __init__(self, items: Iterator, depth: int):
        self._items = items
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vlm-batches", daemon=True)
        self._failed: BaseException | None = None
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
        except BaseException as error:  # whatever it is, the consumer must see it
            self._put((None, error))
        finally:
            self._items.close()

    def _put(self, item) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return True
        return False

    def __next__(self):
        if self._failed is None:
            item, self._failed = self._ready.get()
        if self._failed is not None:
            raise self._failed
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _require_supervision(batch: Batch, info: Info) -> None:
    if batch.loss_weights.any():
        return
    keys = [key for row in info.documents for key, _ in row]
    shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise DataError(f"a batch has nothing to learn from (rejected: {info.rejects}): {shown}")
