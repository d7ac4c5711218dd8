"""Documents: an Example as tokens, masks and pixels, ready to be packed."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.config import Config
from vlm_jax.data import chat, images, pieces, templates
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.example import Example, Image, ImageRef, Turn
from vlm_jax.data.images import Views
from vlm_jax.data.pictures import Pictures
from vlm_jax.data.pieces import Rendered
from vlm_jax.data.steps import Size
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Document:
    """One sample on its own: L tokens, n images; a picture may be several of them.

    Attributes:
      key, source: of the Example.
      tokens, loss_weights, blocks, visual_index, image_index: as in a Batch, the indices counted
        from the document's own first image.
      pixels: of each image, [h, w, 3], bytes or floats (`images.dtype`); zeros for one that could
        not be used, as large as its header says, or as the encoder's own if there is none.
      extra_pixels: the same images for each of `model.extra_encoders`.
      texts: int32 [n, S], the second text of each image, 0 = padding.
      rejects: why the sample is not learned from, e.g. ("truncated",); its loss weights and texts
        are 0 then.
        A sample too long for any row has no tokens at all.
      truncated: whether its end was cut off.
    """

    key: str
    source: str
    tokens: Int[np.ndarray, " L"]
    loss_weights: Float[np.ndarray, " L"]
    blocks: Int[np.ndarray, " L"]
    visual_index: Int[np.ndarray, " L"]
    image_index: Int[np.ndarray, " L"]
    pixels: Views
    texts: Int[np.ndarray, "n S"]
    rejects: tuple[str, ...] = ()
    extra_pixels: tuple[Views, ...] = ()
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of each image, as the first encoder sees it."""
        return tuple(view.shape[:2] for view in self.pixels)

    @property
    def views(self) -> tuple[Views, ...]:
        """The images as each encoder sees them."""
        return self.pixels, *self.extra_pixels

    def unlearned(self, rejects: tuple[str, ...]) -> "Document":
        """The same document, of which nothing is learned for these reasons."""
        weights, texts = np.zeros_like(self.loss_weights), np.zeros_like(self.texts)
        return dataclasses.replace(self, rejects=rejects, loss_weights=weights, texts=texts)


def document(
    example: Example, config: Config, tokenizer: Tokenizer, rng: np.random.Generator | None = None
) -> Document:
    """The sample as the model reads it; a pure function of its arguments.

    A picture that cannot be used never raises: the document keeps its shape, so that nothing after
    it moves, and is not learned from. One too long for a row becomes empty, or is cut where
    `data.overlong` says so and something to learn is left.

    Args:
      example: the sample.
      config: its model's sizes and `data` are read.
      tokenizer: of the run.
      rng: where augmentation is drawn from; None = evaluation, which changes nothing.
    """
    return drafted(example, config, tokenizer, rng).document()


class Seen(NamedTuple):
    """The pictures of a document.

    Attributes:
      views: all its images as each encoder sees them; blank ones for a picture that is bad.
      rejects: what is wrong with those.
    """

    views: tuple[Views, ...]
    rejects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Draft:
    """A document whose pictures are not decoded yet: all that packing asks.

    Attributes:
      words: the document without pixels.
      sizes: of each image, as the first encoder will see it.
      shown: which pictures it shows, in reading order.
      pictures: of the sample.
      seen: the same, where they are decoded already.
    """

    words: Document
    sizes: tuple[Size, ...] = ()
    shown: tuple[int, ...] = ()
    pictures: Pictures | None = None
    seen: Seen | None = None

    def __len__(self) -> int:
        return len(self.words)

    def see(self) -> Seen:
        """Decodes the pictures, once: what is random of them would be drawn anew."""
        if self.seen is not None:
            return self.seen
        seen, rejects = [], []
        for index in self.shown:
            try:
                seen.append(self.pictures.see(index))
            except images.BadImage as bad:
                seen.append(self.pictures.blank(index))
                rejects.append(bad.reason)
        self.pictures.forget()
        return Seen(_by_encoder(seen, self.pictures.config), tuple(rejects))

    def decoded(self) -> "Draft":
        """The same with its pictures decoded."""
        return dataclasses.replace(self, pictures=None, seen=self.see())

    def document(self) -> Document:
        """The whole document."""
        seen = self.see()
        words = self.words.unlearned(seen.rejects) if seen.rejects else self.words
        pixels, *extra_pixels = seen.views
        return dataclasses.replace(words, pixels=pixels, extra_pixels=tuple(extra_pixels))


