"""The stream of training batches.

Document k of the stream is a pure function of (seed, k), so the position of the stream is a few
numbers: the next k, and which documents the packer still holds; those are rendered again on resume.
"""

import collections
import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.config import Config
from vlm_jax.data import documents, formats, order, packing, sources
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.documents import Document
from vlm_jax.data.example import BadExample
from vlm_jax.data.packing import Info
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.presets.resizing import SQUASH

REJECT_WINDOW = 10_000  # documents over which the share of bad ones is taken
PREFETCH = 2  # batches made ahead of the trainer

_VERSION = 1  # of the state; raise it when the same state would lead to other batches


def train_stream(config: Config, split: str = "train") -> "TrainStream":
    """Packed training batches without end; see `TrainStream`.

    Raises:
      ConfigError: an unknown source or template, or a tokenizer that does not fit the decoder.
    """
    return TrainStream(config, split)


class TrainStream:
    """Batches whose order and content are a pure function of (config, step).

    An iterator of (Batch, Info) that makes a few batches ahead in a thread (none where
    `data.threads` is 0). `get_state()` describes the position after the last batch handed out,
    whatever was made ahead. Use it as a context manager, or `close()` it: threads end there.
    """

    def __init__(self, config: Config, split: str):
        self._config = config
        self._tokenizer = tokenizers.for_config(config)
        self._shape = packing.shape_of(config, self._tokenizer.pad)
        opened = {
            name: sources.open_source(name, split, config.seed, config.data.corpora)
            for name, weight in config.data.mixture.items()
            if weight > 0
        }
        self._dataset = _stream(config, split, opened, self._tokenizer)
        self._fingerprint = _fingerprint(config, split, opened, self._tokenizer)
        self._position = _Position()
        self._batches = None

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> tuple[Batch, Info]:
        """The next batch.

        Raises:
          DataError: too many bad samples, or a batch without anything to learn.
        """
        if self._batches is None:
            self._batches = self._made()
            if self._config.data.threads:
                self._batches = _Prefetched(self._batches, PREFETCH)
        batch, info, self._position = next(self._batches)
        return batch, info

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out, as plain JSON."""
        return {"fingerprint": self._fingerprint, **self._position.plain()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` gave.

        Raises:
          ConfigError: it belongs to another stream; names what differs.
        """
        saved = {"views": 1, **state["fingerprint"]}  # there was no such choice at first
        for name in {**self._fingerprint, **saved}:
            old, new = saved.get(name), self._fingerprint.get(name)
            if old != new:
                raise ConfigError(
                    f"the saved position of the data has {name} {old!r}, this config {new!r}: "
                    "go on with the old value, or start in another workdir"
                )
        self.close()
        self._position = _Position.parse(state)

    def close(self) -> None:
        """Ends the threads; the next batch would start them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _made(self) -> Iterator[tuple[Batch, Info, "_Position"]]:
        """Batches from the current position on, each with the position after it."""
        position = self._position
        pending = collections.deque((k, self._dataset[k]) for k in position.pending)
        bad = collections.deque(position.bad)
        with contextlib.closing(_reader(self._dataset, position.next, self._config)) as reader:
            arrivals = _Arrivals(reader, position.next)
            while True:
                rejects = collections.Counter()
                rows = [self._row(pending, arrivals, bad, rejects) for _ in range(self._shape.rows)]
                batch = packing.assemble(rows, self._shape)
                info = Info(packing.names(rows), dict(rejects))
                _require_supervision(batch, info)
                held = tuple(k for k, _ in pending)
                yield batch, info, _Position(arrivals.next, held, tuple(bad))

    def _row(self, pending, arrivals, bad, rejects) -> list[Document]:
        """Tops up the pending documents and takes a row's worth from them."""
        while len(pending) < self._config.data.pool:
            k, document = next(arrivals)
            if document.rejects:
                rejects.update((document.source, reason) for reason in document.rejects)
                self._count_bad(k, document, bad)
            if len(document):
                pending.append((k, document))
        size = lambda item: (len(item[1]), len(item[1].pixels))  # noqa: E731
        chosen = packing.choose(pending, size, self._shape.tokens, self._shape.images)
        row = [pending[i][1] for i in chosen]
        for i in sorted(chosen, reverse=True):
            del pending[i]
        return row

    def _count_bad(self, k: int, document: Document, bad: collections.deque) -> None:
        """Ends the run where more of the last documents are bad than the config allows."""
        bad.append(k)
        while bad[0] <= k - REJECT_WINDOW:
            bad.popleft()
        allowed = min(self._config.data.bad_samples * REJECT_WINDOW, REJECT_WINDOW - 1)
        if len(bad) > allowed:
            raise DataError(
                f"{len(bad)} of the last {min(k + 1, REJECT_WINDOW)} samples could not be used; "
                f"config.data.bad_samples allows {allowed:.0f} in {REJECT_WINDOW}. The last one is "
                f"{document.key} ({', '.join(document.rejects)}); repair the data or allow more"
            )


