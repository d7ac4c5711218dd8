"""LLaVA-NeXT's projector and newline: names as in the state_dict of transformers'
`LlavaNextModel`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.connectors import Connector
from vlm_jax.weights.families import llava_projector
from vlm_jax.weights.tables import Row

CARRIED = llava_projector.CARRIED
write = llava_projector.write


def rows(preset: Connector) -> list[Row]:
    """The table of this projector."""
    return [*llava_projector.rows(preset), Row("newline", "image_newline")]


def read(hf: Mapping[str, Any]) -> Connector:
    """The projector of a config.json; its newline is a visual token behind the others.

    Raises:
      ConfigError: a setting that we do not have.
    """
    return dataclasses.replace(llava_projector.read(hf), newline="token")
