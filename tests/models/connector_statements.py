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


def mplug_owl(preset, tensors, x0, mask0):
    """mPLUG-Owl's abstractor (mplug_owl/modeling_mplug_owl.py): it adds to the normed queries."""
    x = np.broadcast_to(tensors["query_tokens"][0], (len(x0), preset.queries, x0.shape[-1]))
    visible = np.concatenate([np.ones(x.shape[:2], bool), mask0], axis=1)
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


def clipcap_mlp(preset, tensors, x0):
    """ClipCap's MLP over an image's only feature."""
    hidden = np.tanh(linear(x0[:, 0], tensors, "clip_project.model.0"))
    found = linear(hidden, tensors, "clip_project.model.2")
    return found.reshape(len(x0), preset.queries, -1)


def clipcap_transformer(preset, tensors, x0):
    """ClipCap's transformer over tokens made of the feature, then learned ones."""
    queries = tensors["clip_project.prefix_const"]
    seeds = linear(x0[:, 0], tensors, "clip_project.linear")
    seeds = seeds.reshape(len(x0), preset.seeds, queries.shape[1])
    x = np.concatenate([seeds, np.broadcast_to(queries, (len(x0), *queries.shape))], axis=1)
    for i in range(preset.layers):
        at = f"clip_project.transformer.layers.{i}"
        y = layer_norm(x, tensors, f"{at}.norm1")
        key, value = np.split(linear(y, tensors, f"{at}.attn.to_keys_values"), 2, axis=-1)
        out = attention(linear(y, tensors, f"{at}.attn.to_queries"), key, value, preset.heads)
        x = x + linear(out, tensors, f"{at}.attn.project")
        y = linear(layer_norm(x, tensors, f"{at}.norm2"), tensors, f"{at}.mlp.fc1")
        x = x + linear(np.maximum(y, 0), tensors, f"{at}.mlp.fc2")
    return x[:, preset.seeds :]


def resized(x, grid, side):
    """Bilinear interpolation of a grid's features to side x side, corners not aligned."""
    rows, columns = grid
    x = x.reshape(len(x), rows, columns, -1)
    found = np.empty((len(x), side, side, x.shape[-1]))
    for r in range(side):
        for c in range(side):
            (y0, y1, dy), (x0, x1, dx) = _between(r, rows, side), _between(c, columns, side)
            top = (1 - dx) * x[:, y0, x0] + dx * x[:, y0, x1]
            bottom = (1 - dx) * x[:, y1, x0] + dx * x[:, y1, x1]
            found[:, r, c] = (1 - dy) * top + dy * bottom
    return found


def _between(place, size, side):
    at = max((place + 0.5) * size / side - 0.5, 0.0)
    low = min(int(at), size - 1)
    return low, min(low + 1, size - 1), at - low


def cambrian(preset, tensors, **fed):
    """Cambrian's aggregator (cambrian/model/{cambrian_arch,vision_sampler}.py), place by place."""
    maps = cambrian_maps(preset, tensors, **fed)
    context = maps[0].mean((1, 2))
    rows = []
    for r in range(preset.side):
        row = [_sampled(preset, tensors, maps, context, fed, r, c) for c in range(preset.side)]
        newline = np.broadcast_to(tensors["image_newline"], row[0].shape)
        rows += [*row, newline]
    return np.stack(rows, axis=1)


def cambrian_maps(preset, tensors, grids, **fed):
    """The projected features of every encoder, [n, side, side, W]."""
    maps = []
    for i, side in enumerate(preset.sides):
        x = resized(fed[f"x{i}"], grids[i], side)
        x = gelu(linear(x, tensors, f"mm_projector_aux_{i}.0"))
        x = linear(x, tensors, f"mm_projector_aux_{i}.2")
        maps.append(layer_norm(x, tensors, f"mm_projector_aux_{i}.3"))
    return maps


def cambrian_masked(preset, tensors, **fed):
    """The same with padding."""
    return cambrian(preset, tensors, **fed)


def _sampled(preset, tensors, maps, context, fed, r, c):
    """The visual token at one place."""
    windows, visible = cambrian_windows(preset, maps, fed, r, c)
    queries = np.broadcast_to(tensors["vision_query"], context.shape)
    for layer in range(preset.layers):
        at = f"vision_sampler_0.layers.{layer}"
        queries = cambrian_layer(preset, tensors, at, queries, context, windows, visible)
    return linear(gelu(linear(queries, tensors, "mm_projector.0")), tensors, "mm_projector.2")


def cambrian_windows(preset, maps, fed, r, c):
    """What the query at one place looks at, and what of it is there."""
    windows, visible = [], []
    for i, features in enumerate(maps):
        size = preset.sides[i] // preset.side
        at = np.s_[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
        windows.append(features[at].reshape(len(features), size**2, -1))
        mask = np.ones(features.shape[:3], bool)
        if f"mask{i}" in fed:
            mask = fed[f"mask{i}"].reshape(mask.shape)
        mask = mask[at].reshape(len(features), -1)
        visible.append(np.where(mask.any(1, keepdims=True), mask, True))
    return windows, np.concatenate(visible, axis=1)


def cambrian_layer(preset, tensors, at, queries, context, windows, visible):
    """One joint layer for one query of every image [n, D]; `at` names it."""
    whole = linear(context, tensors, f"{at}.proj_context")
    x = linear(np.concatenate([queries, whole], axis=1), tensors, f"{at}.proj_in")
    key, value = [], []
    for i, window in enumerate(windows):
        if window.shape[1] > 1:
            window = window + tensors[f"{at}.pos_embed_{i}"]
        for found, letter in ((key, "k"), (value, "v")):
            name = f"{at}.cross_attn.{letter}_proj_{i}"
            found.append(linear(layer_norm(window, tensors, f"{name}.0"), tensors, f"{name}.1"))
    name = f"{at}.cross_attn.q_proj"
    query = linear(layer_norm(x, tensors, f"{name}.0"), tensors, f"{name}.1")
    both = np.concatenate(key, axis=1), np.concatenate(value, axis=1)
    out = attention(query[:, None], *both, preset.heads, visible)[:, 0]
    x = layer_norm(x + linear(out, tensors, f"{at}.cross_attn.o_proj"), tensors, f"{at}.norm")
    x = gelu(linear(x, tensors, f"{at}.proj_out.linear_1"))
    return queries + linear(x, tensors, f"{at}.proj_out.linear_2")
