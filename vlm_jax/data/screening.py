"""Records that are left out for the sake of others: near-duplicates, and pictures of evaluations.

Before the first shard is made, every picture is looked at once: a file of signatures for the
records of each shard, and for as many of every evaluation corpus. What is left out follows from
these files alone and is a file again. So each step can be done again, and the shards stay pure
functions of the plan and their number.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from jaxtyping import Int, UInt8

from vlm_jax.data import decoding, duplicates, filters, plans
from vlm_jax.data.example import BadExample
from vlm_jax.data.plans import Known, Plan
from vlm_jax.errors import DataError, StorageError

DROPPED = "dropped.json"


class Task(NamedTuple):
    """A part of a corpus to be looked at.

    Attributes:
      corpus: 0 is the one that is prepared, 1 and more are `against` of the plan.
      number: of the part; each has as many records as a shard.
    """

    corpus: int
    number: int


class Signed(NamedTuple):
    """What was seen of n records.

    Attributes:
      counts: pictures of each; -1 where it cannot be used.
      signed: what `duplicates.sign` gave of each picture, one record's after the other's.
    """

    counts: Int[np.ndarray, " n"]
    signed: UInt8[np.ndarray, "pictures bytes"]


def screen(plan: Plan, out: Path, each: Callable[[Callable, Sequence], None]) -> None:
    """Writes which records are left out, if that is not known yet.

    Args:
      plan: with something to look for.
      out: the folder of the plan.
      each: calls a function with each of some tasks, on whatever machine.

    Raises:
      DataError: a corpus changes meanwhile, or none of an evaluation's pictures can be read.
    """
    _known.cache_clear()
    if _read_dropped(out) is not None:
        return
    tasks = [Task(c, n) for c, known in enumerate(_corpora(plan)) for n in _parts(plan, known)]
    each(functools.partial(look, plan, out), [t for t in tasks if _signed(plan, out, t) is None])
    seen = [
        _joined(_signed(plan, out, Task(corpus, n)) for n in _parts(plan, known))
        for corpus, known in enumerate(_corpora(plan))
    ]
    found = {
        "dropped": {str(i): reject for i, reject in sorted(_dropped(plan, seen).items())},
        "unread": {
            known.path: int((one.counts < 0).sum()) for known, one in zip(plan.against, seen[1:])
        },
    }
    plans.write(out / DROPPED, json.dumps(found, ensure_ascii=False).encode())


def look(plan: Plan, out: Path, task: Task) -> None:
    """Writes the signatures of one part of a corpus."""
    known = _corpora(plan)[task.corpus]
    # What is evaluated on is not cleaned: whatever can be seen counts.
    limits = filters.FILTERS["none"] if task.corpus else plan.limits
    source, counts, signed = known.open(), [], []
    for index in _part(plan, known, task.number):
        try:
            _, found = plans.cleaned(source, index, limits, duplicates.sign)
            counts.append(len(found))
            signed += found
        except (BadExample, decoding.BadImage):
            counts.append(-1)
    plans.write(_path(out, task), msgpack.packb([counts, b"".join(signed)]))


def usable(plan: Plan, out: Path, number: int) -> list[bool]:
    """Which of a shard's records, all of whose pictures have been looked at, can be used."""
    seen = _signed(plan, out, Task(0, number))
    if seen is None:
        raise StorageError(f"{_path(out, Task(0, number))} is missing or damaged: run again")
    return (seen.counts >= 0).tolist()


def dropped(out: Path) -> Mapping[str, tuple[str, str]]:
    """Reason and detail by number of each record that is left out.

    Raises:
      StorageError: it is not known.
    """
    return _known(out)["dropped"]


def unread(out: Path) -> Mapping[str, int]:
    """How many records of each evaluation corpus nothing can be compared with, by its path.

    Raises:
      StorageError: it is not known.
    """
    return _known(out)["unread"]


