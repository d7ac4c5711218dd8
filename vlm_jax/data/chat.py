"""Chat templates: a conversation becomes tokens and their loss weights in one pass.

A template is a row of strings. Text between two images or special tokens is encoded as one piece,
as the published recipes do, and a token is learned if the character at which it starts is: there is
no second tokenisation whose lengths could disagree with the first.
"""

import bisect
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.data.example import ImageRef, Turn
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.schema import unknown_key


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around what the roles say.

    Attributes:
      bos: whether a document starts with the beginning-of-sequence token.
      system: text before the first turn.
      user: text before and after what the user says.
      assistant: text before the answer, given and not learned; generation starts after it.
      answer: text before and after the answer, learned with it.
      eos: whether the end-of-sequence token, learned, follows every answer.
      after: text behind the end of every answer, given and not learned.
      image: text before and after every image.
      images_first: whether the images of a turn move to its start, and its text is stripped then.
      user_text: whether what the user writes is kept; if not, only its images are.
      specials: strings of this template that are single tokens of the tokenizer.
    """

    bos: bool = True
    system: str = ""
    user: tuple[str, str] = ("", "")
    assistant: str = ""
    answer: tuple[str, str] = ("", "")
    eos: bool = True
    after: str = ""
    image: tuple[str, str] = ("", "")
    images_first: bool = False
    user_text: bool = True
    specials: tuple[str, ...] = ()


CHATML = Template(
    bos=False,
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant="<|im_start|>assistant\n",
    after="\n",
    specials=("<|im_start|>", "<|im_end|>"),
)

TEMPLATES = {
    # Ours, for the embedded tokenizer: <bos><user>{images and text}<assistant>{answer}<eos>
    "tiny": Template(
        user=("<user>", ""), assistant="<assistant>", specials=("<user>", "<assistant>")
    ),
    # LLaVA's first stage (train.py, preprocess_plain): image, caption, end of line; no prompt.
    "plain": Template(answer=("", "\n"), eos=False, user_text=False),
    # LLaVA-1.5 (conversation.py, conv_vicuna_v1; train.py, preprocess_multimodal, preprocess_v1).
    "vicuna_v1": Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
        ),
        user=("USER: ", " "),
        assistant="ASSISTANT:",
        answer=(" ", ""),
        image=("", "\n"),
        images_first=True,
    ),
    # ChatML, for tokenizers whose end of sequence is <|im_end|>; Qwen2.5's without its system text.
    "chatml": CHATML,
    # The chat_template of SmolLM2-Instruct's tokenizer_config.json, and its system text.
    "smollm2": dataclasses.replace(
        CHATML,
        system=(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n"
        ),
    ),
}


def template(name: str) -> Template:
    """A template by name.

    Raises:
      ConfigError: the name is not in the table.
    """
    if name not in TEMPLATES:
        raise ConfigError(unknown_key(name, TEMPLATES).replace("config key", "data.template"))
    return TEMPLATES[name]


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


def render(
    template: Template,
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    visual_tokens: int,
    reply: bool = False,
) -> Rendered:
    """Tokens and loss weights of a conversation.

    Args:
      template: a row of `TEMPLATES`.
      tokenizer: must have the template's special tokens.
      turns: the conversation.
      visual_tokens: placeholders per image.
      reply: end where the assistant would speak next, for generation.

    Raises:
      ConfigError: the tokenizer lacks a special token of the template.
      DataError: a role is neither "user" nor "assistant".
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


def end_token(template: Template, tokenizer: Tokenizer) -> int:
    """The id after which an answer is complete."""
    return tokenizer.eos if template.eos else tokenizer.encode(template.answer[1])[-1]


def _pieces(
    template: Template, tokenizer: Tokenizer, turns: Sequence[Turn], reply: bool
) -> Iterator[_Piece]:
    """The conversation from left to right."""
    if template.bos:
        yield _Piece(tokenizer.bos)
    yield from _literal(template, tokenizer, template.system)
    for turn in turns:
        if turn.role == "user":
            yield from _literal(template, tokenizer, template.user[0])
            yield from _said(template, turn, learned=False)
            yield from _literal(template, tokenizer, template.user[1])
        elif turn.role == "assistant":
            yield from _literal(template, tokenizer, template.assistant)
            yield _Piece(template.answer[0], learned=True)
            yield from _said(template, turn, learned=True)
            yield _Piece(template.answer[1], learned=True)
            if template.eos:
                yield _Piece(tokenizer.eos, learned=True)
            yield from _literal(template, tokenizer, template.after)
        else:
            raise DataError(f"a turn has role {turn.role!r}; expected 'user' or 'assistant'")
    if reply:
        yield from _literal(template, tokenizer, template.assistant)


def _literal(template: Template, tokenizer: Tokenizer, text: str) -> Iterator[_Piece]:
    """The template's own text, in which its special tokens are tokens."""
    if not template.specials:
        yield _Piece(text)
        return
    for part in re.split("(" + "|".join(map(re.escape, template.specials)) + ")", text):
        yield _Piece(tokenizer.special(part) if part in template.specials else part)


def _said(template: Template, turn: Turn, learned: bool) -> Iterator[_Piece]:
    """What a role says, images in their frames."""
    parts = list(turn.parts)
    if template.images_first and any(isinstance(part, ImageRef) for part in parts):
        text = "".join(part for part in parts if isinstance(part, str)).strip()
        parts = [part for part in parts if isinstance(part, ImageRef)] + [text]
    for part in parts:
        if isinstance(part, ImageRef):
            yield _Piece(template.image[0])
            yield _Piece(part)
            yield _Piece(template.image[1])
        elif learned or template.user_text:
            yield _Piece(part, learned)


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
        if isinstance(piece.value, str):
            if piece.value:
                text.add(piece)
            continue
        if text.text:
            yield text
            text = _Text()
        yield piece
    if text.text:
        yield text
