"""OPT (transformers' OPTForCausalLM)."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.decoders import Decoder
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row, linear, norm

CARRIED = ()
OFFSET = 2  # rows of the position table before that of position 0


def read(hf: Mapping[str, Any]) -> Decoder:
    """The decoder of a config.json.

    Raises:
      ConfigError: it asks for something that no field says.
    """
    width, heads = hf.get("hidden_size", 768), hf.get("num_attention_heads", 12)
    fields.expect(hf, _remove_final_layer_norm=False)
    biased = hf.get("enable_bias", True)
    embedded = hf.get("word_embed_proj_dim") or width
    return Decoder(
        hf.get("vocab_size", 50_272),
        width,
        hf.get("num_hidden_layers", 12),
        hf.get("ffn_dim", 3072),
        heads,
        heads,
        width // heads,
        norm="layer" if hf.get("layer_norm_elementwise_affine", True) else "layer_bare",
        norm_after=not hf.get("do_layer_norm_before", True),
        gated=False,
        activation=fields.activation(hf, "activation_function", "relu"),
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=biased,
        position="learned",
        positions=hf.get("max_position_embeddings", 2048) + OFFSET,
        position_offset=OFFSET,
        embedding_width=0 if embedded == width else embedded,
        tied=hf.get("tie_word_embeddings", True),
    )


def write(decoder: Decoder, model_type: str = "opt") -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    d = decoder
    return {
        "model_type": model_type,
        "vocab_size": d.vocab,
        "hidden_size": d.width,
        "word_embed_proj_dim": d.embedded,
        "num_hidden_layers": d.depth,
        "ffn_dim": d.mlp,
        "num_attention_heads": d.heads,
        "max_position_embeddings": d.positions - d.position_offset,
        "activation_function": fields.NAMES[d.activation],
        "do_layer_norm_before": not d.norm_after,
        "enable_bias": d.qkv_bias,
        "layer_norm_elementwise_affine": d.norm == "layer",
        "tie_word_embeddings": d.tied,
    }


def rows(decoder: Decoder) -> list[Row]:
    """Where our leaves are in OPTForCausalLM."""
    d, block, layer = decoder, "stack/blocks/", "model.decoder.layers.{}."
    table = [
        Row("embedding", "model.decoder.embed_tokens.weight"),
        Row("positions", "model.decoder.embed_positions.weight"),
        *linear(block + "attention/query", layer + "self_attn.q_proj", d.qkv_bias),
        *linear(block + "attention/key", layer + "self_attn.k_proj", d.qkv_bias),
        *linear(block + "attention/value", layer + "self_attn.v_proj", d.qkv_bias),
        *linear(block + "attention/out", layer + "self_attn.out_proj", d.out_bias),
        *linear(block + "mlp/up", layer + "fc1", d.mlp_bias),
        *linear(block + "mlp/down", layer + "fc2", d.mlp_bias),
    ]
    if d.norm == "layer":
        table += norm(block + "norm1", layer + "self_attn_layer_norm")
        table += norm(block + "norm2", layer + "final_layer_norm")
    if d.norm == "layer" and not d.norm_after:
        table += norm("norm", "model.decoder.final_layer_norm")
    if d.embedding_width:
        table += linear("project_in", "model.decoder.project_in", bias=False)
        table += linear("project_out", "model.decoder.project_out", bias=False)
    return table if d.tied else table + linear("output", "lm_head", bias=False)
