"""Any corpus as shards: cleaned, read and written once, in parallel, again after a kill.

Which records go to which shard is decided before the first is written and depends on the source
alone. A shard is one pure function of its records: written beside its place, then renamed. What is
there is not made again, so a run that was killed goes on, and ends with the same bytes.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import Corpus
from vlm_jax.data import decoding, formats, shards
from vlm_jax.data.example import BadExample, Example
from vlm_jax.data.shards import MANIFEST, VERSION, Shard
from vlm_jax.errors import ConfigError, DataError, StorageError

PLAN = "plan.json"
SAMPLED = 256  # records by which the size of all is estimated


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which records go where.

    Attributes:
      format, path, images: of the corpus.
      fingerprint: of its records.
      records: how many it has.
      per_shard: how many of them, good or bad, make a shard.
      min_side, max_aspect: limits on images.
    """

    format: str
    path: str
    images: str
    fingerprint: str
    records: int
    per_shard: int
    min_side: int = 1
    max_aspect: float = 200.0

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.records // self.per_shard)

    def name(self, number: int) -> str:
        """The file of a shard."""
        return f"shard-{number:05d}-of-{self.shards:05d}.arrayrecord"


def run(corpus: Corpus, out: Path, *, shard_bytes: int, workers: int = 0, **limits) -> dict:
    """Prepares a corpus.

    Args:
      corpus: with its one split.
      out: the folder for shards and manifest.
      shard_bytes: how large a shard should be.
      workers: processes; 0 = this one.
      **limits: `min_side` and `max_aspect` of a Plan.

    Returns:
      The manifest: version, plan, shards, records, and rejects by reason.

    Raises:
      ConfigError: the folder holds another corpus, or this one under another plan, or another run
        writes there.
      DataError: the corpus cannot be read, or changes meanwhile.
      StorageError: the folder cannot be written, or a worker died.
    """
    (path,) = (os.path.abspath(os.path.expanduser(path)) for path in corpus.paths.values())
    images = os.path.abspath(os.path.expanduser(corpus.images)) if corpus.images else ""
    source = _source(corpus.format, path, images)
    plan = Plan(
        format=corpus.format,
        path=path,
        images=images,
        fingerprint=source.fingerprint,
        records=len(source),
        per_shard=_per_shard(source, shard_bytes),
        **limits,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            _keep_to(plan, out)
            for left in out.glob("*.tmp"):
                left.unlink()  # of a run that was killed
            missing = [i for i in range(plan.shards) if _finished(plan, out, i) is None]
            _make(plan, out, missing, workers)
            return _finish(plan, out)
    except (OSError, concurrent.futures.BrokenExecutor) as error:
        raise StorageError(f"{out}: {error}") from error


def make_shard(plan: Plan, out: Path, number: int) -> None:
    """Writes one shard, and beside it what it holds and what it lacks."""
    from array_record.python.array_record_module import ArrayRecordWriter

    source = _planned(plan)
    first = number * plan.per_shard
    path, count, rejects = out / plan.name(number), 0, []
    temporary = path.with_suffix(".tmp")
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for index in range(first, min(first + plan.per_shard, plan.records)):
            try:
                writer.write(shards.pack(_cleaned(source, index, plan)))
                count += 1
            except (BadExample, decoding.BadImage) as bad:
                rejects.append(
                    {"where": source.records.where(index), "reason": bad.reason, "detail": str(bad)}
                )
        writer.close()
    except RuntimeError as error:  # the writer's word for a full disk
        raise StorageError(str(error)) from error
    with open(temporary, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found = Shard(
        name=path.name,
        records=count,
        bytes=temporary.stat().st_size,
        sha256=sha256,
        rejects=dict(sorted(collections.Counter(r["reason"] for r in rejects).items())),
    )
    _sync(temporary)
    os.replace(temporary, path)
    lines = [json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects]
    _write(path.with_suffix(".rejects.jsonl"), "".join(lines))
    # Last: what says that the shard is whole.
    _write(path.with_suffix(".json"), json.dumps(dataclasses.asdict(found)))


def _source(format: str, path: str, images: str) -> formats.CorpusSource:
    return formats.CorpusSource("corpus", Corpus(format, {"all": path}, images), "all")


@functools.lru_cache(1)
def _planned(plan: Plan) -> formats.CorpusSource:
    """The corpus of a plan: found once per process, not once per shard.

    Raises:
      DataError: it is no longer the one that was planned.
    """
    source = _source(plan.format, plan.path, plan.images)
    if (source.fingerprint, len(source)) != (plan.fingerprint, plan.records):
        raise DataError(f"{plan.path} changed while it was read: run again, into an empty folder")
    return source


def _per_shard(source: formats.CorpusSource, shard_bytes: int) -> int:
    """How many records make a shard of that size, judged by some spread over the corpus."""
    sizes = []
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)):
        with contextlib.suppress(BadExample, decoding.BadImage):
            sizes.append(len(shards.pack(_loaded(source, int(index)))))
    if not sizes:
        raise DataError(f"none of {SAMPLED} records of the corpus can be used: validate it")
    return max(1, round(shard_bytes / (sum(sizes) / len(sizes))))


