"""GPT-NeoX, Pythia, RedPajama (transformers' GPTNeoXForCausalLM)."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.decoders import Decoder
from vlm_jax.weights import fields, rotary
from vlm_jax.weights.tables import Row, linear, norm

CARRIED = ()


def read(hf: Mapping[str, Any]) -> Decoder:
    """The decoder of a config.json.

    Raises:
      ConfigError: it asks for something that no field says.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    usual = {"rope_theta": hf.get("rotary_emb_base", 10_000.0), "max_position_embeddings": 2048}
    biased = hf.get("attention_bias", True)
    width, heads = hf.get("hidden_size", 6144), hf.get("num_attention_heads", 64)
    return Decoder(
        hf.get("vocab_size", 50_432),
        width,
        hf.get("num_hidden_layers", 44),
        hf.get("intermediate_size", 24_576),
        heads,
        heads,
        width // heads,
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel=hf.get("use_parallel_residual", True),
        gated=False,
        activation=fields.activation(hf, "hidden_act", "gelu"),
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=True,
        rope_share=float(rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))),
        tied=hf.get("tie_word_embeddings", False),
        **rotary.read(rope, usual | hf),
    )


def write(decoder: Decoder, model_type: str = "gpt_neox") -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    d = decoder
    return {
        "model_type": model_type,
        "vocab_size": d.vocab,
        "hidden_size": d.width,
        "num_hidden_layers": d.depth,
        "intermediate_size": d.mlp,
        "num_attention_heads": d.heads,
        "layer_norm_eps": d.norm_eps,
        "use_parallel_residual": d.parallel,
        "hidden_act": fields.NAMES[d.activation],
        "attention_bias": d.qkv_bias,
        "rope_parameters": rotary.write(d) | {"partial_rotary_factor": d.rope_share},
        "tie_word_embeddings": d.tied,
    }


def rows(decoder: Decoder) -> list[Row]:
    """Where our leaves are in GPTNeoXForCausalLM: each head's query, key and value lie together."""
    block, layer = "stack/blocks/", "gpt_neox.layers.{}."
    fused = layer + "attention.query_key_value"
    table = [
        Row("embedding", "gpt_neox.embed_in.weight"),
        *norm("norm", "gpt_neox.final_layer_norm"),
        *norm(block + "norm1", layer + "input_layernorm"),
        *norm(block + "norm2", layer + "post_attention_layernorm"),
        *linear(block + "attention/out", layer + "attention.dense", decoder.out_bias),
        *linear(block + "mlp/up", layer + "mlp.dense_h_to_4h"),
        *linear(block + "mlp/down", layer + "mlp.dense_4h_to_h"),
    ]
    for i, name in enumerate(("query", "key", "value")):
        per_head = {"part": (i, 3), "heads": decoder.heads}
        table += linear(f"{block}attention/{name}", fused, decoder.qkv_bias, **per_head)
    return table if decoder.tied else table + linear("output", "lm_head", bias=False)
