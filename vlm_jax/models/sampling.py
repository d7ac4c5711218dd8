"""Generation: greedy, sampled or by beam search, with a KV cache; full passes as its reference.

Prompts come one document per row, left-aligned; T prompt positions, padded on the right. V
vocabulary, S slots of the cache: those of the prompt, then one per new token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlm_jax.batch import Batch
from vlm_jax.models.sva import Visual
from vlm_jax.models.vlm import VLM, attention_mask, block_mask
from vlm_jax.presets.generation import Generation

# Added to the score of a hypothesis that must not be chosen.
FORBIDDEN = -1e9

# Backends on which layers' parameters are cut out of their stack once, before the loop: XLA's for
# CPUs otherwise copies them for every token. It costs the decoder's memory once more.
CUT_APART = ("cpu",)

Ends = Sequence[int | Int[Array, ""]]


def generate(
    vlm: VLM,
    batch: Batch,
    visual: Float[Array, "B N Q D"] | Visual | None,
    options: Generation,
    ends: Ends = (),
    keys: Key[Array, " B"] | None = None,
) -> Int[Array, "B new"]:
    """A continuation of every row.

    Args:
      vlm: the model.
      batch: prompts, one per row.
      visual: visual tokens as `vlm.visual` gives them, or None.
      options: `max_new_tokens` must be set; `stop` is not read.
      ends: ids that end a row; without any, every row gets exactly `max_new_tokens` tokens.
      keys: a PRNG key per row, where tokens are drawn: a row's draws depend on its own key alone.

    Returns:
      Tokens, the one that ended a row included. What follows it is filled with the first of `ends`,
      as are rows without a prompt (0 without `ends`).
    """
    search = _sequence if options.beams == 1 else _beam_search
    lengths = (batch.segments > 0).sum(axis=1)
    ends = jnp.array(ends, jnp.int32).reshape(-1)
    logits, cache, step = _prefill(vlm, batch, visual, options)
    return search(logits, cache, step, lengths == 0, options, ends, keys)


def greedy(vlm: VLM, batch: Batch, visual, new_tokens: int, eos: int) -> Int[Array, "B new"]:
    """The most likely tokens; rows that ended are filled with `eos`. See `generate`."""
    return generate(vlm, batch, visual, Generation(max_new_tokens=new_tokens), (eos,))


def filtered(logits: Float[Array, "... V"], options: Generation) -> Float[Array, "... V"]:
    """Logits of the distribution that tokens are drawn from: -inf where one cannot be.

    Temperature, then the top k, then the top p, as in transformers. Of equally likely tokens at the
    edge all stay.
    """
    logits = logits / options.temperature
    if options.top_k:
        least = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if options.top_p < 1:
        rising = jnp.sort(logits, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) <= 1 - options.top_p
        below = below.at[..., -1].set(False)
        least = jnp.where(below, jnp.inf, rising).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _prefill(vlm: VLM, batch: Batch, visual, options: Generation):
    """Reads the prompts.

    Returns:
      Logits of the first new token [B, V]; the cache, of B * beams rows; and the function that
      reads a token of each of them, `step(token, index, cache) -> logits, cache`.
    """
    new, beams = options.max_new_tokens, options.beams
    rows, prompt = batch.tokens.shape
    lengths = (batch.segments > 0).sum(axis=1)
    cache = vlm.empty_cache(rows, prompt + new, visual)
    grow = lambda mask: jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, new)))  # noqa: E731
    hidden, cache = vlm.decoder(
        vlm.fuse(batch, visual),
        batch.positions,
        grow(attention_mask(batch)),
        cache,
        key_positions=jnp.pad(batch.positions, ((0, 0), (0, new))),
        hook=vlm.hook(batch.image_index, visual, cache, batch.visual_index),
        together=grow(block_mask(batch)),
    )
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    logits = vlm.unembed(last)[:, 0]

    cut_apart = jax.default_backend() in CUT_APART and vlm.decoder.cross is None
    decoder = vlm.decoder.apart() if cut_apart else vlm.decoder
    last_image = _repeated(looked_at_last(batch), beams)
    made = lengths[:, None] + jnp.arange(new)
    key_positions = _repeated(jnp.concatenate([batch.positions, made], axis=1), beams)
    slots = jnp.arange(prompt + new)
    of_prompt = _repeated(slots < lengths[:, None], beams)
    lengths = _repeated(lengths, beams)

    def step(token: Int[Array, " R"], index: Int[Array, ""], cache):
        # A new token looks at its row's prompt and at the tokens made so far, itself too.
        visible = of_prompt | ((slots >= prompt) & (slots <= prompt + index))
        hidden, cache = decoder(
            decoder.embed(token[:, None]),
            (lengths + index)[:, None],
            visible[:, None, None],
            cache,
            prompt + index,
            key_positions,
            hook=vlm.hook(last_image, cache=cache),
        )
        return decoder.unembed(hidden)[:, 0], cache

    return logits, jax.tree.map(lambda leaf: _repeated(leaf, beams, axis=1), cache), step


def _repeated(x: Array, times: int, axis: int = 0) -> Array:
    return x if times == 1 else jnp.repeat(x, times, axis=axis)


def _is_end(tokens: Int[Array, "..."], ends: Int[Array, " E"]) -> Bool[Array, "..."]:
    return (tokens[..., None] == ends).any(axis=-1)


def _without_early_end(
    scores: Float[Array, "B V"], index, options: Generation, ends: Int[Array, " E"]
) -> Float[Array, "B V"]:
    """No end among the first `min_new_tokens`."""
    if not options.min_new_tokens:
        return scores
    early = _is_end(jnp.arange(scores.shape[-1]), ends) & (index < options.min_new_tokens)
    return jnp.where(early, -jnp.inf, scores)


def _sequence(
    logits, cache, step: Callable, empty: Bool[Array, " B"], options: Generation, ends, keys
) -> Int[Array, "B new"]:
    """One token after the other, the most likely or one drawn."""
    new, fill = options.max_new_tokens, _fill(ends)

    def choose(logits, index, done):
        logits = _without_early_end(logits, index, options, ends)
        if options.temperature:
            drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            token = jax.vmap(jax.random.categorical)(drawn, filtered(logits, options))
        else:
            token = logits.argmax(-1)
        token = jnp.where(done, fill, token.astype(jnp.int32))
        return token, done | _is_end(token, ends)

    def unfinished(state):
        index, _, done, _ = state
        return (index + 1 < new) & ~done.all()

    def extend(state):
        index, output, done, cache = state
        logits, cache = step(output[:, index], index, cache)
        token, done = choose(logits, index + 1, done)
        return index + 1, output.at[:, index + 1].set(token), done, cache

    token, done = choose(logits, 0, empty)
    output = jnp.full((len(token), new), fill, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(unfinished, extend, (jnp.int32(0), output, done, cache))[1]


def looked_at_last(batch: Batch) -> Int[Array, "B 1"]:
    """The image that the last token of a prompt looks at, as tokens made after it do; -1 = none."""
    last = (batch.segments > 0).sum(axis=1, keepdims=True) - 1
    return jnp.take_along_axis(batch.image_index, jnp.maximum(last, 0), axis=1)


def _fill(ends: Int[Array, " E"]) -> Int[Array, ""]:
    return ends[0] if len(ends) else jnp.int32(0)


class _Beams(NamedTuple):
    """Hypotheses of a beam search: K that still run and the K best finished ones, best first.

    Attributes:
      tokens, scores: of those that run, log-probabilities.
      parents: from which of the K each of them was continued.
      ended, ended_scores: finished hypotheses, divided by the length penalty.
      real: whether a finished hypothesis is one.
      open: whether a better one may come.
    """

    tokens: Int[Array, "B K new"]
    scores: Float[Array, "B K"]
    parents: Int[Array, "B K"]
    ended: Int[Array, "B K new"]
    ended_scores: Float[Array, "B K"]
    real: Bool[Array, "B K"]
    open: Bool[Array, " B"]


def _beam_search(
    logits, cache, step: Callable, empty: Bool[Array, " B"], options: Generation, ends, keys
) -> Int[Array, "B new"]:
    """The best finished hypothesis of each row, with the rules of transformers' beam search."""
    del keys
    new, count, fill = options.max_new_tokens, options.beams, _fill(ends)
    rows = len(empty)
    every = jnp.arange(count)

    def unfinished(state):
        index, beams, _ = state
        go_on = beams.open
        if options.early_stopping:
            go_on = go_on & ~beams.real.all(axis=1)
        return (index + 1 < new) & go_on.any()

    def extend(state):
        index, beams, cache = state
        source = (jnp.arange(rows)[:, None] * count + beams.parents).reshape(-1)
        cache = jax.tree.map(lambda leaf: jnp.take(leaf, source, axis=1), cache)
        logits, cache = step(beams.tokens[:, :, index].reshape(-1), index, cache)
        return index + 1, _continued(beams, logits, index + 1, options, ends), cache

    tokens = jnp.full((rows, count, new), fill, jnp.int32)
    none = jnp.full((rows, count), FORBIDDEN, jnp.float32)
    beams = _Beams(
        tokens=tokens,
        # Equal ones would be continued equally: only the first counts.
        scores=jnp.where(every == 0, 0.0, none),
        parents=jnp.broadcast_to(every, (rows, count)),
        ended=tokens,
        ended_scores=none,
        real=jnp.broadcast_to(empty[:, None], (rows, count)),
        open=~empty,
    )
    beams = _continued(beams, _repeated(logits, count), jnp.int32(0), options, ends)
    beams = jax.lax.while_loop(unfinished, extend, (jnp.int32(0), beams, cache))[1]
    return jnp.where(empty[:, None], fill, beams.ended[:, 0])


