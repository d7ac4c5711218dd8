"""Training rows to look at: one page of HTML that shows what the model is given.

Everything is read from the Batch, so the page shows the masks, places and pictures that a step
would see, not what they were made of. What corpora hold (texts, names of files) is escaped, and the
page runs no script and loads nothing.
"""

import base64
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jinja2
import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.config import Config
from vlm_jax.data import drawing
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.packing import Info
from vlm_jax.data.tally import Span, Tally, spans

SHADES = 8  # of loss weights


class Piece(NamedTuple):
    """What is drawn as one: a token, or a run of an image's visual tokens.

    Attributes:
      kind: "word", "special" or "image".
      text: as it is read; "" where a character goes on in the next token.
      count: positions.
      weight: of their loss.
      token: id.
      slot: of the image that stands here, else -1.
    """

    kind: str
    text: str
    count: int
    weight: float
    token: int
    slot: int


class Picture(NamedTuple):
    """An image of a row.

    Attributes:
      slot: its place in the row.
      seen: for each encoder, a URI with its width and height in pixels.
      text: its second text.
      count: visual tokens of it in the sequence.
    """

    slot: int
    seen: list[tuple[str, int, int]]
    text: str
    count: int


class Document(NamedTuple):
    """A document of a row; `blocks` are its pieces by prefix block, 0 = causal."""

    segment: int
    key: str
    source: str
    tokens: int
    supervised: int
    pictures: list[Picture]
    blocks: list[tuple[int, list[Piece]]]


class Row(NamedTuple):
    """A packed row.

    Attributes:
      batch, number: counted from 0.
      documents: in order.
      bar: runs of positions, (kind, document or 0, how many); kind is "learned", "image",
        "prompt" or "padding".
      orphans: pictures that no token of the row stands for.
      slots: image slots.
    """

    batch: int
    number: int
    documents: list[Document]
    bar: list[tuple[str, int, int]]
    orphans: list[Picture]
    slots: int


def page(config: Config, batches: Iterable[tuple[Batch, Info]], rows: int) -> str:
    """The page.

    Args:
      config: whose batches these are.
      batches: as a stream gives them; one is held at a time.
      rows: how many of each are drawn; counts are of all.
    """
    tally, drawn, reader = Tally(config.model.visual_tokens), [], Reader(config)
    for number, (batch, info) in enumerate(batches):
        tally.add(batch, info)
        shown = range(min(rows, len(info.documents)))
        drawn += [reader.row(batch, info, number, row) for row in shown]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm_jax.data", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    most = max(tally.weights, default=0.0)
    environment.filters |= {
        "shade": lambda weight: shade(weight, most),
        "percent": lambda share: f"{100 * share:.1f} %",
        "visible": visible,
    }
    return environment.get_template("show.html").render(
        config=config,
        tally=tally,
        rows=drawn,
        histograms=base64.b64encode(tally.histograms()).decode(),
    )


def shade(weight: float, most: float) -> int:
    """Of SHADES, 0 for what is not learned."""
    return int(np.ceil(SHADES * weight / most)) if weight > 0 else 0


def visible(text: str) -> str:
    """A text whose line ends, tabs and other controls can be seen."""
    marks = {"\n": "↵\n", "\t": "⇥\t"}
    return "".join(marks.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


class Reader:
    """Reads rows of a config's batches back."""

    def __init__(self, config: Config):
        self._encoders = config.model.encoders
        self._visual_tokens = config.model.visual_tokens
        self._tokenizer = tokenizers.for_config(config)
        instructed = config.model.instructed
        self._seconds = tokenizers.for_instructions(config) if instructed else self._tokenizer

    def row(self, batch: Batch, info: Info, number: int, row: int) -> Row:
        """One row of the batch of that number."""
        found = spans(batch, info, row, self._visual_tokens)
        owned = {slot for span in found for slot in span.slots}
        orphans = [slot for slot in drawing.slots(batch.images, row) if slot not in owned]
        return Row(
            number,
            row,
            [self._document(batch, span) for span in found],
            bar(batch, row),
            [self._picture(batch, row, slot) for slot in orphans],
            batch.images.grids.shape[1],
        )

    def _document(self, batch: Batch, span: Span) -> Document:
        blocks = batch.blocks[span.row, span.places].tolist()
        cuts = [len(list(run)) for _, run in itertools.groupby(blocks)]
        ends = list(itertools.accumulate(cuts, initial=0))
        return Document(
            span.segment,
            span.key,
            span.source,
            len(span.places),
            int((batch.loss_weights[span.row, span.places] > 0).sum()),
            [self._picture(batch, span.row, slot) for slot in span.slots],
            [
                (blocks[start], list(self._pieces(batch, span.row, span.places[start:end])))
                for start, end in itertools.pairwise(ends)
            ],
        )

    def _pieces(self, batch: Batch, row: int, places: np.ndarray) -> Iterator[Piece]:
        tokens = batch.tokens[row, places].tolist()
        weights = batch.loss_weights[row, places].tolist()
        slots = [self._standing(batch, row, place) for place in places]
        of = list(zip(slots, weights, tokens, self._tokenizer.pieces(tokens), strict=True))
        for (slot, weight), run in itertools.groupby(of, key=lambda each: each[:2]):
            run = list(run)
            if slot >= 0:
                yield Piece("image", run[0][3], len(run), weight, run[0][2], slot)
                continue
            for _, _, token, text in run:
                kind = "special" if self._tokenizer.is_special(token) else "word"
                yield Piece(kind, text, 1, weight, token, -1)

    def _standing(self, batch: Batch, row: int, place: int) -> int:
        """The image slot whose visual token or placeholder stands at a position, else -1."""
        visual = int(batch.visual_index[row, place])
        if visual >= 0:
            return visual // self._visual_tokens
        if batch.tokens[row, place] != self._tokenizer.image:
            return -1
        # With cross-attention an image is one placeholder, the first token that looks at it.
        looked = batch.image_index[row]
        return int(looked[place]) if place == 0 or looked[place - 1] != looked[place] else -1

    def _picture(self, batch: Batch, row: int, slot: int) -> Picture:
        seen = []
        for images, encoder in zip((batch.images, *batch.extra_images), self._encoders):
            pixels = drawing.picture(images, row, slot, encoder)
            seen.append((drawing.data_uri(pixels), pixels.shape[1], pixels.shape[0]))
        ids = batch.image_texts[row, slot]
        standing = batch.visual_index[row] // self._visual_tokens == slot
        return Picture(slot, seen, self._seconds.decode(ids[ids > 0]), int(standing.sum()))


def bar(batch: Batch, row: int) -> list[tuple[str, int, int]]:
    """A row as runs of positions of one kind and document."""
    places = zip(
        batch.segments[row].tolist(),
        (batch.loss_weights[row] > 0).tolist(),
        (batch.visual_index[row] >= 0).tolist(),
    )
    kinds = [
        ("padding" if not s else "learned" if learned else "image" if visual else "prompt", s)
        for s, learned, visual in places
    ]
    return [(*kind, len(list(run))) for kind, run in itertools.groupby(kinds)]
