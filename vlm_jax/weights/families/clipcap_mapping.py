"""ClipCap's mapping networks: names as in the state_dict of its `ClipCaptionModel`.

Its checkpoints have no config.json; the settings are the arguments of its train.py.
"""

from collections.abc import Mapping as Fields
from typing import Any

from vlm_jax.presets.mapping import Mapping
from vlm_jax.weights.fields import setting
from vlm_jax.weights.tables import Row, linear, norm, placed

CARRIED: tuple[str, ...] = ()
FORMS = {"mlp": "mlp", "transformer": "transformer"}


def rows(preset: Mapping) -> list[Row]:
    """The table of this mapper: a transformer's keys and values lie in one matrix, keys first."""
    if preset.form == "mlp":
        found = linear("embed", "model.0") + linear("project", "model.2")
        return placed(found, "mapper/", "clip_project.")
    block = norm("norm1", "norm1") + norm("norm2", "norm2")
    block += linear("attention/query", "attn.to_queries", bias=False)
    for i, name in enumerate(("key", "value")):
        block += linear(f"attention/{name}", "attn.to_keys_values", bias=False, part=(i, 2))
    block += linear("attention/out", "attn.project")
    block += linear("mlp/up", "mlp.fc1") + linear("mlp/down", "mlp.fc2")
    found = [Row("queries", "prefix_const"), *linear("embed", "linear")]
    found += placed(block, "stack/blocks/", "transformer.layers.{}.")
    return placed(found, "mapper/", "clip_project.")


def read(hf: Fields[str, Any]) -> Mapping:
    """The mapper of these arguments.

    Raises:
      ConfigError: a mapping type that we do not have.
    """
    fields = {
        "queries": hf.get("prefix_length", 10),
        "seeds": hf.get("prefix_length_clip", 10),
        "layers": hf.get("num_layers", 8),
    }
    return Mapping(form=setting(hf, "mapping_type", "mlp", FORMS), **fields)


def write(preset: Mapping) -> dict[str, Any]:
    """The arguments of this mapper."""
    return {
        "mapping_type": preset.form,
        "prefix_length": preset.queries,
        "prefix_length_clip": preset.seeds,
        "num_layers": preset.layers,
    }
