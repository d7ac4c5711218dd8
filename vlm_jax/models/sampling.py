"""Greedy generation: with a KV cache, and by full passes as its reference.

Prompts come one document per row, left-aligned; T prompt positions, padded on the right.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.batch import Batch
from vlm_jax.models.vlm import VLM, attention_mask


def greedy(vlm: VLM, batch: Batch, visual, new_tokens: int, eos: int) -> Int[Array, "B new"]:
    """The most likely continuation of every row, token by token.

    Args:
      vlm: the model.
      batch: prompts, one per row.
      visual: visual tokens as `vlm.visual` gives them, or None.
      new_tokens: how many tokens to make at most; stops when every row has ended.
      eos: id of the end token; rows that ended are filled with it.
    """
    rows, prompt = batch.tokens.shape
    slots = prompt + new_tokens
    lengths = (batch.segments > 0).sum(axis=1)
    cache = vlm.empty_cache(rows, slots, visual)
    hidden, cache = vlm.decoder(
        vlm.fuse(batch, visual),
        batch.positions,
        jnp.pad(attention_mask(batch), ((0, 0), (0, 0), (0, 0), (0, new_tokens))),
        cache,
        key_positions=jnp.pad(batch.positions, ((0, 0), (0, new_tokens))),
        hook=vlm.hook(batch.image_index, cache=cache),
    )
    last_image = looked_at_last(batch)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    token = vlm.unembed(last)[:, 0].argmax(-1).astype(jnp.int32)
    prompt_slots = jnp.arange(slots)[None] < lengths[:, None]
    made = lengths[:, None] + jnp.arange(new_tokens)
    key_positions = jnp.concatenate([batch.positions, made], axis=1)

    def unfinished(state):
        index, token, done, _, _ = state
        return (index < new_tokens) & ~(done | (token == eos)).all()

    def step(state):
        index, token, done, output, cache = state
        output = output.at[:, index].set(jnp.where(done, eos, token))
        done = done | (token == eos)
        mask = _visible(prompt_slots, prompt, index)
        x = vlm.decoder.embed(token[:, None])
        positions = (lengths + index)[:, None]
        hook = vlm.hook(last_image, cache=cache)
        hidden, cache = vlm.decoder(
            x, positions, mask, cache, prompt + index, key_positions, hook=hook
        )
        token = vlm.unembed(hidden)[:, 0].argmax(-1).astype(jnp.int32)
        return index + 1, token, done, output, cache

    output = jnp.full((rows, new_tokens), eos, jnp.int32)
    start = (jnp.int32(0), token, lengths == 0, output, cache)
    return jax.lax.while_loop(unfinished, step, start)[3]


def looked_at_last(batch: Batch) -> Int[Array, "B 1"]:
    """The image that the last token of a prompt looks at, as tokens made after it do; -1 = none."""
    last = (batch.segments > 0).sum(axis=1, keepdims=True) - 1
    return jnp.take_along_axis(batch.image_index, jnp.maximum(last, 0), axis=1)


def _visible(
    prompt_slots: Bool[Array, "B S"], prompt: int, index: Int[Array, ""]
) -> Bool[Array, "B 1 1 S"]:
    """Slots a new token may look at: its row's prompt and the tokens made so far, itself too."""
    slot = jnp.arange(prompt_slots.shape[1])[None]
    made = (slot >= prompt) & (slot <= prompt + index)
    return (prompt_slots | made)[:, None, None]


def greedy_uncached(
    vlm: VLM, batch: Batch, visual, new_tokens: int, eos: int
) -> Int[Array, "B new"]:
    """The same tokens by a full pass over everything for each of them."""
    lengths, last_image = (batch.segments > 0).sum(axis=1), looked_at_last(batch)[:, 0]
    grow = lambda x, fill: jnp.pad(x, ((0, 0), (0, new_tokens)), constant_values=fill)  # noqa: E731
    batch = batch._replace(
        tokens=grow(batch.tokens, 0),
        segments=grow(batch.segments, 0),
        positions=grow(batch.positions, 0),
        blocks=grow(batch.blocks, 0),
        visual_index=grow(batch.visual_index, -1),
        image_index=grow(batch.image_index, -1),
    )
    rows = jnp.arange(batch.tokens.shape[0])

    def step(index, state):
        batch, done, output = state
        logits = _last_logits(vlm, batch, visual, lengths + index - 1)
        token = jnp.where(done, eos, logits.argmax(-1).astype(jnp.int32))
        slot = lengths + index
        batch = batch._replace(
            tokens=batch.tokens.at[rows, slot].set(token),
            segments=batch.segments.at[rows, slot].set(1),
            positions=batch.positions.at[rows, slot].set(slot),
            image_index=batch.image_index.at[rows, slot].set(last_image),
        )
        return batch, done | (token == eos), output.at[:, index].set(token)

    output = jnp.full((rows.size, new_tokens), eos, jnp.int32)
    return jax.lax.fori_loop(0, new_tokens, step, (batch, lengths == 0, output))[2]


def _last_logits(vlm: VLM, batch: Batch, visual, at: Int[Array, " B"]) -> Float[Array, "B V"]:
    hidden = vlm.hidden(batch, visual)
    last = jnp.take_along_axis(hidden, jnp.maximum(at, 0)[:, None, None], axis=1)
    return vlm.unembed(last)[:, 0]