class _Arrivals:
    """Documents in order, each with its number; `next` is the number of the next one."""

    def __init__(self, reader: Iterator[Document], start: int):
        self._reader, self.next = reader, start

    def __next__(self) -> tuple[int, Document]:
        document, k = next(self._reader), self.next
        self.next += 1
        return k, document


class _Position(NamedTuple):
    """Where the stream stands.

    Attributes:
      next: the next document to draw.
      pending: drawn documents that no batch holds yet, oldest first.
      bad: those of the last REJECT_WINDOW documents that could not be used.
    """

    next: int = 0
    pending: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()

    def plain(self) -> dict[str, Any]:
        return {"next": self.next, "pending": list(self.pending), "bad": list(self.bad)}

    @classmethod
    def parse(cls, state: Mapping[str, Any]) -> "_Position":
        whole = lambda name: tuple(int(k) for k in state[name])  # noqa: E731
        return cls(int(state["next"]), whole("pending"), whole("bad"))


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


def _stream(config: Config, split: str, opened: Mapping[str, sources.Source], tokenizer: Tokenizer):
    """Document k of training, for every k, as a Grain dataset with random access."""
    # Here and not above: Grain imports jax where jax is installed, and rendering needs none of it.
    import grain

    def render(drawn: tuple[str, int], rng: np.random.Generator) -> Document:
        name, index = drawn
        try:
            example = opened[name].example(index, rng)
        except BadExample as bad:
            return documents.rejected(f"{name}/{split}/{index}", name, bad.reason, config)
        return documents.document(example, config, tokenizer, rng)

    def shuffled(name: str):
        indices = order.shuffled(opened[name], name, config.seed, config.data.views)
        return indices.map(lambda index: (name, int(index)))

    names = list(opened)
    mixed = grain.MapDataset.mix(
        [shuffled(name) for name in names], [config.data.mixture[name] for name in names]
    )
    return mixed.random_map(render, seed=config.seed % 2**32)


def _reader(dataset, start: int, config: Config):
    """Documents `start` and on, in order, made by `data.threads` threads."""
    import grain

    threads = config.data.threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * threads)
    reader = iter(dataset.to_iter_dataset(options, allow_nones=False))
    reader.set_state({"next_index": start})
    return reader


def _fingerprint(
    config: Config, split: str, opened: Mapping[str, sources.Source], tokenizer: Tokenizer
) -> dict[str, Any]:
    """All that decides which documents come in which order, as plain JSON."""
    data = config.data
    return {
        "version": _VERSION,
        "seed": config.seed,
        "split": split,
        "mixture": {name: data.mixture[name] for name in opened},
        "examples": {name: len(source) for name, source in opened.items()},
        "tokenizer": tokenizer.fingerprint,
        "template": data.template,
        "attention": data.attention,
        "images": data.images,
        "rows": data.rows,
        "tokens": data.tokens,
        "images_per_row": data.images_per_row,
        "visual_tokens": config.model.image_positions,
        **_sizes(config),
        **_instructions(config),
        "pool": data.pool,
        "views": data.views,
        **order.fingerprint(opened, data.views),
        **_corpora(opened),
    }


def _corpora(opened: Mapping[str, sources.Source]) -> dict[str, Any]:
    """Of the files of the user's own corpora; nothing where there are none."""
    found = {n: s.fingerprint for n, s in opened.items() if isinstance(s, formats.CorpusSource)}
    return {"corpora": found} if found else {}


def _instructions(config: Config) -> dict[str, Any]:
    """Of what the connector reads; nothing where it reads none."""
    if not config.model.instructed:
        return {}
    reader = tokenizers.for_instructions(config)
    return {"instructions": [reader.fingerprint, config.data.text_tokens]}


def _sizes(config: Config) -> dict[str, Any]:
    """Of the images of all encoders; with one alone as positions were saved at first."""
    # Lists, as JSON gives them back.
    size = config.model.encoder.image_size
    found = {"image_size": size if isinstance(size, int) else list(size)}
    extra = [list(encoder.size) for encoder in config.model.extra_encoders]
    resize = [encoder.resize for encoder in config.model.encoders]
    others = {"resize": list(map(repr, resize))} if any(how != SQUASH for how in resize) else {}
    return found | ({"extra_image_sizes": extra} if extra else {}) | others


def _require_supervision(batch: Batch, info: Info) -> None:
    if batch.loss_weights.any():
        return
    keys = [key for row in info.documents for key, _ in row]
    shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise DataError(f"a batch has nothing to learn from (rejected: {info.rejects}): {shown}")