def drafted(
    example: Example,
    config: Config,
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
    weight: float = 1.0,
) -> Draft:
    """What `document` does before it looks at pixels; its arguments.

    Args:
      weight: of every token that is learned.
    """
    augment = None if rng is None else config.data.augment
    pictures = Pictures(example.images, config, augment, rng)
    try:
        rendered = render(example.turns, pictures, tokenizer)
    except DataError:  # a system turn, say, under a template that has no place for one
        return rejected(example.key, example.source, "no_place_for_turn", config)
    rendered, truncated = _cut(rendered, config)
    texts = _second_texts(example, rendered, pictures, tokenizer)
    shown = pictures.shown(rendered)
    sizes = pictures.sizes(shown)
    if too_long := _too_long(rendered, texts, config) or _too_many_patches(sizes, config):
        return rejected(example.key, example.source, too_long, config)
    words = _words_of(example.key, example.source, rendered, config, texts, truncated, weight)
    return Draft(words, sizes, shown, pictures)


def rejected(key: str, source: str, reason: str, config: Config) -> Draft:
    """Of a sample that makes no document: one without a token."""
    words = _words_of(key, source, _EMPTY, config, ())
    return Draft(words.unlearned((reason,)), seen=Seen(_by_encoder((), config)))


def _cut(rendered: Rendered, config: Config) -> tuple[Rendered, bool]:
    """As much of a sample as a row holds, where that is the policy; and whether it is a part."""
    longest = config.data.tokens
    if config.data.overlong == "reject" or len(rendered.tokens) <= longest:
        return rendered, False
    part = pieces.cut(rendered, longest)
    return (part, True) if part.loss_weights.any() else (rendered, False)


def prompt_document(
    turns: Sequence[Turn], pictures: Sequence[Image], config: Config, tokenizer: Tokenizer
) -> Document:
    """A conversation up to where the assistant speaks next.

    Raises:
      DataError: a picture cannot be used, or the prompt is longer than `data.tokens` or what the
        connector reads of it longer than `data.text_tokens`.
    """
    prompt = Example("prompt", "prompt", tuple(pictures), tuple(turns))
    shown = Pictures(pictures, config)
    rendered = render(turns, shown, tokenizer, reply=True)
    texts = _second_texts(prompt, rendered, shown, tokenizer)
    reason = _too_long(rendered, texts, config)
    if reason == "too_many_instruction_tokens":
        raise DataError(
            f"what is asked has {max(map(len, texts))} tokens for the connector; "
            f"config.data.text_tokens allows {config.data.text_tokens}"
        )
    if reason:
        raise DataError(
            f"the prompt has {len(rendered.tokens)} tokens and {len(rendered.image_spans)} images; "
            f"config.data allows {config.data.tokens} and {config.data.images_per_row}"
        )
    seen = []
    for index in shown.shown(rendered):
        try:
            seen.append(shown.see(index))
        except images.BadImage as bad:
            raise DataError(f"image {index + 1} of the prompt cannot be used: {bad}") from bad
    words = _words_of(prompt.key, prompt.source, rendered, config, texts)
    return Draft(words, seen=Seen(_by_encoder(seen, config))).document()