def _continued(
    beams: _Beams, logits: Float[Array, "R V"], index: Any, options: Generation, ends
) -> _Beams:
    """The hypotheses with token number `index`."""
    count, vocab = options.beams, logits.shape[-1]
    logs = _without_early_end(jax.nn.log_softmax(logits), index, options, ends)
    logs = logs.reshape(-1, count, vocab) + beams.scores[..., None]
    # Enough that `count` go on even where every end is among the best.
    kept = min(max(2, 1 + len(ends)) * count, count * vocab)
    scores, chosen = jax.lax.top_k(logs.reshape(len(logs), -1), kept)
    parents = chosen // vocab
    tokens = _taken(beams.tokens, parents).at[:, :, index].set(chosen % vocab)
    ends_here = _is_end(chosen % vocab, ends) | (index + 1 == options.max_new_tokens)

    running, best = jax.lax.top_k(scores + FORBIDDEN * ends_here, count)
    penalty = (index + 1.0) ** options.length_penalty
    # Only what is among the best `count` may finish; the rest stands by.
    finishes = ends_here & (jnp.arange(kept) < count) & beams.open[:, None]
    if options.early_stopping:
        finishes = finishes & ~beams.real.all(axis=1, keepdims=True)
    ended_scores = scores / penalty + FORBIDDEN * ~finishes
    merged = jnp.concatenate([beams.ended_scores, ended_scores], axis=1)
    ended_scores, first = jax.lax.top_k(merged, count)
    real = _taken(jnp.concatenate([beams.real, finishes], axis=1), first)
    worst = jnp.where(real, ended_scores.min(axis=1, keepdims=True), FORBIDDEN)
    return _Beams(
        tokens=_taken(tokens, best),
        scores=running,
        parents=_taken(parents, best),
        ended=_taken(jnp.concatenate([beams.ended, tokens], axis=1), first),
        ended_scores=ended_scores,
        real=real,
        open=beams.open & (running[:, :1] / penalty > worst).any(axis=1),
    )


def _taken(x: Array, which: Int[Array, "B K"]) -> Array:
    """Of every row the hypotheses `which`."""
    return jnp.take_along_axis(x, which.reshape(*which.shape, *(1,) * (x.ndim - 2)), axis=1)


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
