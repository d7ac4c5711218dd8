"""Idefics1: the language model with its gated blocks, of transformers' IdeficsForVisionText2Text.

Our paths are relative to `decoder/`; `idefics.py` joins it to its vision tower and resampler.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.weights.fields import ACTIVATIONS, NAMES
from vlm_jax.weights.tables import Row, linear, norm, placed

# Rotary frequencies, which older files hold and which follow from the config.
CARRIED = (r"model\..*\.rotary_emb\.inv_freq",)

# What a config.json leaves out (transformers' IdeficsConfig and IdeficsVisionConfig).
DEFAULTS = {
    "vocab_size": 32_000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "dropout": 0.0,
    "hidden_act": "silu",
    "alpha_type": "float",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
}
VISION_WIDTH = 768
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

GATES = {"float": "number", "vector": "vector"}

_BLOCK = [
    *norm("norm1", "input_layernorm", bias=False),
    *norm("norm2", "post_attention_layernorm", bias=False),
    *(
        row
        for part in ("gate", "up", "down")
        for row in linear(f"mlp/{part}", f"mlp.{part}_proj", bias=False)
    ),
]
_ATTENTION = [
    *linear("attention/query", "q_proj", bias=False),
    *linear("attention/key", "k_proj", bias=False),
    *linear("attention/value", "v_proj", bias=False),
    *linear("attention/out", "o_proj", bias=False),
]
_NORMS = [
    *norm("query_norm", "q_layer_norm", bias=False),
    *norm("key_norm", "k_layer_norm", bias=False),
]


def rows(decoder: Decoder, fusion: CrossAttention) -> list[Row]:
    """The table of a language model and the gated blocks inside it."""
    layer = [*_BLOCK, *placed(_ATTENTION, theirs="self_attn.")]
    attention = [*_ATTENTION, *(_NORMS if fusion.qk_norm else [])]
    layout = "token" if fusion.gate == "vector" else "same"
    cross = [
        *_BLOCK,
        *placed(attention, theirs="cross_attn."),
        Row("attention_gate", "alpha_cross_attn", layout),
        Row("mlp_gate", "alpha_dense", layout),
    ]
    found = [
        Row("embedding", "model.embed_tokens.weight"),
        *norm("norm", "model.norm", bias=False),
        *placed(layer, "stack/blocks/", "model.layers.{}."),
        *placed(cross, "cross/stack/blocks/", "model.gated_cross_attn_layers.{}."),
    ]
    if decoder.added:
        found.append(Row("added_embedding", "model.embed_tokens.additional_embedding.weight"))
    if not decoder.tied:
        found += linear("output", "lm_head", bias=False)
    if decoder.added and not decoder.tied:
        found += linear("added_output", "lm_head.additional_fc", bias=False)
    return found


def read(hf: Mapping[str, Any]) -> tuple[Decoder, CrossAttention]:
    """The language model and its gated blocks, from the fields of a config.json.

    Raises:
      ConfigError: a setting that we do not support.
    """
    given = {key: hf.get(key, default) for key, default in DEFAULTS.items()}
    width, heads = given["hidden_size"], given["num_attention_heads"]
    depth, every = given["num_hidden_layers"], given["cross_layer_interval"]
    rope = ROPE | (
        hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", ROPE["rope_theta"])}
    )
    _require(not hf.get("rope_scaling"), "rope_scaling", hf.get("rope_scaling"), "none")
    _require(rope.keys() == ROPE.keys(), "rope_parameters", rope, f"only {', '.join(ROPE)}")
    _require(
        rope["rope_type"] == "default", "rope_parameters.rope_type", rope["rope_type"], "default"
    )
    _require(given["dropout"] == 0, "dropout", given["dropout"], "0")
    known = {k: v for k, v in ACTIVATIONS.items() if v in CrossAttention.CHOICES["activation"]}
    for key, choices in (("hidden_act", known), ("alpha_type", GATES)):
        _require(given[key] in choices, key, given[key], f"one of {', '.join(choices)}")
    _require(depth % every == 0, "cross_layer_interval", every, f"a divisor of {depth} layers")
    _require(width % heads == 0, "num_attention_heads", heads, f"a divisor of the width {width}")
    sizes = {"heads": heads, "kv_heads": heads, "head_dim": width // heads}
    shared = {
        "mlp": given["intermediate_size"],
        "norm_eps": given["rms_norm_eps"],
        "activation": ACTIVATIONS[given["hidden_act"]],
        **sizes,
    }
    decoder = Decoder(
        given["vocab_size"],
        width,
        depth,
        tied=given["tie_word_embeddings"],
        added=given["additional_vocab_size"],
        rope_theta=float(rope["rope_theta"]),
        **shared,
    )
    fusion = CrossAttention(
        every=every,
        width=(hf.get("vision_config") or {}).get("embed_dim", VISION_WIDTH),
        qk_norm=given["qk_layer_norms"],
        gate=GATES[given["alpha_type"]],
        **shared,
    )
    return decoder, fusion


def write(decoder: Decoder, fusion: CrossAttention) -> dict[str, Any]:
    """The fields of a config.json: the inverse of `read`.

    Raises:
      ConfigError: presets that no Idefics1 has.
    """
    hf = {
        "model_type": "idefics",
        "vocab_size": decoder.vocab,
        "additional_vocab_size": decoder.added,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "dropout": decoder.dropout,
        "hidden_act": NAMES[decoder.activation],
        "alpha_initializer": "zeros",
        "alpha_type": _named(GATES, fusion.gate),
        "rms_norm_eps": decoder.norm_eps,
        "tie_word_embeddings": decoder.tied,
        "cross_layer_interval": fusion.every,
        "qk_layer_norms": fusion.qk_norm,
        "rope_parameters": ROPE | {"rope_theta": decoder.rope_theta},
        "vision_config": {"embed_dim": fusion.width or decoder.width},
    }
    for preset, again in zip((decoder, fusion), read(hf), strict=True):
        for field, value in vars(again).items():
            if field not in ("dtype", "remat", "width") and getattr(preset, field) != value:
                _require(False, field, getattr(preset, field), f"{value!r}, as Idefics1 has it")
    return hf


def _named(names: Mapping[str, str], ours: str) -> str:
    return next((theirs for theirs, name in names.items() if name == ours), ours)


def _require(holds: bool, field: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{field} of an Idefics1 is {value!r}; expected {expected}")
