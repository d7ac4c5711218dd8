"""Published connectors that transformers lacks, stated in numpy over their own tensors' names.

Written from the definitions alone; nothing here is shared with `vlm_jax`.
"""

import math

import numpy as np


def linear(x, tensors, name):
    """A torch linear layer, whose bias may be absent."""
    return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)


def layer_norm(x, tensors, name, eps=1e-5):
    """A torch LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(x):
    """The exact GELU."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    """x times its logistic function."""
    return x / (1 + np.exp(-x))


def attention(query, key, value, heads, visible=None):
    """Multi-head attention of [n, Q, W] over [n, S, W]; `visible` [n, S]."""
    found = []
    for q, k, v in zip(*(np.split(x, heads, axis=-1) for x in (query, key, value))):
        scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
        if visible is not None:
            scores = np.where(visible[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.concatenate(found, axis=-1)


def open_flamingo(preset, tensors, x0):
    """OpenFlamingo's resampler (open_flamingo/src/helpers.py)."""
    latents = np.broadcast_to(tensors["perceiver.latents"], (len(x0), preset.queries, x0.shape[-1]))
    for i in range(preset.layers):
        at, ff = f"perceiver.layers.{i}.0", f"perceiver.layers.{i}.1"
        media = layer_norm(x0, tensors, f"{at}.norm_media")
        normed = layer_norm(latents, tensors, f"{at}.norm_latents")
        both = np.concatenate([media, normed], axis=1)
        key, value = np.split(linear(both, tensors, f"{at}.to_kv"), 2, axis=-1)
        query = linear(normed, tensors, f"{at}.to_q")
        out = attention(query, key, value, preset.heads)
        latents = latents + linear(out, tensors, f"{at}.to_out")
        hidden = gelu(linear(layer_norm(latents, tensors, f"{ff}.0"), tensors, f"{ff}.1"))
        latents = latents + linear(hidden, tensors, f"{ff}.3")
    return layer_norm(latents, tensors, "perceiver.norm")


def mplug_owl(preset, tensors, x0, mask):
    """mPLUG-Owl's abstractor (mplug_owl/modeling_mplug_owl.py): it adds to the normed queries."""
    x = np.broadcast_to(tensors["query_tokens"][0], (len(x0), preset.queries, x0.shape[-1]))
    visible = np.concatenate([np.ones(x.shape[:2], bool), mask], axis=1)
    for i in range(preset.layers):
        at = f"abstractor.encoder.layers.{i}.crossattention"
        x = layer_norm(x, tensors, f"{at}.norm1")
        both = np.concatenate([x, layer_norm(x0, tensors, f"{at}.normk")], axis=1)
        query = linear(x, tensors, f"{at}.attention.query")
        key, value = (linear(both, tensors, f"{at}.attention.{k}") for k in ("key", "value"))
        out = attention(query, key, value, preset.heads, visible)
        x = x + linear(out, tensors, f"{at}.output.out_proj")
        y = layer_norm(x, tensors, f"{at}.output.norm2")
        ff = f"{at}.output.mlp"
        y = silu(linear(y, tensors, f"{ff}.w1")) * linear(y, tensors, f"{ff}.w3")
        y = layer_norm(y, tensors, f"{ff}.ffn_ln", preset.mlp_norm_eps)
        x = x + linear(y, tensors, f"{ff}.w2")
    x = linear(x, tensors, "abstractor.visual_fc")
    end = np.broadcast_to(tensors["abstractor.vit_eos"], (len(x), 1, x.shape[-1]))
    return np.concatenate([x, end], axis=1)
