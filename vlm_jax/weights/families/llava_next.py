"""LLaVA-NeXT (LLaVA 1.6): names of published LlavaNextForConditionalGeneration folders.

A picture is an image of the batch per tile; `presets.anyres` says which of their visual tokens
stand in the sequence. The resolutions that pictures are fitted into are the host's matter: they
stay in config.json.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.presets import anyres
from vlm_jax.presets.connectors import feature_grid
from vlm_jax.weights import fields
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import llava, llava_next_projector
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "LlavaNextForConditionalGeneration"
# transformers' default image_grid_pinpoints.
RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
renames, loaded, carried = llava.renames, llava.loaded, llava.carried


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does, or its features form no square.
    """
    model = llava.read(hf)
    if feature_grid(model.encoder) is None:
        raise ConfigError("llava_next cuts pictures into tiles of patches, without a class token")
    return dataclasses.replace(model, connector=llava_next_projector.read(hf))


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    own = {"model_type": "llava_next", "image_seq_length": model.visual_tokens - 1}
    return llava.write(model) | own


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    newline = Row("newline", "image_newline")
    return [*llava.rows(model), *placed([newline], "connector/")]


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [n, tiles, 3, H, W] of `image_sizes` [n, 2].

    A picture's first tile is all of it; tiles that its size does not ask for are padding.

    Raises:
      DataError: the arrays are of other shapes, or a picture has too few tiles.
    """
    prompts = inputs_.text(arrays, ("pixel_values", "image_sizes"))
    if "pixel_values" not in arrays:
        return prompts
    pixels = inputs_.array(arrays, "pixel_values", 5)
    sizes = [tuple(map(int, size)) for size in inputs_.array(arrays, "image_sizes", 2)]
    if len(sizes) != len(pixels):
        raise DataError(f"{len(sizes)} image_sizes for pixel_values of {len(pixels)} pictures")
    side, grid = model.encoder.size[0], model.encoder.grid
    resolutions = hf.get("image_grid_pinpoints") or RESOLUTIONS
    tiles, pictures = [], []
    for size, given in zip(sizes, pixels, strict=True):
        tiling = anyres.tiling(
            size, resolutions, fields.part(hf, "vision_config").get("image_size", side)
        )
        count = 1 + tiling[0] * tiling[1]
        if len(given) < count:
            raise DataError(f"a picture of {size} pixels has {len(given)} tiles; expected {count}")
        tiles.append(given[:count])
        pictures.append(inputs_.Picture(count, anyres.visual_tokens(size, tiling, grid)))
    images = inputs_.pictures(model.encoder, np.concatenate(tiles))
    return inputs_.in_sequence(prompts, model, llava.image_token(hf), images, pictures)
