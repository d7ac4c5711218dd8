"""Pieces of a conversation, from left to right, and the tokens they become.

Text between two images or special tokens is encoded as one piece, as the published recipes do, and
a token is learned if the character at which it starts is: there is no second tokenisation whose
lengths could disagree with the first.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.data.example import ImageRef
from vlm_jax.data.layout import Layout, Stretch
from vlm_jax.data.tokenizer import Tokenizer


class ImageSpan(NamedTuple):
    """Where an image of the batch begins: `start` in the tokens, `index` in the example."""

    start: int
    index: int


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as the decoder reads it.

    Attributes:
      tokens: the placeholder id stands where a visual token will.
      loss_weights: 1 on answers and their ends, 0 elsewhere.
      image_spans: one for every image of the batch, in reading order.
      visual_index: which visual token stands there, counted from the conversation's first; -1 =
        none.
      image_index: the last image at or before each token; -1 = none.
    """

    tokens: Int[np.ndarray, " T"]
    loss_weights: Float[np.ndarray, " T"]
    image_spans: tuple[ImageSpan, ...]
    visual_index: Int[np.ndarray, " T"]
    image_index: Int[np.ndarray, " T"]

    ALONG: ClassVar = ("tokens", "loss_weights", "visual_index", "image_index")


def cut(rendered: Rendered, length: int) -> Rendered:
    """The first tokens, none of a picture that would not stand there whole."""
    spans = rendered.image_spans
    behind = rendered.image_index[length:][rendered.visual_index[length:] >= 0]
    if len(behind):
        first = int(behind.min())
        while first and spans[first - 1].index == spans[first].index:  # tiles of one picture
            first -= 1
        length = min(length, spans[first].start)
    kept = {name: getattr(rendered, name)[:length] for name in Rendered.ALONG}
    return Rendered(image_spans=tuple(s for s in spans if s.start < length), **kept)


@dataclasses.dataclass(frozen=True)
class View(ImageRef):
    """A stretch of a picture, the first one or a later.

    Attributes:
      stretch: its place.
      layout: of the picture.
      first: whether the picture begins here.
      number: of the picture in the conversation; None = it is the only one.
    """

    stretch: Stretch
    layout: Layout
    first: bool
    number: int | None


class Piece(NamedTuple):
    value: str | int | View  # text, a token id, or a stretch of a picture
    learned: bool = False
    apart: bool = False  # from the text before it


class Made:
    """A conversation as far as it is rendered."""

    def __init__(self):
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.views: list[tuple[int, int, View]] = []  # where each begins, after how many images
        self.spans: list[ImageSpan] = []
        self.images = 0  # before the current picture

    def add(self, ids: Sequence[int], weights: Sequence[float]) -> None:
        self.tokens += ids
        self.weights += weights

    def see(self, view: View, placeholder: int) -> None:
        if view.first:
            self.images = len(self.spans)
        before, start, count = self.images, len(self.tokens), len(view.stretch.visual)
        self.views.append((start, before, view))
        self.add([placeholder] * count, [0.0] * count)
        if view.first and not view.layout.visual_tokens:  # beside the text, not in it
            self.spans += [ImageSpan(start, view.index)] * view.layout.images
        for image, at in _firsts(view.stretch.image.tobytes(), view.stretch.image.dtype):
            if before + image == len(self.spans):
                self.spans.append(ImageSpan(start + at, view.index))

    def rendered(self) -> Rendered:
        visual, image = np.full((2, len(self.tokens)), -1, np.int32)
        for start, before, view in self.views:
            stretch, here = view.stretch, slice(start, start + len(view.stretch.visual))
            visual[here] = stretch.visual
            if before:
                visual[here][stretch.visual >= 0] += before * view.layout.visual_tokens
            image[here] = stretch.image + before
        return Rendered(
            tokens=np.array(self.tokens, np.int32),
            loss_weights=np.array(self.weights, np.float32),
            image_spans=tuple(self.spans),
            visual_index=visual,
            image_index=np.maximum.accumulate(image) if len(image) else image,
        )


@functools.lru_cache(maxsize=1024)  # pictures of one size look alike here
def _firsts(images: bytes, dtype: np.dtype) -> list[tuple[int, int]]:
    """The images that positions look at, ascending, and the first position of each."""
    found, at = np.unique(np.frombuffer(images, dtype), return_index=True)
    return list(zip(found.tolist(), at.tolist(), strict=True))


class Text:
    """Neighbouring texts, encoded together."""

    def __init__(self):
        self.text, self.starts, self.learned = "", [], []

    def add(self, piece: Piece):
        self.starts.append(len(self.text))
        self.learned.append(float(piece.learned))
        self.text += piece.value

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        ids, starts = tokenizer.encode_with_starts(self.text)
        return ids, [self.learned[bisect.bisect_right(self.starts, at) - 1] for at in starts]


def joined(pieces: Iterator[Piece]) -> Iterator[Piece | Text]:
    """Pieces with neighbouring texts joined, empty ones dropped."""
    text = Text()
    for piece in pieces:
        if text.text and (piece.apart or not isinstance(piece.value, str)):
            yield text
            text = Text()
        if not isinstance(piece.value, str):
            yield piece
        elif piece.value:
            text.add(piece)
    if text.text:
        yield text
