"""Records that are left out for the sake of others: near-duplicates, and pictures of evaluations.

Before the first shard is made, every picture is looked at once: a file of signatures for the
records of each shard, and for as many of every evaluation corpus. What is left out follows from
these files alone and is a file again. So each step can be done again, and the shards stay pure
functions of the plan and their number.
"""

import collections
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from jaxtyping import Int

from vlm_jax.data import decoding, duplicates, filters, plans
from vlm_jax.data.example import BadExample
from vlm_jax.data.plans import Known, Plan
from vlm_jax.errors import DataError, StorageError

DROPPED = "dropped.json"

# Of each record, the signatures of its pictures; None where it cannot be used.
Signed = list[list[bytes] | None]


class Task(NamedTuple):
    """A part of a corpus to be looked at.

    Attributes:
      corpus: 0 is the one that is prepared, 1 and more are `against` of the plan.
      number: of the part; each has as many records as a shard.
    """

    corpus: int
    number: int


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
    signed = [
        [s for n in _parts(plan, known) for s in _signed(plan, out, Task(corpus, n))]
        for corpus, known in enumerate(_corpora(plan))
    ]
    found = {
        "dropped": {str(i): reject for i, reject in sorted(_dropped(plan, signed).items())},
        "unread": {known.path: many.count(None) for known, many in zip(plan.against, signed[1:])},
    }
    plans.write(out / DROPPED, json.dumps(found, ensure_ascii=False).encode())


def look(plan: Plan, out: Path, task: Task) -> None:
    """Writes the signatures of one part of a corpus."""
    known = _corpora(plan)[task.corpus]
    # What is evaluated on is not cleaned: whatever can be seen counts.
    limits = filters.FILTERS["none"] if task.corpus else plan.limits
    source, signed = known.open(), []
    for index in _part(plan, known, task.number):
        try:
            signed.append(plans.cleaned(source, index, limits, duplicates.sign)[1])
        except (BadExample, decoding.BadImage):
            signed.append(None)
    plans.write(_path(out, task), msgpack.packb(signed))


def usable(plan: Plan, out: Path, number: int) -> list[bool]:
    """Which of a shard's records, all of whose pictures have been looked at, can be used."""
    signed = _signed(plan, out, Task(0, number))
    if signed is None:
        raise StorageError(f"{_path(out, Task(0, number))} is missing or damaged: run again")
    return [pictures is not None for pictures in signed]


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
        signed = msgpack.unpackb(_path(out, task).read_bytes())
        return signed if len(signed) == expected else None
    except (OSError, ValueError, TypeError, msgpack.UnpackException):
        return None


def _dropped(plan: Plan, signed: list[Signed]) -> dict[int, tuple[str, str]]:
    """Reason and detail by number, of all that is left out."""
    own, *theirs = signed
    found = dict(_evaluated(plan, own, theirs))
    if plan.deduplicate:
        # A record that is left out keeps no other out.
        rest = [None if i in found else pictures for i, pictures in enumerate(own)]
        found.update(_repeated(plan, rest))
    return found


def _evaluated(
    plan: Plan, own: Signed, theirs: list[Signed]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Records that show what an evaluation shows."""
    places, pictures = _pictures(own)
    for known, many in zip(plan.against, theirs, strict=True):
        owners, evaluated = _pictures(many)
        if not evaluated:
            raise DataError(f"{known.path} has no picture that can be read: nothing to look for")
        if not pictures:
            continue
        found = duplicates.nearest(duplicates.read(evaluated), duplicates.read(pictures), plan.near)
        source = known.open()
        for place, picture in zip(places, found):
            if picture >= 0:
                where = source.records.where(owners[picture])
                yield place, ("evaluation_image", f"near to a picture of {where}")


def _pictures(signed: Signed) -> tuple[list[int], list[list[bytes]]]:
    """Every picture as a record of its own, and the numbers of the records that they are of."""
    places = [i for i, pictures in enumerate(signed) for _ in pictures or ()]
    return places, [[picture] for pictures in signed for picture in pictures or ()]


def _repeated(plan: Plan, signed: Signed) -> Iterator[tuple[int, tuple[str, str]]]:
    """Records that show what an earlier one shows: as many pictures, in the same order."""
    by_count: dict[int, list[int]] = collections.defaultdict(list)
    for index, pictures in enumerate(signed):
        if pictures:  # records of text alone are none's duplicates
            by_count[len(pictures)].append(index)
    source = plan.corpus.open()
    for indices in by_count.values():
        owners: Int[np.ndarray, " n"] = duplicates.firsts(
            duplicates.read([signed[i] for i in indices]), plan.near
        )
        for place in np.flatnonzero(owners >= 0):
            where = source.records.where(indices[owners[place]])
            yield indices[place], ("near_duplicate", f"near to {where}, which is kept")
