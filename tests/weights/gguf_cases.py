"""Tiny GGUF files of every architecture, written by the gguf package from seeded numbers."""

import dataclasses
import math
import pathlib
from typing import Any

import gguf
import numpy as np

from vlm_jax.presets.decoders import Decoder

# Widths are multiples of 32, the blocks of quantised tensors; all else is odd.
VOCAB, WIDTH, MLP = 53, 96, 160
TOKENS = np.array([[5, 1, 52, 17, 17, 30, 9, 44, 2, 0, 11, 23, 8, 35]])


@dataclasses.dataclass(frozen=True)
class Case:
    """A file: its decoder as we should understand it, and how the file says so."""

    architecture: str
    decoder: Decoder
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantised: dict[str, gguf.GGMLQuantizationType] = dataclasses.field(default_factory=dict)


def _decoder(depth: int, heads: int, kv_heads: int, head_dim: int, **fields) -> Decoder:
    return Decoder(VOCAB, WIDTH, depth, MLP, heads, kv_heads, head_dim, **fields)


_GEMMA = {
    "norm": "rms_plus_one",
    "norm_eps": 1e-3,
    "activation": "gelu_tanh",
    "embed_root": True,
    "tied": True,
}
_LLAMA3 = {"rope_factor": 8.0, "rope_original": 8192, "rope_low": 1.0, "rope_high": 4.0}

CASES = {
    "llama": Case("llama", _decoder(3, 6, 2, 16, norm_eps=3e-4, rope_theta=700.0, tied=True)),
    "llama_quantised": Case(
        "llama",
        _decoder(2, 4, 4, 24),
        quantised={
            "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
            "blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q4_1,
            "blk.1.attn_k.weight": gguf.GGMLQuantizationType.Q4_0,
        },
    ),
    "llama3": Case("llama", _decoder(2, 6, 3, 16, rope_theta=500_000.0, **_LLAMA3)),
    "mistral": Case(
        "llama",
        _decoder(3, 3, 1, 32, window=5, pattern=("local",)),
        {"attention.sliding_window": 5},
    ),
    "qwen2": Case("qwen2", _decoder(2, 6, 2, 16, norm_eps=1e-6, qkv_bias=True, rope_theta=1e4)),
    "qwen3": Case(
        "qwen3",
        _decoder(2, 5, 1, 20, norm_eps=1e-6, qk_norm=True, rope_theta=3e3, tied=True),
        {"attention.key_length": 20, "attention.value_length": 20},
    ),
    "gemma": Case(
        "gemma",
        _decoder(2, 5, 1, 20, **_GEMMA),
        {"attention.key_length": 20, "attention.value_length": 20},
    ),
    "gemma2": Case(
        "gemma2",
        _decoder(
            3,
            6,
            2,
            20,
            **_GEMMA,
            post_norms=True,
            attention_cap=3.0,
            logit_cap=2.0,
            window=4,
            pattern=("local", "global"),
        ),
        {
            "attention.key_length": 20,
            "attention.value_length": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
            "attention.sliding_window": 4,
        },
    ),
    "gemma3": Case(
        "gemma3",
        _decoder(
            7,
            6,
            2,
            20,
            **_GEMMA,
            post_norms=True,
            qk_norm=True,
            rope_theta=5e4,
            rope_factor=8.0,
            window=4,
            pattern=("local",) * 5 + ("global",),
            local_theta=10_000.0,
        ),
        {
            "attention.key_length": 20,
            "attention.value_length": 20,
            "attention.sliding_window": 4,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}


def tensors(case: Case) -> dict[str, np.ndarray]:
    """Numbers for every tensor that such a file has, in llama.cpp's names and layouts."""
    d = case.decoder
    query, key = d.heads * d.head_dim, d.kv_heads * d.head_dim
    shapes = {"token_embd.weight": (d.vocab, d.width), "output_norm.weight": (d.width,)}
    if not d.tied:
        shapes["output.weight"] = (d.vocab, d.width)
    for i in range(d.depth):
        block = {
            "attn_norm.weight": (d.width,),
            "attn_q.weight": (query, d.width),
            "attn_k.weight": (key, d.width),
            "attn_v.weight": (key, d.width),
            "attn_output.weight": (d.width, query),
            "ffn_norm.weight": (d.width,),
            "ffn_gate.weight": (d.mlp, d.width),
            "ffn_up.weight": (d.mlp, d.width),
            "ffn_down.weight": (d.width, d.mlp),
        }
        if d.qkv_bias:
            block |= {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
        if d.qk_norm:
            block |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (d.head_dim,))
        if d.post_norms:
            block |= {"post_attention_norm.weight": (d.width,), "post_ffw_norm.weight": (d.width,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(len(shapes))
    made = {}
    for name, shape in shapes.items():
        made[name] = 0.2 * rng.normal(size=shape).astype(np.float32)
        if name.endswith("norm.weight"):  # at least a half: see the layout "plus_one"
            made[name] = rng.uniform(0.5, 2.0, shape).astype(np.float32)
    if d.rope_original:
        made["rope_freqs.weight"] = llama3_factors(d)
    return made


def llama3_factors(d: Decoder) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by, one after the other."""
    factors = []
    for i in range(0, d.head_dim, 2):
        wavelength = 2 * math.pi * d.rope_theta ** (i / d.head_dim)
        turns = d.rope_original / wavelength
        share = min(1.0, max(0.0, (turns - d.rope_low) / (d.rope_high - d.rope_low)))
        factors.append(1 / (share + (1 - share) / d.rope_factor))
    return np.array(factors, np.float32)


def write(path: pathlib.Path, case: Case, metadata: dict[str, Any] | None = None) -> None:
    """The case as a file; `metadata` is added to it, or changes it."""
    d, name = case.decoder, case.architecture
    writer = gguf.GGUFWriter(path, name)
    entries = {
        "embedding_length": d.width,
        "block_count": d.depth,
        "feed_forward_length": d.mlp,
        "context_length": 64,
        "vocab_size": d.vocab,
        "attention.head_count": d.heads,
        "attention.head_count_kv": d.kv_heads,
        "attention.layer_norm_rms_epsilon": d.norm_eps,
        "rope.freq_base": d.rope_theta,
    }
    if name == "llama":
        entries["rope.dimension_count"] = d.head_dim
    for key, value in (entries | case.metadata | (metadata or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{name}.{key}", value)
    for tensor, array in tensors(case).items():
        if tensor in case.quantised:
            kind = case.quantised[tensor]
            writer.add_tensor(tensor, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
