"""Idefics2's modality projection and resampler: names as in the state_dict of transformers'
`Idefics2Model`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.connectors import Connector, resampler
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row, linear, norm, placed

CARRIED: tuple[str, ...] = ()
# All that transformers sets of a text_config that is left out, in Idefics3 and SmolVLM too.
TEXT_CONFIG = {"rms_norm_eps": 1e-5}
MLP = ("gate", "up", "down")


def rows(preset: Connector) -> list[Row]:
    """The table of this connector."""
    found = [Row("queries", "perceiver_resampler.latents")]
    found += norm("norm", "perceiver_resampler.norm", bias=False)
    for name in MLP:
        found += linear(f"embed_mlp/{name}", f"modality_projection.{name}_proj", bias=False)
    block = []
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "o"}.items():
        block += linear(f"attention/{ours}", f"self_attn.{theirs}_proj", bias=False)
    for name in MLP:
        block += linear(f"mlp/{name}", f"mlp.{name}_proj", bias=False)
    block += norm("norm_latents", "input_latents_norm", bias=False)
    block += norm("norm_context", "input_context_norm", bias=False)
    block += norm("norm_mlp", "post_attention_layernorm", bias=False)
    found += placed(block, "stack/blocks/", "perceiver_resampler.layers.{}.")
    return placed(found, theirs="connector.")


def read(hf: Mapping[str, Any]) -> Connector:
    """The connector of a config.json.

    Raises:
      ConfigError: a setting that we do not have.
    """
    text = fields.part(hf, "text_config", TEXT_CONFIG)
    own = fields.part(hf, "perceiver_config")
    width, own_width = text.get("hidden_size", 4096), own.get("hidden_size", 4096)
    # Where widths differ, transformers takes the text's settings for both.
    eps = own.get("rms_norm_eps", 1e-6)
    eps = eps if width == own_width else text.get("rms_norm_eps", 1e-6)
    fields.setting(text, "hidden_act", "silu", {"silu": "silu"})
    return dataclasses.replace(
        resampler("idefics2"),
        queries=own.get("resampler_n_latents", 64),
        layers=own.get("resampler_depth", 3),
        width=width,
        heads=own.get("resampler_n_heads", 16),
        kv_heads=own.get("num_key_value_heads", 4),
        head_dim=own.get("resampler_head_dim", 96),
        norm_eps=eps,
        mlp_activation=fields.setting(own, "hidden_act", "silu", fields.ACTIVATIONS),
        embed_hidden=text.get("intermediate_size", 14_336),
    )


def write(preset: Connector) -> dict[str, Any]:
    """The fields of config.json that speak of the connector."""
    return {
        "text_config": {
            "hidden_size": preset.width,
            "intermediate_size": preset.embed_hidden,
            "hidden_act": "silu",
        },
        "perceiver_config": {
            "hidden_size": preset.width,
            "hidden_act": fields.NAMES[preset.mlp_activation],
            "rms_norm_eps": preset.norm_eps,
            "resampler_n_latents": preset.queries,
            "resampler_depth": preset.layers,
            "resampler_n_heads": preset.heads,
            "resampler_head_dim": preset.head_dim,
            "num_key_value_heads": preset.kv_heads,
        },
    }
