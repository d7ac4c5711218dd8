"""Idefics' (the first's) resampler: names as in the state_dict of transformers' `IdeficsModel`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.connectors import Connector, resampler
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row, linear, norm, placed

CARRIED: tuple[str, ...] = ()


def rows(preset: Connector) -> list[Row]:
    """The table of this resampler."""
    block = []
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "output"}.items():
        block += linear(f"attention/{ours}", f"0.{theirs}_proj", bias=False)
    block += norm("norm_context", "0.context_layer_norm")
    block += norm("norm_latents", "0.latents_layer_norm")
    if preset.qk_norm:
        block += norm("query_norm", "0.q_layer_norm") + norm("key_norm", "0.k_layer_norm")
    block += norm("norm_mlp", "1.ln")
    block += linear("mlp/up", "1.fc", bias=False) + linear("mlp/down", "1.c_proj", bias=False)
    found = [Row("queries", "latents"), *norm("norm", "layer_norm")]
    found += placed(block, "stack/blocks/", "blocks.{}.")
    return placed(found, theirs="perceiver_resampler.")


def read(hf: Mapping[str, Any]) -> Connector:
    """The resampler of a config.json; cross-attention reads it at the encoder's width.

    Raises:
      ConfigError: a system without a resampler.
    """
    fields.setting(hf, "use_resampler", False, {True: True})
    vision, own = fields.part(hf, "vision_config"), fields.part(hf, "perceiver_config")
    width, heads = vision.get("embed_dim", 768), own.get("resampler_n_heads", 16)
    return resampler(
        "idefics",
        width=width,
        out=width,
        queries=own.get("resampler_n_latents", 64),
        layers=own.get("resampler_depth", 6),
        heads=heads,
        kv_heads=heads,
        head_dim=own.get("resampler_head_dim", 96),
        qk_norm=own.get("qk_layer_norms_perceiver", False),
    )


def write(preset: Connector) -> dict[str, Any]:
    """The fields of config.json that speak of the resampler."""
    return {
        "use_resampler": True,
        "vision_config": {"embed_dim": preset.width},
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": preset.queries,
            "resampler_depth": preset.layers,
            "resampler_n_heads": preset.heads,
            "resampler_head_dim": preset.head_dim,
            "qk_layer_norms_perceiver": preset.qk_norm,
        },
    }
