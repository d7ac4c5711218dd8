"""A conversation under a chat template becomes tokens and their loss weights in one pass.

Text between two images or special tokens is encoded as one piece, as the published recipes do, and
a token is learned if the character at which it starts is: there is no second tokenisation whose
lengths could disagree with the first.
"""

import bisect
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.data.example import ImageRef, Part, Turn
from vlm_jax.data.templates import Template
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import DataError


class ImageSpan(NamedTuple):
    """Where the visual tokens of an image stand: `start` in the tokens, `index` in the example."""

    start: int
    index: int


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as the decoder reads it.

    Attributes:
      tokens: the placeholder id stands `visual_tokens` times for every image.
      loss_weights: 1 on answers and their ends, 0 elsewhere.
      image_spans: in reading order.
    """

    tokens: Int[np.ndarray, " T"]
    loss_weights: Float[np.ndarray, " T"]
    image_spans: tuple[ImageSpan, ...]


class _Piece(NamedTuple):
    value: str | int | ImageRef  # text, a token id, or an image
    learned: bool = False
    apart: bool = False  # from the text before it


def render(
    template: Template,
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    visual_tokens: int,
    reply: bool = False,
) -> Rendered:
    """Tokens and loss weights of a conversation.

    Args:
      template: a row of `templates.TEMPLATES`.
      tokenizer: must have the template's special tokens.
      turns: the conversation.
      visual_tokens: placeholders per image.
      reply: end where the assistant would speak next, for generation.

    Raises:
      ConfigError: the tokenizer lacks a special token of the template.
      DataError: a role is neither "user" nor "assistant", nor "system" as the first of a template
        that has a place for it.
    """
    tokens: list[int] = []
    weights: list[float] = []
    spans: list[ImageSpan] = []
    for piece in _joined(_pieces(template, tokenizer, turns, reply)):
        if isinstance(piece, _Text):
            ids, learned = piece.encode(tokenizer)
        elif isinstance(piece.value, ImageRef):
            spans.append(ImageSpan(len(tokens), piece.value.index))
            ids, learned = [tokenizer.image] * visual_tokens, [0.0] * visual_tokens
        else:
            ids, learned = [piece.value], [float(piece.learned)]
        tokens += ids
        weights += learned
    return Rendered(np.array(tokens, np.int32), np.array(weights, np.float32), tuple(spans))


def end_tokens(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The ids after which an answer is complete."""
    if template.eos or not template.answer[1]:  # nothing but the end of the document, then
        return [tokenizer.eos]
    # Behind a letter, because "###" is another token at the start of a text (LLaMA's tokenizer).
    *_, end = _joined(_literal(template, tokenizer, "x" + template.answer[1]))
    if not isinstance(end, _Text):
        return [end.value]
    return tokenizer.encode(end.text)[len(tokenizer.encode("x")) :]


def end_token(template: Template, tokenizer: Tokenizer) -> int:
    """The last of `end_tokens`, at which generation stops."""
    return end_tokens(template, tokenizer)[-1]


def _pieces(
    template: Template, tokenizer: Tokenizer, turns: Sequence[Turn], reply: bool
) -> Iterator[_Piece]:
    """The conversation from left to right."""
    moved = [part for turn in turns for part in turn.parts if isinstance(part, ImageRef)]
    system, turns = _system(template, tokenizer, turns)
    if template.images == "front":
        yield from _framed(template, tokenizer, moved)
    if template.bos:
        yield _Piece(tokenizer.bos)
    if template.images == "document":
        yield from _framed(template, tokenizer, moved)
    yield from _literal(template, tokenizer, template.start)
    if not template.system_in_user:
        yield from system
    first = True
    for turn in turns:
        if turn.role == "user":
            if template.bos_again and not first:
                yield _Piece(tokenizer.bos)
            yield from _literal(template, tokenizer, template.user[0])
            if template.system_in_user and first:
                yield from system
            yield from _asked(template, tokenizer, turn)
            first = False
        elif turn.role == "assistant":
            yield from _answered(template, tokenizer, turn)
        else:
            raise DataError(
                f"a turn has role {turn.role!r}; expected 'user' or 'assistant', or as the first "
                "'system', where the chat template has a place for it"
            )
    if reply:
        yield from _literal(template, tokenizer, template.assistant)
    elif template.last_eos:
        yield _Piece(tokenizer.eos, learned=True)


