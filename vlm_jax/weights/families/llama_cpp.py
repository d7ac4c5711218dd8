"""Decoders in llama.cpp's names: the metadata of a GGUF file as a preset, and its tensors' rows.

Covers the architectures llama (Mistral and SmolLM2 among them), qwen2, qwen3, gemma, gemma2 and
gemma3. Two things are stored in another way than by transformers, both in llama.cpp's
convert_hf_to_gguf.py: queries and keys of "llama" have the two numbers that are rotated against
each other side by side, and the scales of Gemma's norms have their one added.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.models.positions import frequencies
from vlm_jax.presets.decoders import Decoder
from vlm_jax.weights.tables import Row, linear, norm

_GEMMA = {"norm": "rms_plus_one", "activation": "gelu_tanh", "embed_root": True}
# What an architecture means beyond its metadata (llama.cpp's src/models and llama-model.cpp).
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": _GEMMA,
    "gemma2": _GEMMA
    | {
        "pattern": ("local", "global"),
        "window": 4096,
        "attention_cap": 50.0,
        "logit_cap": 30.0,
    },
    "gemma3": _GEMMA | {"pattern": ("local",) * 5 + ("global",), "local_theta": 10_000.0},
}
# Those whose 27B, known by its number of layers, divides scores by the root of width / heads.
SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
PAIRED = ("llama",)
# Not parameters: Llama 3's factors on rotary frequencies are among the decoder's fields.
CARRIED = (r"rope_freqs\.weight",)
# Layers that all published models with `rope_freqs` scale alike (Llama 3.1 and later).
_LLAMA3 = {"rope_original": 8192, "rope_low": 1.0, "rope_high": 4.0}


def read(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
) -> Decoder:
    """The decoder of a GGUF file.

    Args:
      metadata: its key-value pairs.
      shapes: of its tensors; which of them exist says what has biases and norms.
      tensor: reads one of them.

    Raises:
      ConfigError: its architecture or a setting is not one that we have.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"the GGUF file's architecture is {name!r}; expected one of {', '.join(ARCHITECTURES)}"
        )
    get = lambda key, default=None: metadata.get(f"{name}.{key}", default)  # noqa: E731
    _check(name, get, shapes)
    width, heads = get("embedding_length"), get("attention.head_count")
    depth, head_dim = get("block_count"), get("attention.key_length", width // heads)
    by_width = (name, depth) in SCALED_BY_WIDTH
    decoder = Decoder(
        shapes["token_embd.weight"][0],
        width,
        depth,
        get("feed_forward_length"),
        heads,
        get("attention.head_count_kv", heads),
        head_dim,
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        post_norms="blk.0.post_attention_norm.weight" in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        query_scale=width / heads if by_width else 0.0,
        rope_theta=_decimal(get("rope.freq_base", 10_000.0)),
        rope_factor=_decimal(get("rope.scaling.factor", 1.0)),
        tied="output.weight" not in shapes,
    )
    decoder = dataclasses.replace(decoder, **ARCHITECTURES[name] | _window(name, get))
    caps = {
        "attention_cap": _decimal(get("attn_logit_softcapping", decoder.attention_cap)),
        "logit_cap": _decimal(get("final_logit_softcapping", decoder.logit_cap)),
    }
    decoder = dataclasses.replace(decoder, **caps)
    return _rescaled(decoder, tensor) if "rope_freqs.weight" in shapes else decoder


def _window(name: str, get: Callable) -> dict[str, Any]:
    traits = ARCHITECTURES[name]
    window = get("attention.sliding_window", traits.get("window", 0))
    if "pattern" not in traits:
        return {"window": window, "pattern": ("local",)} if window else {}
    if not window:
        raise ConfigError(f"the GGUF file lacks {name}.attention.sliding_window")
    return {"window": window}


def _check(name: str, get: Callable, shapes: Collection[str]) -> None:
    """Refuses what no field of a Decoder says."""
    missing = [
        key
        for key in (
            "embedding_length",
            "block_count",
            "feed_forward_length",
            "attention.head_count",
            "attention.layer_norm_rms_epsilon",
        )
        if get(key) is None
    ]
    if missing:
        raise ConfigError(f"the GGUF file lacks {name}.{missing[0]}: its decoder is not known")
    if "token_embd.weight" not in shapes:
        raise ConfigError("the GGUF file lacks tensor token_embd.weight: is it a language model?")
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        if isinstance(get(key), list):
            raise ConfigError(f"the GGUF file's {name}.{key} differs between layers: not supported")
    head_dim = get("attention.key_length", get("embedding_length") // get("attention.head_count"))
    supported = {
        "expert_count": (None, 0),
        "attention.value_length": (None, head_dim),
        "rope.dimension_count": (None, head_dim),
        "rope.scaling.type": (None, "none", "linear"),
        "rope.freq_base_swa": (None, ARCHITECTURES[name].get("local_theta")),
    }
    for key, values in supported.items():
        if get(key) not in values:
            raise ConfigError(
                f"the GGUF file's {name}.{key} is {get(key)!r}, which is not supported; expected "
                f"{' or '.join(repr(value) for value in values[1:])}"
            )


def _rescaled(decoder: Decoder, tensor: Callable[[str], np.ndarray]) -> Decoder:
    """The decoder with Llama 3's scaling of rotary frequencies, if that is what the factors say."""
    factors = tensor("rope_freqs.weight")
    scaled = dataclasses.replace(decoder, rope_factor=_decimal(factors.max()), **_LLAMA3)
    ours = frequencies(decoder, "global") / frequencies(scaled, "global")
    if not np.allclose(ours, factors, rtol=1e-4):
        raise ConfigError(
            "the GGUF file's rope_freqs are not those of Llama 3's scaling from a context of "
            f"{_LLAMA3['rope_original']}: not supported"
        )
    return scaled


def _decimal(value: Any) -> float:
    """A float32 as the shortest decimal that it stands for: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def rows(decoder: Decoder, architecture: str) -> list[Row]:
    """Where the leaves of a decoder are in a GGUF file of an architecture."""
    block, layer = "stack/blocks/", "blk.{}."
    attention, mlp = block + "attention/", block + "mlp/"
    table = [
        Row("embedding", "token_embd.weight"),
        *norm("norm", "output_norm", bias=False),
        *norm(block + "norm1", layer + "attn_norm", bias=False),
        *norm(block + "norm2", layer + "ffn_norm", bias=False),
        *linear(attention + "query", layer + "attn_q", decoder.qkv_bias),
        *linear(attention + "key", layer + "attn_k", decoder.qkv_bias),
        *linear(attention + "value", layer + "attn_v", decoder.qkv_bias),
        *linear(attention + "out", layer + "attn_output", decoder.out_bias),
        *linear(mlp + "gate", layer + "ffn_gate", bias=False),
        *linear(mlp + "up", layer + "ffn_up", bias=False),
        *linear(mlp + "down", layer + "ffn_down", bias=False),
    ]
    if decoder.qk_norm:
        table += norm(block + "query_norm", layer + "attn_q_norm", bias=False)
        table += norm(block + "key_norm", layer + "attn_k_norm", bias=False)
    if decoder.post_norms:
        table += norm(block + "post_norm1", layer + "post_attention_norm", bias=False)
        table += norm(block + "post_norm2", layer + "post_ffw_norm", bias=False)
    if not decoder.tied:
        table += linear("output", "output", bias=False)
    return [_stored(row, decoder, architecture) for row in table]


def _stored(row: Row, decoder: Decoder, architecture: str) -> Row:
    """The row in the layout that llama.cpp stores it in."""
    if row.ours.endswith("/scale") and decoder.norm == "rms_plus_one":
        return row._replace(layout="plus_one")
    if architecture in PAIRED and any(name in row.ours for name in ("on/query/", "on/key/")):
        return row._replace(layout={"linear": "linear_pairs", "flat": "flat_pairs"}[row.layout])
    return row
