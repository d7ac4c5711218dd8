"""SigLIP 2 with images of any grid (NaFlex), names of published Siglip2Model folders."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.config import Model
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights import pictures
from vlm_jax.weights.families import siglip, siglip2_vision_model
from vlm_jax.weights.tables import Row

ARCHITECTURE = "Siglip2Model"
renames = siglip.renames
carried = siglip.carried


def read(hf: Mapping[str, Any]) -> Model:
    """The pair of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    return siglip.read(hf, siglip2_vision_model)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    return siglip.write(model, "siglip2", siglip2_vision_model)


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    return siglip.rows(model, siglip2_vision_model)


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> pictures.Seen:
    """Patches of images and texts."""
    return pictures.with_texts(pictures.NAFLEX, model.encoder, arrays)