def _system(
    template: Template, tokenizer: Tokenizer, turns: Sequence[Turn]
) -> tuple[list[_Piece], Sequence[Turn]]:
    """The system text in its frame, the sample's own or the template's, and the other turns."""
    if template.system is None:
        return [], turns
    turn = Turn("system", (template.system_text,))
    if turns and turns[0].role == "system":
        turn, *turns = turns
    said = [piece for piece in _said(template, tokenizer, turn) if piece.value]
    before, after = (list(_literal(template, tokenizer, text)) for text in template.system)
    return before + said + after if said else [], turns


def _asked(template: Template, tokenizer: Tokenizer, turn: Turn) -> Iterator[_Piece]:
    if not isinstance(next(iter(turn.parts), ""), ImageRef):
        yield from _literal(template, tokenizer, template.user_lead)
    yield from _said(template, tokenizer, turn)
    yield from _literal(template, tokenizer, template.user[1])


def _answered(template: Template, tokenizer: Tokenizer, turn: Turn) -> Iterator[_Piece]:
    yield from _literal(template, tokenizer, template.assistant)
    yield _Piece(template.answer[0], learned=True, apart=template.apart)
    yield from _said(template, tokenizer, turn, learned=True)
    yield from _literal(template, tokenizer, template.answer[1], learned=True)
    if template.eos:
        yield _Piece(tokenizer.eos, learned=True)
    yield from _literal(template, tokenizer, template.after)


def _literal(
    template: Template, tokenizer: Tokenizer, text: str, learned: bool = False
) -> Iterator[_Piece]:
    """The template's own text, in which its special tokens are tokens."""
    if not template.specials:
        yield _Piece(text, learned)
        return
    for part in re.split("(" + "|".join(map(re.escape, template.specials)) + ")", text):
        yield _Piece(tokenizer.special(part) if part in template.specials else part, learned)


def _said(
    template: Template, tokenizer: Tokenizer, turn: Turn, learned: bool = False
) -> Iterator[_Piece]:
    """What a role says, images in their frames."""
    parts = list(turn.parts)
    pictures = [part for part in parts if isinstance(part, ImageRef)]
    text = "".join(part for part in parts if isinstance(part, str))
    if template.images == "turn" and pictures:
        parts = [*pictures, text.strip()]
    elif template.images in ("document", "front"):
        parts = [text]
    if template.strip:
        parts = _stripped(parts)
    if not (learned or template.user_text):
        parts = pictures
    yield from _framed(template, tokenizer, parts, learned)


def _stripped(parts: Sequence[Part]) -> list[Part]:
    """Parts without white space around the whole of them."""
    parts = list(parts)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def _framed(
    template: Template, tokenizer: Tokenizer, parts: Sequence[Part], learned: bool = False
) -> Iterator[_Piece]:
    """Text as it is, images in their frames."""
    last = None
    for part in parts:
        if isinstance(part, ImageRef):
            if not (template.image_shared and isinstance(last, ImageRef)):
                yield from _literal(template, tokenizer, template.image[0])
            yield _Piece(part)
            yield from _literal(template, tokenizer, template.image[1])
        else:
            yield _Piece(part, learned)
        last = part


class _Text:
    """Neighbouring texts, encoded together."""

    def __init__(self):
        self.text, self.starts, self.learned = "", [], []

    def add(self, piece: _Piece):
        self.starts.append(len(self.text))
        self.learned.append(float(piece.learned))
        self.text += piece.value

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        ids, starts = tokenizer.encode_with_starts(self.text)
        return ids, [self.learned[bisect.bisect_right(self.starts, at) - 1] for at in starts]


def _joined(pieces: Iterator[_Piece]) -> Iterator[_Piece | _Text]:
    """Pieces with neighbouring texts joined, empty ones dropped."""
    text = _Text()
    for piece in pieces:
        if text.text and (piece.apart or not isinstance(piece.value, str)):
            yield text
            text = _Text()
        if not isinstance(piece.value, str):
            yield piece
        elif piece.value:
            text.add(piece)
    if text.text:
        yield text