def render(
    turns: Sequence[Turn], pictures: Pictures, tokenizer: Tokenizer, reply: bool = False
) -> Rendered:
    """Tokens and loss weights of a conversation under the config's template, without pixels."""
    data = pictures.config.data
    if not data.images:
        turns = [dataclasses.replace(turn, parts=_words(turn)) for turn in turns]
    template = templates.template(data.template)
    return chat.render(template, tokenizer, turns, pictures.layout, reply)


_NONE = np.zeros(0, np.int32)
_EMPTY = Rendered(_NONE, np.zeros(0, np.float32), (), _NONE, _NONE)


def _words(turn: Turn) -> tuple[str, ...]:
    return tuple(part for part in turn.parts if not isinstance(part, ImageRef))


def _second_texts(
    example: Example, rendered: Rendered, pictures: Pictures, tokenizer: Tokenizer
) -> list[list[int]]:
    """Ids of the second text of each image: its own, or what is asked in the turn it stands in."""
    config = pictures.config
    if not config.model.instructed:
        own, size = example.image_texts, config.data.text_tokens
        spans = [span.index for span in rendered.image_spans]
        return [tokenizer.encode(own[i])[:size] if i < len(own) else [] for i in spans]
    if not config.data.images:
        return []
    reader = tokenizers.for_instructions(config)
    found = []
    for turn in example.turns:
        asked = "".join(_words(turn)).strip() if turn.role == "user" else ""
        shown = [part.index for part in turn.parts if isinstance(part, ImageRef)]
        count = sum(pictures.layout(index).images for index in shown)
        found += [reader.encode_alone(asked)] * count
    return found


def _too_long(rendered: Rendered, texts: list[list[int]], config: Config) -> str:
    if len(rendered.tokens) > config.data.tokens:
        return "too_many_tokens"
    if len(rendered.image_spans) > config.data.images_per_row:
        return "too_many_images"
    if any(len(ids) > config.data.text_tokens for ids in texts):
        return "too_many_instruction_tokens"
    return ""


def _too_many_patches(sizes: Sequence[Size], config: Config) -> str:
    """The reason, where the pictures do not fit into a row as the first encoder sees them."""
    room = config.data.patches_per_row
    too_many = room > 0 and images.patches_of(sizes, config.model.encoder.patch) > room
    return "too_many_patches" if too_many else ""


def _words_of(
    key: str,
    source: str,
    rendered: Rendered,
    config: Config,
    second_texts: Sequence[Sequence[int]],
    truncated: bool = False,
    weight: float = 1.0,
) -> Document:
    """A document without its pixels."""
    texts = np.zeros((len(rendered.image_spans), config.data.text_tokens), np.int32)
    for row, ids in zip(texts, second_texts, strict=True):
        row[: len(ids)] = ids
    weights = rendered.loss_weights
    return Document(
        key=key,
        source=source,
        tokens=rendered.tokens,
        loss_weights=weights if weight == 1 else weights * np.float32(weight),
        blocks=_blocks(weights, config.data.attention),
        visual_index=rendered.visual_index,
        image_index=rendered.image_index,
        pixels=(),
        texts=texts,
        truncated=truncated,
    )


def _by_encoder(pictures: Sequence[tuple[Views, ...]], config: Config) -> tuple[Views, ...]:
    """All images of all pictures as each encoder sees them."""
    if len(pictures) == 1:
        return pictures[0]
    return tuple(
        tuple(view for picture in pictures for view in picture[i])
        for i in range(len(config.model.encoders))
    )


def _blocks(weights: Float[np.ndarray, " L"], attention: str) -> Int[np.ndarray, " L"]:
    """With "prefix", each run of tokens that are not learned is one block, counted from 1."""
    prompt = weights == 0
    if attention == "causal" or not len(prompt):
        return np.zeros(len(weights), np.int32)
    starts = prompt & np.concatenate([[True], ~prompt[:-1]])
    return np.where(prompt, np.cumsum(starts), 0).astype(np.int32)
