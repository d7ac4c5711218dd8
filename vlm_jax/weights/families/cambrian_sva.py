"""Cambrian's Spatial Vision Aggregator: names as in the state_dict of cambrian's `CambrianModel`
(`model.` before them in its checkpoints)."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.sva import Samplers, Sva
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row, linear, norm, placed

# The samplers between decoder layers are no part of the connector: see `between`.
CARRIED = (r"vision_sampler_layers\..*",)


def rows(preset: Sva) -> list[Row]:
    """The table of this connector."""
    found = [Row("query", "vision_query", "row")]
    found += linear("layers/0", "mm_projector.0") + linear("layers/1", "mm_projector.2")
    if preset.newline:
        found.append(Row("newline", "image_newline"))
    for i in range(len(preset.sides)):
        name = f"mm_projector_aux_{i}"
        found += linear(f"aux/{i}/layers/0", f"{name}.0") + linear(f"aux/{i}/layers/1", f"{name}.2")
        found += norm(f"aux/{i}/norm", f"{name}.3")
    return found + placed(sampler(preset), "sampler/", "vision_sampler_0.")


def sampler(preset: Sva) -> list[Row]:
    """The table of a `Sampler`, names as within their VisionTokenSampler."""
    return placed(_block(preset), "stack/blocks/", "layers.{}.")


def between(preset: Sva) -> list[Row]:
    """The table of a model's `samplers`: their VisionTokenSamplers have one layer each."""
    names = "samplers/stack/blocks/", "vision_sampler_layers.{}.layers.0."
    return placed(_block(preset), *names)


def _block(preset: Sva) -> list[Row]:
    block = linear("context", "proj_context", bias=False)
    block += linear("embed", "proj_in", bias=False) + norm("norm", "norm")
    block += linear("mlp/up", "proj_out.linear_1", bias=False)
    block += linear("mlp/down", "proj_out.linear_2", bias=False)
    block += norm("attention/query_norm", "cross_attn.q_proj.0")
    block += linear("attention/query", "cross_attn.q_proj.1", bias=False)
    block += linear("attention/out", "cross_attn.o_proj", bias=False)
    for i, window in enumerate(preset.windows):
        ours = f"attention/sources/{i}"
        if window > 1:
            block.append(Row(f"{ours}/positions", f"pos_embed_{i}"))
        for name in ("key", "value"):
            theirs = f"cross_attn.{name[0]}_proj_{i}"
            block += norm(f"{ours}/{name}_norm", f"{theirs}.0")
            block += linear(f"{ours}/{name}", f"{theirs}.1", bias=False)
    return block


def read(hf: Mapping[str, Any]) -> Sva:
    """The connector of a config.json.

    Raises:
      ConfigError: another connector, several groups of queries, or lengths that are no squares.
    """
    fields.setting(hf, "mm_projector_type", "linear", {"sva": "sva"})
    fields.setting(hf, "num_query_group", 1, {1: 1})
    (queries,) = hf["query_num_list"]
    if hf["image_token_len"] != queries:
        raise ConfigError(
            f"image_token_len of config.json is {hf['image_token_len']}; expected the number of "
            f"queries, {queries}"
        )
    return Sva(
        sides=tuple(map(_side, hf["mm_vision_tower_aux_token_len_list"])),
        side=_side(queries),
        width=hf["vision_hidden_size"],
        layers=hf["connector_depth"],
    )


def read_samplers(hf: Mapping[str, Any]) -> Samplers | None:
    """The samplers between decoder layers of a config.json."""
    if hf["connector_only"]:
        return None
    return Samplers(**{field: hf[name] for field, name in _SAMPLERS.items()})


_SAMPLERS = {
    "start": "start_of_vision_sampler_layers",
    "stride": "stride_of_vision_sampler_layers",
    "count": "num_of_vision_sampler_layers",
}


def _side(length: int) -> int:
    side = math.isqrt(length)
    if side**2 != length:
        raise ConfigError(f"config.json speaks of {length} features; expected a square")
    return side


def write(preset: Sva) -> dict[str, Any]:
    """The fields of config.json that speak of the connector."""
    return {
        "mm_projector_type": "sva",
        "num_query_group": 1,
        "query_num_list": [preset.side**2],
        "image_token_len": preset.side**2,
        "mm_vision_tower_aux_token_len_list": [side**2 for side in preset.sides],
        "vision_hidden_size": preset.width,
        "connector_depth": preset.layers,
    }


def write_samplers(samplers: Samplers | None) -> dict[str, Any]:
    """The fields of config.json that speak of the samplers between decoder layers."""
    if samplers is None:
        return {"connector_only": True}
    found = {name: getattr(samplers, field) for field, name in _SAMPLERS.items()}
    return {"connector_only": False} | found
