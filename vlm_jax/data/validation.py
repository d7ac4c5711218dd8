"""What is wrong with a corpus, record by record, before a run is spent on it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vlm_jax.data import decoding
from vlm_jax.data.example import BadExample, Example
from vlm_jax.data.formats import CorpusSource


class Problem(NamedTuple):
    """Something wrong.

    Attributes:
      where: the file and the record's place in it.
      reason: as runs count it.
      detail: what was given and what was expected.
    """

    where: str
    reason: str
    detail: str


def problems(source: CorpusSource, decode: bool = False) -> Iterator[Problem]:
    """All problems of a corpus, in order.

    Args:
      source: the corpus.
      decode: also decode every image, which finds the damage behind headers.
    """
    seen: dict[str, str] = {}
    rng = np.random.default_rng(0)
    for index in range(len(source)):
        where = source.records.where(index)
        try:
            example = source.example(index, rng)
        except BadExample as bad:
            yield Problem(where, bad.reason, bad.detail)
            continue
        key = example.meta.get("id")
        if key and seen.setdefault(key, where) != where:
            yield Problem(where, "duplicate_id", f"id {key!r} stands at {seen[key]} as well")
        yield from (Problem(where, *found) for found in _of_images(example, decode))


def _of_images(example: Example, decode: bool) -> Iterator[tuple[str, str]]:
    for i, path in enumerate(example.images):
        try:
            decoding.decode(path) if decode else decoding.check(path)
        except decoding.BadImage as bad:
            name = "" if isinstance(path, bytes) else f", {path}"
            yield bad.reason, f"image {i + 1}{name}: {bad}"
