"""OpenFlamingo's resampler: names as in the state_dict of open_flamingo's `Flamingo`.

Its checkpoints have no config.json; the settings are the arguments of its `PerceiverResampler`.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.connectors import Connector, resampler
from vlm_jax.weights.tables import Row, linear, norm, placed

CARRIED: tuple[str, ...] = ()


def rows(preset: Connector) -> list[Row]:
    """The table of this resampler: keys and values lie in one matrix, keys first."""
    block = linear("attention/query", "0.to_q", bias=False)
    for i, name in enumerate(("key", "value")):
        block += linear(f"attention/{name}", "0.to_kv", bias=False, part=(i, 2))
    block += linear("attention/out", "0.to_out", bias=False)
    block += norm("norm_context", "0.norm_media") + norm("norm_latents", "0.norm_latents")
    block += norm("norm_mlp", "1.0")
    block += linear("mlp/up", "1.1", bias=False) + linear("mlp/down", "1.3", bias=False)
    found = [Row("queries", "latents"), *norm("norm", "norm")]
    found += placed(block, "stack/blocks/", "layers.{}.")
    return placed(found, theirs="perceiver.")


def read(hf: Mapping[str, Any]) -> Connector:
    """The resampler of these arguments; cross-attention reads it at the encoder's width."""
    width, heads = hf["dim"], hf.get("heads", 8)
    return resampler(
        "open-flamingo",
        width=width,
        out=width,
        hidden=int(width * hf.get("ff_mult", 4)),
        queries=hf.get("num_latents", 64),
        layers=hf.get("depth", 6),
        heads=heads,
        kv_heads=heads,
        head_dim=hf.get("dim_head", 64),
    )


def write(preset: Connector) -> dict[str, Any]:
    """The arguments of this resampler."""
    return {
        "dim": preset.width,
        "depth": preset.layers,
        "dim_head": preset.head_dim,
        "heads": preset.heads,
        "num_latents": preset.queries,
        "ff_mult": preset.hidden / preset.width,
    }
