"""MPT (transformers' MptForCausalLM)."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.decoders import Decoder
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row, linear, norm

CARRIED = ()


def read(hf: Mapping[str, Any]) -> Decoder:
    """The decoder of a config.json.

    Raises:
      ConfigError: it asks for something that no field says.
    """
    fields.expect(
        hf,
        no_bias=True,
        embedding_fraction=1.0,
        expansion_ratio=4,
        norm_type="low_precision_layernorm",
    )
    attention = hf.get("attn_config") or {}
    fields.expect(
        attention,
        attn_type="multihead_attention",
        alibi=True,
        alibi_bias_max=8,
        qk_ln=False,
        prefix_lm=False,
    )
    width, heads = hf.get("d_model", 2048), hf.get("n_heads", 16)
    for key in ("clip_qkv", "softmax_scale"):
        fields.expect({key: attention.get(key) or False}, **{key: False})
    return Decoder(
        hf.get("vocab_size", 50_368),
        width,
        hf.get("n_layers", 24),
        4 * width,
        heads,
        heads,
        width // heads,
        norm="layer_unbiased",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        gated=False,
        activation="gelu",
        position="alibi",
        tied=hf.get("tie_word_embeddings", True),
    )


def write(decoder: Decoder, model_type: str = "mpt") -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    return {
        "model_type": model_type,
        "vocab_size": decoder.vocab,
        "d_model": decoder.width,
        "n_layers": decoder.depth,
        "n_heads": decoder.heads,
        "layer_norm_epsilon": decoder.norm_eps,
        "tie_word_embeddings": decoder.tied,
    }


def rows(decoder: Decoder) -> list[Row]:
    """Where our leaves are in MptForCausalLM; queries, keys and values lie in one matrix."""
    block, layer = "stack/blocks/", "transformer.blocks.{}."
    fused = layer + "attn.Wqkv.weight"
    table = [
        Row("embedding", "transformer.wte.weight"),
        *norm("norm", "transformer.norm_f", bias=False),
        *norm(block + "norm1", layer + "norm_1", bias=False),
        *norm(block + "norm2", layer + "norm_2", bias=False),
        *(
            Row(f"{block}attention/{name}/kernel", fused, "linear", (i, 3))
            for i, name in enumerate(("query", "key", "value"))
        ),
        *linear(block + "attention/out", layer + "attn.out_proj", bias=False),
        *linear(block + "mlp/up", layer + "ffn.up_proj", bias=False),
        *linear(block + "mlp/down", layer + "ffn.down_proj", bias=False),
    ]
    return table if decoder.tied else table + linear("output", "lm_head", bias=False)
