"""A conversation under a chat template becomes tokens and their loss weights in one pass."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from vlm_jax.data import layout
from vlm_jax.data.example import ImageRef, Part, Turn
from vlm_jax.data.layout import Layout
from vlm_jax.data.pieces import Made, Piece, Rendered, Text, View, joined
from vlm_jax.data.templates import Template
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import DataError


def render(
    template: Template,
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    pictures: int | Callable[[int], Layout],
    reply: bool = False,
) -> Rendered:
    """Tokens and loss weights of a conversation.

    Args:
      template: a row of `templates.TEMPLATES`.
      tokenizer: must have the template's special tokens.
      turns: the conversation.
      pictures: how the example's picture of a number stands in the sequence; or how many visual
        tokens each has, being one image.
      reply: end where the assistant would speak next, for generation.

    Raises:
      ConfigError: the tokenizer lacks a special token of the template.
      DataError: a role is neither "user" nor "assistant", nor "system" as the first of a template
        that has a place for it.
    """
    if isinstance(pictures, int):
        alike = layout.whole(pictures)
        pictures = lambda _: alike  # noqa: E731
    turns = _laid_out(turns, pictures)
    made = Made()
    for piece in joined(_pieces(template, tokenizer, turns, reply)):
        if isinstance(piece, Text):
            made.add(*piece.encode(tokenizer))
        elif isinstance(piece.value, View):
            made.see(piece.value, tokenizer.image)
        else:
            made.add([piece.value], [float(piece.learned)])
    return made.rendered()


def _laid_out(turns: Sequence[Turn], pictures: Callable[[int], Layout]) -> list[Turn]:
    """Turns with the stretches of a picture instead of a reference to it."""
    count = sum(isinstance(part, ImageRef) for turn in turns for part in turn.parts)
    numbers = itertools.count()

    def views(part: Part) -> list[Part]:
        if not isinstance(part, ImageRef):
            return [part]
        found, number = pictures(part.index), next(numbers)
        return [
            View(part.index, stretch, found, n == 0, number if count > 1 else None)
            for n, stretch in enumerate(found.stretches)
        ]

    return [Turn(t.role, tuple(v for part in t.parts for v in views(part))) for t in turns]


def end_tokens(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The ids after which an answer is complete."""
    if template.eos or not template.answer[1]:  # nothing but the end of the document, then
        return [tokenizer.eos]
    # Behind a letter, because "###" is another token at the start of a text (LLaMA's tokenizer).
    *_, end = joined(_literal(template, tokenizer, "x" + template.answer[1]))
    if not isinstance(end, Text):
        return [end.value]
    return tokenizer.encode(end.text)[len(tokenizer.encode("x")) :]


def end_token(template: Template, tokenizer: Tokenizer) -> int:
    """The last of `end_tokens`, at which generation stops."""
    return end_tokens(template, tokenizer)[-1]


def _pieces(
    template: Template, tokenizer: Tokenizer, turns: Sequence[Turn], reply: bool
) -> Iterator[Piece]:
    """The conversation from left to right."""
    moved = [part for turn in turns for part in turn.parts if isinstance(part, ImageRef)]
    system, turns = _system(template, tokenizer, turns)
    if template.images == "front":
        yield from _framed(template, tokenizer, moved)
    if template.bos:
        yield Piece(tokenizer.bos)
    if template.images == "document":
        yield from _framed(template, tokenizer, moved)
    yield from _literal(template, tokenizer, template.start)
    if not template.system_in_user:
        yield from system
    first = True
    for turn in turns:
        if turn.role == "user":
            if template.bos_again and not first:
                yield Piece(tokenizer.bos)
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
        yield Piece(tokenizer.eos, learned=True)


def _system(
    template: Template, tokenizer: Tokenizer, turns: Sequence[Turn]
) -> tuple[list[Piece], Sequence[Turn]]:
    """The system text in its frame, the sample's own or the template's, and the other turns."""
    if template.system is None:
        return [], turns
    turn = Turn("system", (template.system_text,))
    if turns and turns[0].role == "system":
        turn, *turns = turns
    said = [piece for piece in _said(template, tokenizer, turn) if piece.value]
    before, after = (list(_literal(template, tokenizer, text)) for text in template.system)
    return before + said + after if said else [], turns


def _asked(template: Template, tokenizer: Tokenizer, turn: Turn) -> Iterator[Piece]:
    if not isinstance(next(iter(turn.parts), ""), ImageRef):
        yield from _literal(template, tokenizer, template.user_lead)
    yield from _said(template, tokenizer, turn)
    yield from _literal(template, tokenizer, template.user[1])


def _answered(template: Template, tokenizer: Tokenizer, turn: Turn) -> Iterator[Piece]:
    yield from _literal(template, tokenizer, template.assistant)
    yield Piece(template.answer[0], learned=True, apart=template.apart)
    yield from _said(template, tokenizer, turn, learned=True)
    yield from _literal(template, tokenizer, template.answer[1], learned=True)
    if template.eos:
        yield Piece(tokenizer.eos, learned=True)
    yield from _literal(template, tokenizer, template.after)


def _literal(
    template: Template, tokenizer: Tokenizer, text: str, learned: bool = False
) -> Sequence[Piece]:
    """The template's own text, in which its special tokens are tokens."""
    if not text:
        return ()
    if not template.specials:
        return (Piece(text, learned),)
    return [
        Piece(tokenizer.special(part) if part in template.specials else part, learned)
        for part in _cut(text, template.specials)
        if part
    ]


@functools.lru_cache(maxsize=1024)  # templates have a few texts, and samples use them all
def _cut(text: str, specials: tuple[str, ...]) -> list[str]:
    return re.split("(" + "|".join(map(re.escape, specials)) + ")", text)


def _said(
    template: Template, tokenizer: Tokenizer, turn: Turn, learned: bool = False
) -> Iterator[Piece]:
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
        parts = [part for part in parts if isinstance(part, ImageRef)]
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
) -> Iterator[Piece]:
    """Text as it is, images in their frames."""
    last = None
    for part in parts:
        if isinstance(part, View):
            shared = template.image_shared and isinstance(last, View)
            before, after = _around(template, part, shared)
            yield from _literal(template, tokenizer, before)
            yield Piece(part)
            yield from _literal(template, tokenizer, after)
        else:
            yield Piece(part, learned)
        last = part


def _around(template: Template, view: View, shared: bool) -> tuple[str, str]:
    """Text before and after a stretch of a picture."""
    stretch = view.stretch
    numbered = view.first and view.number is not None
    start = template.image_number.format(view.number) if numbered else ""
    if template.tile and stretch.tile is not None:
        row, column = stretch.tile
        before = template.tile.format(row=row, column=column)
        return start + before, template.tile_row if stretch.last else ""
    start += template.after_tiles if template.tile and stretch.behind else ""
    before, after = template.image
    return start + ("" if shared else before), after