@functools.lru_cache(1)  # once per process, not once per shard
def _known(out: Path) -> Mapping[str, Any]:
    found = _read_dropped(out)
    if found is None:
        raise StorageError(f"{out / DROPPED} is missing or damaged: run again")
    return found


def _read_dropped(out: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads((out / DROPPED).read_bytes())
        return found if found.keys() == {"dropped", "unread"} else None
    except (OSError, ValueError, AttributeError):
        return None


def _corpora(plan: Plan) -> tuple[Known, ...]:
    return plan.corpus, *plan.against


def _parts(plan: Plan, known: Known) -> range:
    return range(-(-known.records // plan.per_shard))


def _part(plan: Plan, known: Known, number: int) -> range:
    first = number * plan.per_shard
    return range(first, min(first + plan.per_shard, known.records))


def _path(out: Path, task: Task) -> Path:
    return out / f"look-{task.corpus}-{task.number:05d}.msgpack"


def _signed(plan: Plan, out: Path, task: Task) -> Signed | None:
    """What was seen of a part, if its file is whole."""
    expected = len(_part(plan, _corpora(plan)[task.corpus], task.number))
    try:
        said, data = msgpack.unpackb(_path(out, task).read_bytes())
        counts = np.array(said, np.int64)
        signed = np.frombuffer(data, np.uint8).reshape(-1, duplicates.SIZE)
    except (OSError, ValueError, TypeError, msgpack.UnpackException):
        return None
    whole = counts.shape == (expected,) and len(signed) == counts.clip(0).sum()
    return Signed(counts, signed) if whole else None


def _joined(parts: Iterable[Signed]) -> Signed:
    counts, signed = zip(*parts)
    return Signed(np.concatenate(counts), np.concatenate(signed))


def _dropped(plan: Plan, seen: list[Signed]) -> dict[int, tuple[str, str]]:
    """Reason and detail by number, of all that is left out."""
    own, *theirs = seen
    found: dict[int, tuple[str, str]] = {}
    for known, evaluated in zip(plan.against, theirs, strict=True):
        found = dict(_evaluated(known, own, evaluated, plan.near)) | found
    if plan.deduplicate:
        found |= _repeated(plan, own, without=sorted(found))
    return found


def _evaluated(
    known: Known, own: Signed, evaluated: Signed, near: int
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Records that show what an evaluation shows, any of its pictures in any of theirs."""
    if not len(evaluated.signed):
        raise DataError(f"{known.path} has no picture that can be read: nothing to look for")
    pictures, wanted = (duplicates.read(seen.signed[:, None]) for seen in (own, evaluated))
    found = duplicates.nearest(wanted, pictures, near)
    records, theirs = _owners(own), _owners(evaluated)
    for picture in np.flatnonzero(found >= 0)[::-1].tolist():  # so that the first one counts
        where = known.open().records.where(int(theirs[found[picture]]))
        yield int(records[picture]), ("evaluation_image", f"near to a picture of {where}")


def _owners(seen: Signed) -> Int[np.ndarray, " pictures"]:
    """The number of the record that each picture is of."""
    return np.repeat(np.arange(len(seen.counts)), seen.counts.clip(0))


def _repeated(
    plan: Plan, seen: Signed, without: list[int]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Records that show what an earlier one shows: as many pictures, in the same order.

    Records of text alone are none's duplicates, and those `without` keep no other out.
    """
    starts = np.cumsum(seen.counts.clip(0)) - seen.counts.clip(0)
    counts = seen.counts.copy()
    counts[without] = -1
    where = plan.corpus.open().records.where
    for count in np.unique(counts[counts > 0]):
        records = np.flatnonzero(counts == count)
        signed = seen.signed[starts[records, None] + np.arange(count)]
        owners = duplicates.firsts(duplicates.read(signed), plan.near)
        for place in np.flatnonzero(owners >= 0):
            kept = where(int(records[owners[place]]))
            yield int(records[place]), ("near_duplicate", f"near to {kept}, which is kept")
