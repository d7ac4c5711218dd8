"""Llama and its descendants: Mistral, Qwen2, Qwen3, Gemma 1 to 3 (transformers' XForCausalLM)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.decoders import Decoder
from vlm_jax.weights import fields, rotary
from vlm_jax.weights.tables import Row, linear, norm

CARRIED = ()
KINDS = {"sliding_attention": "local", "full_attention": "global"}
_GEMMA = {"norm": "rms_plus_one", "embed_root": True}
_QWEN = {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_position_embeddings": 32_768,
}


@dataclasses.dataclass(frozen=True)
class Traits:
    """What sets a model_type apart.

    Attributes:
      fields: of the preset, whatever config.json says.
      defaults: of config.json, where transformers' differ from Llama's.
      activation: the key of the activation.
      local: which layers look back a window where `layer_types` does not say: all ("all"), those
        that `use_sliding_window` and `max_window_layers` name ("late"), or all but every n-th:
        n, or the key that says it.
      biased: key that says whether all of attention has biases; "" = `fields` says it.
      mlp_biased: the same of the feed-forward part.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"
    local: str | int = ""
    biased: str = ""
    mlp_biased: str = ""


TRAITS = {
    "llama": Traits(biased="attention_bias", mlp_biased="mlp_bias"),
    "mistral": Traits(
        defaults={
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
        },
        local="all",
    ),
    "qwen2": Traits({"qkv_bias": True}, _QWEN, local="late"),
    "qwen3": Traits(
        {"qk_norm": True},
        _QWEN | {"head_dim": 128},
        local="late",
        biased="attention_bias",
    ),
    "gemma": Traits(
        _GEMMA,
        {
            "vocab_size": 256_000,
            "hidden_size": 3072,
            "intermediate_size": 24_576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
        },
        biased="attention_bias",
    ),
    "gemma2": Traits(
        _GEMMA | {"post_norms": True},
        {
            "vocab_size": 256_000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
        },
        activation="hidden_activation",
        local=2,
        biased="attention_bias",
    ),
    "gemma3_text": Traits(
        # transformers stores a cap on scores and does not apply it.
        _GEMMA | {"post_norms": True, "qk_norm": True, "attention_cap": 0.0},
        {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "max_position_embeddings": 131_072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
        },
        activation="hidden_activation",
        local="sliding_window_pattern",
        biased="attention_bias",
    ),
}
_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def read(hf: Mapping[str, Any]) -> Decoder:
    """The decoder of a config.json, with transformers' defaults where it is silent.

    Raises:
      ConfigError: it asks for something that no field says.
    """
    traits = TRAITS[hf["model_type"]]
    hf = _DEFAULTS | traits.defaults | {k: v for k, v in hf.items() if v is not None or k in _NULL}
    fields.expect(hf, use_bidirectional_attention=False)
    biased = bool(hf.get(traits.biased))
    width, heads, depth = (
        hf["hidden_size"],
        hf["num_attention_heads"],
        hf["num_hidden_layers"],
    )
    head_dim = hf.get("head_dim") or width // heads
    gemma = hf if "query_pre_attn_scalar" in traits.defaults else {}  # others have no such fields
    scale = gemma.get("query_pre_attn_scalar") or head_dim
    kinds = _kinds(traits, hf, depth)
    local = "local" in kinds
    return Decoder(
        hf["vocab_size"],
        width,
        depth,
        hf["intermediate_size"],
        heads,
        hf.get("num_key_value_heads") or heads,
        head_dim,
        **{
            "norm_eps": hf["rms_norm_eps"],
            "activation": _activation(traits, hf),
            "qkv_bias": biased,
            "out_bias": biased,
            "mlp_bias": bool(hf.get(traits.mlp_biased)),
            "query_scale": 0.0 if scale == head_dim else float(scale),
            "attention_cap": float(gemma.get("attn_logit_softcapping") or 0.0),
            "logit_cap": float(gemma.get("final_logit_softcapping") or 0.0),
            "window": hf["sliding_window"] if local else 0,
            "pattern": fields.period(kinds),
            "tied": hf["tie_word_embeddings"],
            **_rope(traits, hf, local),
        }
        | dict(traits.fields),
    )


# Fields where null says something else than absence.
_NULL = {
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_key_value_heads",
}


def _activation(traits: Traits, hf: Mapping[str, Any]) -> str:
    # Gemma's first config.json says "gelu" and means its approximation, as transformers warns.
    first = traits.fields.get("embed_root") and traits.activation == "hidden_act"
    approximate = first and hf[traits.activation] == "gelu"
    return "gelu_tanh" if approximate else fields.activation(hf, traits.activation, "silu")


def _kinds(traits: Traits, hf: Mapping[str, Any], depth: int) -> tuple[str, ...]:
    """Of every layer, "local" or "global".

    Raises:
      ConfigError: layers look back a window that has no size, which transformers cannot run either.
    """
    window = hf.get("sliding_window")
    if not traits.local or (traits.local == "all" and window is None):
        return ("global",) * depth
    if traits.local == "late" and not hf.get("use_sliding_window"):
        window = None
    kinds = _pattern(traits, hf, depth, window)
    if "local" in kinds and window is None:
        raise ConfigError(
            "config.json: layers are sliding_attention, but sliding_window is null or "
            "use_sliding_window false; expected a window"
        )
    return kinds


