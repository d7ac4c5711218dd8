"""A model that answers: prompts and pictures in, text out, in batches of static shape."""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image as PilImage

from vlm_jax import config as configs
from vlm_jax.batch import Batch, Images
from vlm_jax.data import chat, heldout, templates
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.decoding import BadImage, decode
from vlm_jax.data.example import Example, Image
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import devices
from vlm_jax.evaluation.vision import Vision
from vlm_jax.models import params as parameters
from vlm_jax.models import prefixes, sampling
from vlm_jax.models.sva import Visual
from vlm_jax.presets.generation import Generation

GREEDY = Generation()

Picture = PilImage.Image | bytes | str | Path


class Predictor:
    """Answers of one model, compiled once per shape of batch.

    Args:
      config: the run; without `data.images` the pictures are not looked at.
      params: flat parameters.
      vision: what the same parameters saw before, to be shared.
    """

    def __init__(
        self, config: configs.Config, params: Mapping[str, Array], vision: Vision | None = None
    ):
        self.config, self.params = config, params
        self.vision = vision or Vision(config, params)
        self.tokenizer = tokenizers.for_config(config)
        # Generation stops at one id: of an end of several, what comes before it is cut afterwards.
        *rest, self._end = chat.end_tokens(templates.template(config.data.template), self.tokenizer)
        self._rest = self.tokenizer.decode(rest)

    def generate(
        self,
        images: Sequence[Picture | Sequence[Picture] | None],
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        *,
        seed: int = 0,
        **options,
    ) -> list[str]:
        """The model's reply to each prompt; its pictures come first, then its words.

        Args:
          images: per prompt one picture, a list of them, or None; a picture is a PIL image, encoded
            bytes or a path.
          prompts: what the user says.
          max_new_tokens: length limit of a reply; by default `config.eval.max_new_tokens`.
          seed: of what is drawn; the draws of prompt i depend on (seed, i) alone.
          **options: further fields of `Generation`, such as temperature, top_p, beams or stop.

        Raises:
          ValueError: `images` and `prompts` differ in length.
          ConfigError: options are out of range or contradict each other.
          DataError: a picture cannot be used, or a prompt is too long.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"{len(images)} entries of images for {len(prompts)} prompts; expected one entry "
                "per prompt: a picture, a list of pictures, or None"
            )
        asked = [
            heldout.ask(prompt, *_encoded(group))
            for group, prompt in zip(images, prompts, strict=True)
        ]
        return self._complete(asked, Generation(max_new_tokens, **options), seed)

    def answer(self, examples: Sequence[Example]) -> list[str]:
        """The model's reply where each example's last reply stands."""
        return self._complete([heldout.prompt_of(example) for example in examples])

    def attention(self, images: Sequence[Picture]) -> Float[np.ndarray, "N Q P"] | None:
        """Where each visual token looks in each picture, over its patches in reading order.

        Mean over the heads of a Perceiver connector's last block; None for a connector without
        attention.
        """
        if self.config.model.connector.kind != "perceiver" or not self.config.data.images:
            return None
        attend = _compiled_attention(self.config.model)
        asked = [heldout.ask("", *_encoded(picture)) for picture in images]
        maps = [
            devices.fetch(attend(self.params, devices.place(_all_images(batch))))[:, 0]
            for batch in heldout.prompt_batches(self.config, asked)
        ]
        return np.concatenate(maps)[: len(asked)].astype(np.float32)

    def _complete(
        self,
        asked: Sequence[heldout.Prompt],
        options: Generation = GREEDY,
        seed: int = 0,
    ) -> list[str]:
        for field, expected in options.problems():
            raise ConfigError(f"{field} is {getattr(options, field)!r}; expected {expected}")
        if not self.config.data.images:
            asked = [dataclasses.replace(prompt, images=()) for prompt in asked]
        if options.temperature:
            return self._replies(asked, options, seed)
        # Without pictures most questions are the same.
        different = list(dict.fromkeys(asked))
        replies = dict(zip(different, self._replies(different, options, seed), strict=True))
        return [replies[prompt] for prompt in asked]

    def _replies(
        self, asked: Sequence[heldout.Prompt], options: Generation, seed: int
    ) -> list[str]:
        limit = options.max_new_tokens or self.config.eval.max_new_tokens
        options = dataclasses.replace(options, max_new_tokens=limit)
        ends = self._ends(options.stop)
        strings = tuple(stop for stop in options.stop if isinstance(stop, str))
        generate = _compiled(self.config.model, ends, dataclasses.replace(options, stop=()))
        replies = []
        for batch in heldout.prompt_batches(self.config, asked):
            self._check_length(batch.tokens.shape[1] + limit)
            numbers = np.arange(len(replies), len(replies) + len(batch.tokens), dtype=np.uint32)
            inputs = *self.vision.inputs(batch), devices.place(numbers)
            tokens = devices.fetch(generate(self.params, *inputs, np.uint32(seed)))
            replies += [self._text(row, ends, strings) for row in tokens]
        return replies[: len(asked)]  # the last batch is filled up with empty rows

    def _ends(self, stop: Sequence[str | int]) -> tuple[int, ...]:
        """Ids that end a reply: the template's own, those given, and strings that are one token."""
        ids = [self._end]
        for one in stop:
            known = [one] if isinstance(one, int) else self.tokenizer.single(one)
            ids += [i for i in known if i not in ids]
        return tuple(ids)

    def _check_length(self, length: int) -> None:
        """Raises DataError where a decoder with a table of positions has none for the last ones."""
        decoder = self.config.model.decoder
        table = (
            decoder.positions - decoder.position_offset - prefixes.length(self.params, "decoder")
        )
        if decoder.position == "learned" and length > table:
            raise DataError(
                f"prompt and reply have up to {length} tokens; the decoder's table of positions "
                f"has {table}: ask for fewer new tokens, or shorten the prompt"
            )

    def _text(
        self, tokens: Int[np.ndarray, " new"], ends: Sequence[int], strings: Sequence[str] = ()
    ) -> str:
        """The reply before the first end token and the first of the strings."""
        ended = np.flatnonzero(np.isin(tokens, ends))
        kept = tokens[: ended[0]] if len(ended) else tokens
        text = self.tokenizer.decode(kept.tolist())
        text = text.removesuffix(self._rest) if len(ended) else text
        found = [at for at in map(text.find, strings) if at >= 0]
        return text[: min(found, default=len(text))].strip()


