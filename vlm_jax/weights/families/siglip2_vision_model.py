"""SigLIP 2's NaFlex tower, with the names of published files for transformers' Siglip2VisionModel.

Patches come flattened, each image has a grid of its own, and the table of positions is resized to
it. (Other SigLIP 2 towers are `siglip_vision_model`.) `config.json` does not say how many patches
an image may have: `read` takes as many as the table, as the published preprocessors do.
"""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.resizing import Resize
from vlm_jax.weights.families import siglip_vision_model as siglip
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, linear, placed

DEFAULTS = {k: v for k, v in siglip.DEFAULTS.items() if k != "image_size"} | {"num_patches": 256}
FIXED = siglip.FIXED
CARRIED = siglip.CARRIED
FIELDS = {k: v for k, v in vision.FIELDS.items() if k != "image_size"}


def rows(preset: Encoder) -> list[Row]:
    """The table of names."""
    embed = linear("stem/embed", "embeddings.patch_embedding")
    return placed([*embed, *siglip.shared_rows()], theirs="vision_model.")


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a vision_config.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    found = vision.filled(hf, DEFAULTS, FIXED)
    patches = found["num_patches"]
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConfigError(f"num_patches of config.json is {patches}; expected a square number")
    return Encoder(
        **vision.fields(found, FIELDS),
        image_size=side * found["patch_size"],
        max_patches=patches,
        position_resize="bilinear_antialias",
        resize=Resize("patches", filter="bilinear"),
    )


def write(preset: Encoder) -> dict[str, Any]:
    """The vision_config of a preset."""
    return {
        "model_type": "siglip2_vision_model",
        **vision.written(preset, FIELDS),
        **FIXED,
        "num_patches": math.prod(preset.table_grid),
    }
