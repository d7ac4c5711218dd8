"""Any corpus as shards: cleaned, read and written once, in parallel, again after a kill.

Which records go to which shard is decided before the first is written and depends on the source
alone. A shard is one pure function of its records, and where records are left out for the sake of
others, of what was found before (`screening.py`): written beside its place, then renamed. What is
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
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import Corpus
from vlm_jax.data import decoding, engines, filters, formats, plans, screening, shards
from vlm_jax.data.example import BadExample, Example
from vlm_jax.data.plans import Plan
from vlm_jax.data.shards import MANIFEST, VERSION, Shard
from vlm_jax.errors import ConfigError, DataError, StorageError
from vlm_jax.schema import unknown_key

SAMPLED = 256  # records by which the size of all is estimated


def run(
    corpus: Corpus,
    out: Path,
    *,
    shard_bytes: int,
    limits: filters.Limits = filters.FILTERS["none"],
    deduplicate: bool = False,
    against: Sequence[Corpus] = (),
    near: int = 4,
    engine: str = "local",
    **options,
) -> dict[str, Any]:
    """Prepares a corpus.

    Args:
      corpus: with its one split.
      out: the folder for shards and manifest.
      shard_bytes: how large a shard should be.
      limits, deduplicate, against, near: see Plan.
      engine: of `engines.ENGINES`.
      **options: `workers` (processes; 0 = this one) and `beam_options` of an engine.

    Returns:
      The manifest: version, plan, shards, records, and rejects by reason; where evaluation corpora
      were looked for, `unread`: how many of their records nothing could be compared with.

    Raises:
      ConfigError: the folder holds another corpus, or this one under another plan, or another run
        writes there.
      DataError: a corpus cannot be read, or changes meanwhile.
      StorageError: the folder cannot be written, or a worker died.
    """
    if engine not in engines.ENGINES:
        raise ConfigError(unknown_key(engine, engines.ENGINES).replace("config key", "engine"))
    each = functools.partial(engines.ENGINES[engine], **options)
    plans.Known.open.cache_clear()  # what an earlier run of this process opened may have changed
    known, source = plans.find(corpus)
    plan = Plan(
        known,
        _per_shard(source, shard_bytes),
        limits,
        deduplicate,
        tuple(plans.find(other)[0] for other in against),
        near,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            plans.keep_to(plan, out)
            for left in out.glob("*.tmp"):
                left.unlink()  # of a run that was killed
            if plan.screened:
                screening.screen(plan, out, each)
            missing = [i for i in range(plan.shards) if _finished(plan, out, i) is None]
            each(functools.partial(make_shard, plan, out), missing)
            return _finish(plan, out)
    except (OSError, concurrent.futures.BrokenExecutor) as error:
        raise StorageError(f"{out}: {error}") from error


def make_shard(plan: Plan, out: Path, number: int) -> None:
    """Writes one shard, and beside it what it holds and what it lacks."""
    from array_record.python.array_record_module import ArrayRecordWriter

    source, path, count, rejects = plan.corpus.open(), out / plan.name(number), 0, []
    temporary = plans.temporary(path)
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for index, example in _examples(plan, out, number):
            if isinstance(example, Example):
                writer.write(shards.pack(example))
                count += 1
            else:
                reason, detail = example
                where = source.records.where(index)
                rejects.append({"where": where, "reason": reason, "detail": detail})
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
    plans.replace(temporary, path)
    lines = [json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects]
    plans.write(path.with_suffix(".rejects.jsonl"), "".join(lines).encode())
    # Last: what says that the shard is whole.
    plans.write(path.with_suffix(".json"), json.dumps(dataclasses.asdict(found)).encode())


def _examples(
    plan: Plan, out: Path, number: int
) -> Iterator[tuple[int, Example | tuple[str, str]]]:
    """A shard's records by number: examples, or why there is none."""
    source, span = plan.corpus.open(), plan.span(number)
    dropped = screening.dropped(out) if plan.screened else {}
    # Pictures that have been decoded once are not decoded again.
    seen = screening.usable(plan, out, number) if plan.screened else [False] * len(span)
    for index, usable in zip(span, seen, strict=True):
        if str(index) in dropped:
            yield index, tuple(dropped[str(index)])
            continue
        try:
            read = plans.loaded if usable else _cleaned
            yield index, read(source, index, plan.limits)
        except (BadExample, decoding.BadImage) as bad:
            yield index, (bad.reason, str(bad))


def _cleaned(source: formats.CorpusSource, index: int, limits: filters.Limits) -> Example:
    return plans.cleaned(source, index, limits)[0]


def _per_shard(source: formats.CorpusSource, shard_bytes: int) -> int:
    """How many records make a shard of that size, judged by some spread over the corpus."""
    sizes = []
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)):
        with contextlib.suppress(BadExample, decoding.BadImage):
            example = plans.loaded(source, int(index), filters.FILTERS["none"])
            sizes.append(len(shards.pack(example)))
    if not sizes:
        raise DataError(f"none of {SAMPLED} records of the corpus can be used: validate it")
    return max(1, round(shard_bytes / (sum(sizes) / len(sizes))))


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


def _finished(plan: Plan, out: Path, number: int) -> Shard | None:
    """What a shard holds, if it is whole."""
    path = out / plan.name(number)
    try:
        shard = Shard(**json.loads(path.with_suffix(".json").read_text()))
        return shard if path.stat().st_size == shard.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def _finish(plan: Plan, out: Path) -> dict[str, Any]:
    found = [_finished(plan, out, number) for number in range(plan.shards)]
    rejects = collections.Counter()
    for shard in found:
        rejects.update(shard.rejects)
    manifest = {
        "version": VERSION,
        "plan": plan.plain(),
        "shards": [dataclasses.asdict(shard) for shard in found],
        "records": sum(shard.records for shard in found),
        "rejects": dict(sorted(rejects.items())),
    }
    if plan.against:
        manifest["unread"] = dict(screening.unread(out))
    if manifest["records"] + rejects.total() != plan.corpus.records:
        said = f"{plan.corpus.records} records came in, {manifest['records']} went out"
        raise StorageError(f"{out}: {said}")
    plans.write(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def rejected(out: Path) -> Iterator[dict[str, str]]:
    """What a prepared corpus lacks: `where`, `reason` and `detail` of each record, in order."""
    for path in sorted(out.glob("shard-*.rejects.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())
