"""Batches of held-out examples and of prompts: one document per row, in order.

What is asked about a held-out example is the same in every run and at every step.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging

from vlm_jax.batch import Batch
from vlm_jax.config import Config
from vlm_jax.data import documents, packing, sources
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.example import BadExample, Example, Image, ImageRef, Turn
from vlm_jax.data.images import dtype
from vlm_jax.data.packing import Info
from vlm_jax.data.pictures import Pictures
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import ConfigError, DataError

LENGTH_STEP = 32  # rows are a multiple of this long, so that few programs are compiled

_SEED = 20_000  # of the questions that held-out examples ask, in every run


def eval_examples(config: Config, split: str, kind: str, limit: int = 0) -> list[Example]:
    """Held-out examples, the same in every run and at every step.

    Args:
      config: its mixture says which source a kind is of.
      split: e.g. "validation".
      kind: e.g. "caption", or a whole source name.
      limit: how many, spread over the split; 0 = all. Records that make no example are left out,
        with a warning.
    """
    source = sources.open_source(_source_of(config, kind), split, 0, config.data.corpora)
    indices = np.arange(len(source))
    if limit and limit < len(source):
        order = np.random.default_rng(_SEED).permutation(len(source))
        indices = np.sort(order[:limit])
    examples = []
    for i in map(int, indices):
        try:
            examples.append(source.example(i, np.random.default_rng((_SEED, i))))
        except BadExample as bad:
            logging.warning("record %d of %s, %s, is left out: %s", i, kind, split, bad)
    return examples


def eval_batches(
    config: Config, split: str, kind: str, limit: int = 0, images: str = "right"
) -> Iterator[tuple[Batch, Info]]:
    """Batches of held-out examples, one document per row, the last batch filled with empty rows.

    Args:
      config, split, kind, limit: as for `eval_examples`, whose order the rows keep.
      images: "right", "shuffled" (the pictures of another example of the kind) or "none".

    Raises:
      ConfigError: an unknown kind, split or `images`.
      DataError: "shuffled" where all examples show the same pictures.
    """
    if images not in ("right", "shuffled", "none"):
        raise ConfigError(f"images is {images!r}; expected 'right', 'shuffled' or 'none'")
    examples = eval_examples(config, split, kind, limit)
    if images == "shuffled":
        examples = shuffle_images(examples)
    if images == "none":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, images=False))
    yield from batches(config, examples)


def batches(config: Config, examples: Sequence[Example]) -> Iterator[tuple[Batch, Info]]:
    """The same of given examples."""
    tokenizer = tokenizers.for_config(config)
    rendered = []
    for example in examples:
        # What the template has no place for becomes an empty row, which is counted.
        with contextlib.suppress(DataError):
            pictures = Pictures(example.images, config)
            rendered.append(documents.render(example.turns, pictures, tokenizer))
    shape = _one_per_row(config, tokenizer, rendered)
    for part in _chunks(examples, shape.rows):
        rows = [[documents.document(example, config, tokenizer)] for example in part]
        rejects = collections.Counter((d.source, why) for (d,) in rows for why in d.rejects)
        yield packing.assemble(rows, shape), Info(packing.names(rows), dict(rejects))


def shuffle_images(examples: Sequence[Example]) -> list[Example]:
    """Every example with the pictures of another one, never its own.

    The other one is half the list away, or the next after it that shows something else.

    Raises:
      DataError: all examples show the same pictures.
    """
    count = len(examples)

    def donor(index: int) -> Example:
        for step in range(count):
            other = examples[(index + count // 2 + step) % count]
            if other.images and not set(other.images) & set(examples[index].images):
                return other
        raise DataError(f"none of {count} examples has other pictures than {examples[index].key}")

    def swapped(index: int, example: Example) -> Example:
        given = itertools.islice(itertools.cycle(donor(index).images), len(example.images))
        return dataclasses.replace(example, images=tuple(given))

    return [swapped(i, e) if e.images else e for i, e in enumerate(examples)]


# Prompts ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What generation starts from: turns that end with the user's, and their pictures."""

    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()


def prompt_of(example: Example) -> Prompt:
    """An example up to its last answer."""
    last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant")
    return Prompt(example.turns[:last], example.images)


def ask(text: str, *images: Image) -> Prompt:
    """A prompt of one turn: the images, then the text."""
    refs = tuple(ImageRef(i) for i in range(len(images)))
    return Prompt((Turn("user", refs + ((text,) if text else ())),), images)


def prompt_batches(config: Config, prompts: Iterable[Prompt]) -> Iterator[Batch]:
    """Prompts one per row, left-aligned, in order; the last batch is filled with empty rows.

    Raises:
      DataError: a picture cannot be used, or a prompt is too long.
    """
    prompts, tokenizer = list(prompts), tokenizers.for_config(config)
    shown = [Pictures(prompt.images, config) for prompt in prompts]
    rendered = [
        documents.render(prompt.turns, pictures, tokenizer, reply=True)
        for prompt, pictures in zip(prompts, shown, strict=True)
    ]
    shape = _one_per_row(config, tokenizer, rendered)
    make = functools.partial(documents.prompt_document, config=config, tokenizer=tokenizer)
    for part in _chunks(prompts, shape.rows):
        yield packing.assemble([[make(p.turns, p.images)] for p in part], shape)


def _one_per_row(config: Config, tokenizer: Tokenizer, rendered) -> packing.Shape:
    """The smallest common shape, on a grid of lengths, of documents that get a row each."""
    longest = max((len(r.tokens) for r in rendered), default=1)
    # A slot even where no example has an image: an encoder never meets an empty axis.
    images = max([1, *(len(r.image_spans) for r in rendered)]) if config.data.images else 0
    # A text tower reads its last position, which padding fills.
    fits = longest if not config.model.pair else config.data.tokens
    return packing.shape_of(
        config,
        tokenizer.pad,
        rows=config.eval.rows,
        tokens=min(-(-fits // LENGTH_STEP) * LENGTH_STEP, config.data.tokens),
        images=min(images, config.data.images_per_row),
        patches=0,
        dtype=dtype(None),
    )


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _source_of(config: Config, kind: str) -> str:
    """The source name of a kind: the mixture's own, else the first there is."""
    if ":" in kind or kind in config.data.corpora:
        return kind
    known = [*config.data.mixture, *sources.names()]
    return next((name for name in known if name.partition(":")[2] == kind), kind)
