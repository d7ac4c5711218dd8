"""Cambrian's language model stated in numpy: a Llama whose visual tokens look again between layers.

After cambrian/model/language_model/cambrian_llama.py and Llama's definition, over the names of a
published folder; nothing here is shared with `vlm_jax`. One document at a time, its images where
they stand.
"""

import numpy as np
from connector_statements import (
    attention,
    cambrian_layer,
    cambrian_maps,
    cambrian_windows,
    gelu,
    linear,
    silu,
)


def logits(model, tensors, document, features):
    """Logits of one document [L, V].

    Args:
      model: its sizes are read.
      tensors: by their names.
      document: its tokens, and where the visual tokens of its images stand.
      features: what each encoder sees in the document's images, [n, P, E] each.
    """
    preset = model.connector
    grids = [encoder.grid for encoder in model.encoders]
    x = tensors["model.embed_tokens.weight"][document.tokens]
    stands = document.visual_index >= 0
    if stands.any():
        fed = {f"x{i}": x.astype(np.float64) for i, x in enumerate(features)}
        maps = cambrian_maps(preset, tensors, grids, **fed)
        x[stands] = visual(preset, tensors, maps)[document.visual_index[stands]]
    after = [model.samplers.start + k * model.samplers.stride for k in range(model.samplers.count)]
    for i in range(model.decoder.depth):
        x = layer(model.decoder, tensors, f"model.layers.{i}", x)
        if i in after and stands.any():
            name = f"vision_sampler_layers.{after.index(i)}.layers.0"
            x = looked(preset, tensors, name, x, document, maps)
    return linear(rms_norm(model.decoder, tensors, "model.norm", x), tensors, "lm_head")


def visual(preset, tensors, maps):
    """Visual tokens of all images one after the other, a newline behind every row of each."""
    found, context = [], maps[0].mean((1, 2))
    for n in range(len(context)):
        for r in range(preset.side):
            for c in range(preset.side):
                windows, visible = cambrian_windows(preset, maps, {}, r, c)
                query = np.broadcast_to(tensors["vision_query"], context.shape)
                for k in range(preset.layers):
                    name = f"vision_sampler_0.layers.{k}"
                    query = cambrian_layer(preset, tensors, name, query, context, windows, visible)
                y = linear(query[n], tensors, "mm_projector.0")
                found.append(linear(gelu(y), tensors, "mm_projector.2"))
            found.append(tensors["image_newline"])
    return np.array(found)


def looked(preset, tensors, name, x, document, maps):
    """Hidden states after a sampler, visual token by visual token."""
    x, context, row = x.copy(), maps[0].mean((1, 2)), preset.side + 1
    for at, index in enumerate(document.visual_index):
        n, (r, c) = index // (preset.side * row), divmod(index % (preset.side * row), row)
        if index < 0 or c == preset.side:
            continue
        windows, visible = cambrian_windows(preset, maps, {}, r, c)
        queries = np.broadcast_to(x[at], (len(context), x.shape[1]))
        x[at] = cambrian_layer(preset, tensors, name, queries, context, windows, visible)[n]
    return x


def layer(decoder, tensors, name, x):
    """One layer of a Llama over one document [L, D]."""
    y = rms_norm(decoder, tensors, f"{name}.input_layernorm", x)
    heads, shared, size = decoder.heads, decoder.kv_heads, decoder.head_dim

    def split(part, count):
        return linear(y, tensors, f"{name}.self_attn.{part}_proj").reshape(len(y), count, size)

    query, key = (rotated(decoder, split(*of)) for of in (("q", heads), ("k", shared)))
    key, value = (np.repeat(part, heads // shared, axis=1) for part in (key, split("v", shared)))
    found = np.empty(query.shape)
    for t in range(len(x)):
        flat = lambda part: part.reshape(1, len(part), -1)  # noqa: E731
        past = flat(key[: t + 1]), flat(value[: t + 1])
        found[t] = attention(flat(query[t : t + 1]), *past, heads).reshape(heads, size)
    x = x + linear(found.reshape(len(x), -1), tensors, f"{name}.self_attn.o_proj")
    y = rms_norm(decoder, tensors, f"{name}.post_attention_layernorm", x)
    y = silu(linear(y, tensors, f"{name}.mlp.gate_proj")) * linear(
        y, tensors, f"{name}.mlp.up_proj"
    )
    return x + linear(y, tensors, f"{name}.mlp.down_proj")


def rms_norm(decoder, tensors, name, x):
    """A norm by the root of the mean square."""
    root = np.sqrt((x**2).mean(-1, keepdims=True) + decoder.norm_eps)
    return x / root * tensors[f"{name}.weight"]


def rotated(decoder, x):
    """Rotary positions, counted from the document's start."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] / decoder.rope_theta ** (np.arange(half) / half)
    turn = np.exp(1j * angle)[:, None] * (x[..., :half] + 1j * x[..., half:])
    return np.concatenate([turn.real, turn.imag], axis=-1)