@functools.cache
def _compiled(model: configs.Model, ends: tuple[int, ...], options: Generation):
    """One compiled function for all parameters of a model."""

    def generate(
        params: Mapping[str, Array],
        batch: Batch,
        visual: Float[Array, "B N Q D"] | Visual,
        numbers: Int[Array, " B"],
        seed: Int[Array, ""],
    ) -> Int[Array, "B new"]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        vlm = parameters.build(model, params)
        return sampling.generate(vlm, batch, visual, options, ends, keys)

    return jax.jit(generate)


@functools.cache
def _compiled_attention(model: configs.Model):
    def attention(
        params: Mapping[str, Array], images: tuple[Images, ...]
    ) -> Float[Array, "B N Q P"]:
        return parameters.build(model, params).attention_maps(images)

    return jax.jit(attention)


def _all_images(batch: Batch) -> tuple[Images, ...]:
    return batch.images, *batch.extra_images


def _encoded(pictures: Picture | Sequence[Picture] | None) -> tuple[Image, ...]:
    if pictures is None:
        return ()
    if isinstance(pictures, (PilImage.Image, bytes, str, Path)):
        pictures = (pictures,)
    return tuple(_encode(picture) for picture in pictures)


def _encode(picture: Picture) -> Image:
    if isinstance(picture, PilImage.Image):
        buffer = io.BytesIO()
        try:
            PilImage.fromarray(decode(picture)).save(buffer, "PNG")
        except BadImage as bad:
            raise DataError(f"a picture cannot be used: {bad}") from bad
        return buffer.getvalue()
    return Path(picture) if isinstance(picture, str) else picture