def _loaded(source: formats.CorpusSource, index: int) -> Example:
    """An example with the bytes of its images."""
    example = source.example(index, np.random.default_rng(0))
    return dataclasses.replace(example, images=tuple(map(decoding.read, example.images)))


def _cleaned(source: formats.CorpusSource, index: int, plan: Plan) -> Example:
    """An example all of whose images can be used."""
    example = _loaded(source, index)
    for image in example.images:
        height, width = decoding.decode(image).shape[:2]
        if min(height, width) < plan.min_side:
            raise BadExample("too_small", f"{width} x {height}; expected sides of {plan.min_side}")
        if max(height, width) > plan.max_aspect * min(height, width):
            raise BadExample(
                "too_narrow", f"{width} x {height}; expected at most 1 to {plan.max_aspect}"
            )
    return example


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the folder: two runs would take each other's half-written files for their own."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill releases it
        yield
    except BlockingIOError as error:
        raise ConfigError(
            f"another run writes to {out}: wait for it, or choose another folder"
        ) from error
    finally:
        os.close(folder)


def _keep_to(plan: Plan, out: Path) -> None:
    """Writes the plan, or refuses to mix two."""
    path, said = out / PLAN, dataclasses.asdict(plan)
    if not path.exists():
        if any(out.glob("shard-*")):
            raise ConfigError(f"{out} holds shards without a {PLAN}; choose another folder")
        _write(path, json.dumps(said))
    try:
        known = dict(json.loads(path.read_text()).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no plan: choose another folder, or empty this one") from error
    for name in {**known, **said}:
        if known.get(name) != said.get(name):
            raise ConfigError(
                f"{out} was begun with {name} {known.get(name)!r}, not {said.get(name)!r}: go on "
                "with the old one, or choose another folder"
            )


def _finished(plan: Plan, out: Path, number: int) -> Shard | None:
    """What a shard holds, if it is whole."""
    path = out / plan.name(number)
    try:
        shard = Shard(**json.loads(path.with_suffix(".json").read_text()))
        return shard if path.stat().st_size == shard.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def _make(plan: Plan, out: Path, missing: list[int], workers: int) -> None:
    if not workers:
        for number in missing:
            make_shard(plan, out, number)
        return
    # Spawned: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        try:
            for done in [pool.submit(make_shard, plan, out, number) for number in missing]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or it first makes all the other shards
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _finish(plan: Plan, out: Path) -> dict[str, Any]:
    found = [_finished(plan, out, number) for number in range(plan.shards)]
    rejects = collections.Counter()
    for shard in found:
        rejects.update(shard.rejects)
    manifest = {
        "version": VERSION,
        "plan": dataclasses.asdict(plan),
        "shards": [dataclasses.asdict(shard) for shard in found],
        "records": sum(shard.records for shard in found),
        "rejects": dict(sorted(rejects.items())),
    }
    if manifest["records"] + rejects.total() != plan.records:
        raise StorageError(f"{out}: {plan.records} records came in, {manifest['records']} went out")
    _write(out / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def rejected(out: Path) -> Iterator[dict[str, str]]:
    """What a prepared corpus lacks: `where`, `reason` and `detail` of each record, in order."""
    for path in sorted(out.glob("shard-*.rejects.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def _write(path: Path, text: str) -> None:
    """Writes a file at once or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
