"""Documents: an Example as tokens, masks and pixels, ready to be packed."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.config import Config
from vlm_jax.data import chat, images, pieces, templates
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.example import Example, Image, ImageRef, Turn
from vlm_jax.data.images import Views
from vlm_jax.data.pictures import Pictures
from vlm_jax.data.pieces import Rendered
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

    def weighed(self, factor: float) -> "Document":
        """The same document, each of its tokens `factor` times as important."""
        if factor == 1:
            return self
        return dataclasses.replace(self, loss_weights=self.loss_weights * np.float32(factor))


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
    draft = drafted(example, config, tokenizer, rng)
    draft.see()
    return draft.document()


@dataclasses.dataclass
class Draft:
    """A sample whose words are tokens; `see()` makes its pixels, `document()` what it becomes.

    Attributes:
      example: the sample.
      rendered: its tokens, none where it is known to be of no use.
      texts: the second text of each image.
      pictures: of the sample.
      rejects: why it is of no use, as far as is known.
      truncated: whether its end was cut off.
      seen: of every picture its views for each encoder.
    """

    example: Example
    rendered: Rendered
    texts: list[list[int]]
    pictures: Pictures
    rejects: list[str]
    truncated: bool = False
    seen: list[tuple[Views, ...]] = dataclasses.field(default_factory=list)

    def see(self) -> None:
        """Decodes the pictures; one that cannot be used is blank."""
        for index in self.pictures.shown(self.rendered):
            try:
                self.seen.append(self.pictures.see(index))
            except images.BadImage as bad:
                self.seen.append(self.pictures.blank(index))
                self.rejects.append(bad.reason)
        self.pictures.forget()

    def document(self) -> Document:
        """What it has become."""
        config = self.pictures.config
        if _too_many_patches([view for first, *_ in self.seen for view in first], config):
            return _build(self.example, _EMPTY, config, [], (), ("too_many_patches",))
        made = self.rendered, config, self.texts, self.seen, tuple(self.rejects), self.truncated
        return _build(self.example, *made)


def drafted(
    example: Example, config: Config, tokenizer: Tokenizer, rng: np.random.Generator | None = None
) -> Draft:
    """What `document` does before it looks at pixels; its arguments."""
    augment = None if rng is None else config.data.augment
    pictures = Pictures(example.images, config, augment, rng)
    try:
        rendered = render(example.turns, pictures, tokenizer)
    except DataError:  # a system turn, say, under a template that has no place for one
        return Draft(example, _EMPTY, [], pictures, ["no_place_for_turn"])
    rendered, truncated = _cut(rendered, config)
    texts = _second_texts(example, rendered, pictures, tokenizer)
    if too_long := _too_long(rendered, texts, config):
        return Draft(example, _EMPTY, [], pictures, [too_long])
    return Draft(example, rendered, texts, pictures, [], truncated)


def rejected(key: str, source: str, reason: str, config: Config) -> Draft:
    """Of a record that makes no Example."""
    return Draft(Example(key, source, (), ()), _EMPTY, [], Pictures((), config), [reason])


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
    return _build(prompt, rendered, config, texts, seen, ())


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


def _too_many_patches(pictures: Sequence[Float[np.ndarray, "H W 3"]], config: Config) -> bool:
    """Whether the pictures do not fit into a row, as the first encoder sees them."""
    room = config.data.patches_per_row
    return room > 0 and images.patches_of(pictures, config.model.encoder.patch) > room


def _build(
    example: Example,
    rendered: Rendered,
    config: Config,
    second_texts: Sequence[Sequence[int]],
    pictures: Sequence[tuple[Views, ...]],
    rejects: tuple[str, ...],
    truncated: bool = False,
) -> Document:
    size = config.data.text_tokens
    texts = np.zeros((len(rendered.image_spans), size), np.int32)
    for row, ids in zip(texts, second_texts, strict=True):
        row[: 0 if rejects else len(ids)] = () if rejects else ids
    weights = rendered.loss_weights
    pixels, *extra_pixels = _by_encoder(pictures, config)
    return Document(
        key=example.key,
        source=example.source,
        tokens=rendered.tokens,
        loss_weights=np.zeros_like(weights) if rejects else weights,
        blocks=_blocks(weights, config.data.attention),
        visual_index=rendered.visual_index,
        image_index=rendered.image_index,
        pixels=pixels,
        texts=texts,
        rejects=rejects,
        extra_pixels=tuple(extra_pixels),
        truncated=truncated,
    )


def _by_encoder(pictures: Sequence[tuple[Views, ...]], config: Config) -> list[Views]:
    """All images of all pictures as each encoder sees them."""
    return [
        tuple(view for picture in pictures for view in picture[i])
        for i in range(len(config.model.encoders))
    ]


def _blocks(weights: Float[np.ndarray, " L"], attention: str) -> Int[np.ndarray, " L"]:
    """With "prefix", each run of tokens that are not learned is one block, counted from 1."""
    prompt = weights == 0
    if attention == "causal" or not len(prompt):
        return np.zeros(len(weights), np.int32)
    starts = prompt & np.concatenate([[True], ~prompt[:-1]])
    return np.where(prompt, np.cumsum(starts), 0).astype(np.int32)
