"""Gemma 3's pooling, norm and projection: names as in the state_dict of transformers'
`Gemma3Model`."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.connectors import Connector
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row

CARRIED: tuple[str, ...] = ()


def rows(preset: Connector) -> list[Row]:
    """The table of this projector; their matrix stands as ours does."""
    name = "multi_modal_projector."
    return [
        Row("layers/0/kernel", name + "mm_input_projection_weight"),
        Row("input_norm/scale", name + "mm_soft_emb_norm.weight"),
    ]


def read(hf: Mapping[str, Any]) -> Connector:
    """The projector of a config.json.

    Raises:
      ConfigError: visual tokens that form no square, or that their pooling leaves a rest of.
    """
    tokens, vision = hf.get("mm_tokens_per_image", 256), fields.part(hf, "vision_config")
    side = math.isqrt(tokens)
    patches = vision.get("image_size", 224) // vision.get("patch_size", 16)
    if side**2 != tokens or patches % side:
        raise ConfigError(
            f"mm_tokens_per_image of config.json is {tokens}; expected the square of a divisor of "
            f"the {patches} patches of a side"
        )
    return Connector(
        "linear",
        bias=False,
        pool="average",
        grid=(side, side),
        input_norm="rms_plus_one",
        norm_eps=vision.get("layer_norm_eps", 1e-6),
    )


def write(preset: Connector) -> dict[str, Any]:
    """The fields of config.json that speak of the projector."""
    return {
        "mm_tokens_per_image": math.prod(preset.grid),
        "vision_config": {"layer_norm_eps": preset.norm_eps},
    }
