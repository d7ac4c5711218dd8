"""OpenFlamingo's gated blocks (open_flamingo/src: helpers.py, flamingo_lm.py).

Its checkpoints have no config.json: which encoder, language model and interval they belong to is
said where they are published. Our paths are relative to `decoder/`.
"""

from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.weights.tables import Row, linear, norm, placed

# Where the layers of a language model lie, by its model_type.
LAYERS = {"mpt": "transformer.blocks", "gpt_neox": "gpt_neox.layers"}

_BLOCK = [
    *norm("norm1", "attn.norm"),
    *linear("attention/query", "attn.to_q", bias=False),
    *linear("attention/key", "attn.to_kv", bias=False, part=(0, 2)),
    *linear("attention/value", "attn.to_kv", bias=False, part=(1, 2)),
    *linear("attention/out", "attn.to_out", bias=False),
    Row("attention_gate", "attn_gate"),
    *norm("norm2", "ff.0"),
    *linear("mlp/up", "ff.1", bias=False),
    *linear("mlp/down", "ff.3", bias=False),
    Row("mlp_gate", "ff_gate"),
]


def rows(fusion: CrossAttention, layers: str) -> list[Row]:
    """The table of the gated blocks.

    Args:
      fusion: says which layers have one.
      layers: where the layers of the language model lie, a value of LAYERS.
    """
    theirs = f"lang_encoder.{layers}.{{}}.gated_cross_attn_layer."
    found = placed(_BLOCK, "cross/stack/blocks/", theirs)
    return [row._replace(first=fusion.start, every=fusion.every) for row in found]