def _pattern(traits: Traits, hf: Mapping[str, Any], depth: int, window: int | None) -> tuple:
    if traits.local == "all":
        return ("local",) * depth
    if hf.get("layer_types"):
        unknown = set(hf["layer_types"]) - KINDS.keys()
        if unknown or len(hf["layer_types"]) != depth:
            raise ConfigError(
                f"config.json: layer_types is {hf['layer_types']!r}; expected {depth} times "
                f"{' or '.join(KINDS)}"
            )
        return tuple(KINDS[kind] for kind in hf["layer_types"])
    if traits.local == "late":
        late = depth if window is None else hf.get("max_window_layers", 28)
        return tuple("local" if i >= late else "global" for i in range(depth))
    every = hf[traits.local] if isinstance(traits.local, str) else traits.local
    return tuple("local" if (i + 1) % every else "global" for i in range(depth))


def _rope(traits: Traits, hf: Mapping[str, Any], local: bool) -> dict[str, Any]:
    """Fields of the rotary frequencies, from either generation of config.json."""
    scaling, rope = dict(hf.get("rope_scaling") or {}), dict(hf.get("rope_parameters") or {})
    found = {}
    if "rope_local_base_freq" in traits.defaults:  # a rope for each kind of layer
        local_rope = rope.get("sliding_attention") or {}
        if local:
            fields.expect(local_rope, rope_type="default")
            found["local_theta"] = local_rope.get("rope_theta") or hf["rope_local_base_freq"]
        rope = dict(rope.get("full_attention") or {}) | scaling
    else:
        rope = scaling or rope
        original = hf.get("original_max_position_embeddings")
        rope |= {"original_max_position_embeddings": original} if original else {}
    fields.expect(rope, partial_rotary_factor=1.0)
    return rotary.read(rope, hf) | found


def write(decoder: Decoder, model_type: str) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    d, traits = decoder, TRAITS[model_type]
    hf = {
        "model_type": model_type,
        "vocab_size": d.vocab,
        "hidden_size": d.width,
        "intermediate_size": d.mlp,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "rms_norm_eps": d.norm_eps,
        traits.activation: fields.NAMES[d.activation],
        "tie_word_embeddings": d.tied,
        "rope_parameters": _written_rope(d, traits),
    }
    if traits.biased:
        hf[traits.biased] = d.qkv_bias
    if traits.mlp_biased:
        hf[traits.mlp_biased] = d.mlp_bias
    if "query_pre_attn_scalar" in traits.defaults:
        scale = d.query_scale or d.head_dim
        hf["query_pre_attn_scalar"] = int(scale) if scale == int(scale) else scale
        hf["attn_logit_softcapping"] = d.attention_cap or None
        hf["final_logit_softcapping"] = d.logit_cap or None
    if d.window or traits.local in ("all", "late"):  # others want one even where no layer has it
        hf["sliding_window"] = d.window or None
    if traits.local and traits.local != "all":
        hf["layer_types"] = [{ours: theirs for theirs, ours in KINDS.items()}[k] for k in d.layers]
    if traits.local == "late":
        hf["use_sliding_window"] = d.window > 0
    return hf


def _written_rope(d: Decoder, traits: Traits) -> dict[str, Any]:
    rope = rotary.write(d)
    if "rope_local_base_freq" not in traits.defaults:
        return rope
    local = {"rope_type": "default", "rope_theta": d.local_theta or d.rope_theta}
    return {"full_attention": rope, "sliding_attention": local}


def rows(decoder: Decoder) -> list[Row]:
    """Where our leaves are in XForCausalLM."""
    d, block, layer = decoder, "stack/blocks/", "model.layers.{}."
    table = [
        Row("embedding", "model.embed_tokens.weight"),
        *norm("norm", "model.norm", bias=False),
        *norm(block + "norm1", layer + "input_layernorm", bias=False),
        *linear(block + "attention/query", layer + "self_attn.q_proj", d.qkv_bias),
        *linear(block + "attention/key", layer + "self_attn.k_proj", d.qkv_bias),
        *linear(block + "attention/value", layer + "self_attn.v_proj", d.qkv_bias),
        *linear(block + "attention/out", layer + "self_attn.o_proj", d.out_bias),
        *linear(block + "mlp/gate", layer + "mlp.gate_proj", d.mlp_bias),
        *linear(block + "mlp/up", layer + "mlp.up_proj", d.mlp_bias),
        *linear(block + "mlp/down", layer + "mlp.down_proj", d.mlp_bias),
    ]
    if d.post_norms:  # theirs has four norms: the second of Llama comes after attention here
        table += norm(block + "post_norm1", layer + "post_attention_layernorm", bias=False)
        table += norm(block + "norm2", layer + "pre_feedforward_layernorm", bias=False)
        table += norm(block + "post_norm2", layer + "post_feedforward_layernorm", bias=False)
    else:
        table += norm(block + "norm2", layer + "post_attention_layernorm", bias=False)
    if d.qk_norm:
        table += norm(block + "query_norm", layer + "self_attn.q_norm", bias=False)
        table += norm(block + "key_norm", layer + "self_attn.k_norm", bias=False)
    if not d.tied:
        table += linear("output", "lm_head", bias=False)
    return table
