"""mPLUG-Owl's visual abstractor: names as in the state_dict of mplug_owl's
`MplugOwlForConditionalGeneration`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.connectors import Connector, resampler
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row, linear, norm, placed

CARRIED: tuple[str, ...] = ()


def rows(preset: Connector) -> list[Row]:
    """The table of this abstractor."""
    block = linear("attention/out", "output.out_proj")
    for name in ("query", "key", "value"):
        block += linear(f"attention/{name}", f"attention.{name}")
    for ours, theirs in {"gate": "w1", "down": "w2", "up": "w3"}.items():
        block += linear(f"mlp/{ours}", f"output.mlp.{theirs}")
    block += norm("mlp/norm", "output.mlp.ffn_ln") + norm("norm_mlp", "output.norm2")
    block += norm("norm_latents", "norm1") + norm("norm_context", "normk")
    found = placed(block, "stack/blocks/", "encoder.layers.{}.crossattention.")
    found += [*linear("project", "visual_fc"), Row("newline", "vit_eos", "token")]
    return [Row("queries", "query_tokens", "first"), *placed(found, theirs="abstractor.")]


def read(hf: Mapping[str, Any]) -> Connector:
    """The abstractor of a config.json.

    Raises:
      ConfigError: its encoder has another width; theirs norms features at its own.
    """
    own = fields.part(hf, "visual_abstractor_config")
    width, heads = own.get("hidden_size", 1024), own.get("num_attention_heads", 16)
    if own.get("encoder_hidden_size", 1024) != width:
        raise ConfigError(
            f"encoder_hidden_size of config.json is {own.get('encoder_hidden_size', 1024)}; "
            f"expected the abstractor's width {width}"
        )
    return resampler(
        "mplug-owl",
        queries=hf.get("num_query_tokens", 64),
        layers=own.get("num_hidden_layers", 6),
        width=width,
        hidden=own.get("intermediate_size", 4096),
        heads=heads,
        kv_heads=heads,
        mlp_norm_eps=own.get("layer_norm_eps", 1e-6),
    )


def write(preset: Connector) -> dict[str, Any]:
    """The fields of config.json that speak of the abstractor."""
    return {
        "num_query_tokens": preset.queries,
        "visual_abstractor_config": {
            "hidden_size": preset.width,
            "num_hidden_layers": preset.layers,
            "num_attention_heads": preset.heads,
            "intermediate_size": preset.hidden,
            "layer_norm_eps": preset.mlp_norm_eps,
            "encoder_hidden_size": preset.width,
        },
    }
