"""Generation with a KV cache against full passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade import FAMILIES, MODEL, VOCAB, document, lay_out, model, weights

from vlm_jax.models import params, sampling

NEW, NO_END = 7, -1

MODELS = {
    "gqa": MODEL,
    "one key/value head, untied": model(heads=5, kv_heads=1, head_dim=6, tied=False),
    "as many key/value heads, dropout unused": model(heads=3, kv_heads=3, head_dim=2, dropout=0.5),
    **{name: model(**fields) for name, fields in FAMILIES.items()},
    "a visual token per patch": model(stem="conv", connector={"kind": "mlp"}, rope_theta=50.0),
}


def prompts(model, seed: int):
    """Rows of different lengths: an image inside, two images, text, nothing, a full row.

    The prompts of every other row see each other both ways.
    """
    rng = np.random.default_rng(seed)
    rows = [(3, "image", 2), ("image", 1, "image", 4), (5,), None, (2, "image", 6)]
    queries, documents = model.visual_tokens, []
    for number, parts in enumerate(rows):
        made = [] if parts is None else [document(rng, parts, queries)]
        documents.append([d._replace(prompt=len(d.tokens) * (number % 2)) for d in made])
    longest = max(len(d.tokens) for row in documents for d in row)
    return lay_out(model, documents, longest, slots=2, padding=5, empty=3.0)


@functools.lru_cache
def compiled(function, model):
    def run(flat, batch, eos):
        vlm = params.build(model, flat)
        return function(vlm, batch, vlm.visual(batch.images), NEW, eos)

    return jax.jit(run)


def generate(function, model, flat, batch, eos: int) -> np.ndarray:
    return np.asarray(compiled(function, model)(flat, batch, eos))


@pytest.mark.parametrize("name", MODELS)
def test_cached_generation_equals_full_passes(name):
    model = MODELS[name]
    flat = weights(model, seed=len(name))
    batch = prompts(model, seed=len(name))
    cached = generate(sampling.greedy, model, flat, batch, NO_END)
    np.testing.assert_array_equal(
        cached, generate(sampling.greedy_uncached, model, flat, batch, NO_END)
    )
    # Rows that differ, or the comparison would say little.
    spoken = cached[[0, 1, 2, 4]]
    assert len(np.unique(spoken)) > 4 and len({tuple(row) for row in spoken}) == 4
    assert (cached[3] == NO_END).all()


def test_layers_cut_apart_give_what_the_stack_gives(monkeypatch):
    model = MODELS["windows, caps, two norms"]
    flat, batch = weights(model, seed=6), prompts(model, seed=6)
    apart = generate(sampling.greedy, model, flat, batch, NO_END)
    compiled.cache_clear()
    monkeypatch.setattr(sampling, "CUT_APART", ())
    np.testing.assert_array_equal(apart, generate(sampling.greedy, model, flat, batch, NO_END))
    compiled.cache_clear()


def test_a_row_ends_at_its_own_end_token():
    flat = weights(MODEL, seed=3)
    batch = prompts(MODEL, seed=3)
    endless = generate(sampling.greedy, MODEL, flat, batch, NO_END)
    eos = int(endless[0, 2])
    for function in (sampling.greedy, sampling.greedy_uncached):
        ended = generate(function, MODEL, flat, batch, eos)
        for row, wanted in zip(ended, endless):
            stops = np.flatnonzero((wanted == eos) | (wanted == NO_END))
            length = stops[0] if len(stops) else NEW
            np.testing.assert_array_equal(row[:length], wanted[:length])
            assert (row[length:] == eos).all()


def test_rows_without_a_prompt_say_nothing():
    batch = prompts(MODEL, seed=3)
    empty = batch._replace(segments=jnp.zeros_like(batch.segments))
    assert (generate(sampling.greedy, MODEL, weights(MODEL), empty, 9) == 9).all()


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding():
    flat = weights(MODEL, seed=5)
    rng = np.random.default_rng(5)
    one, other = document(rng, (2, "image", 3)), document(rng, ("image", 9))
    alone = lay_out(MODEL, [[one]], len(one.tokens), slots=1)
    beside = lay_out(MODEL, [[other], [one]], 20, slots=3, padding=VOCAB - 1, empty=7.0)
    np.testing.assert_array_equal(
        generate(sampling.greedy, MODEL, flat, alone, NO_END)[0],
        generate(sampling.greedy, MODEL, flat, beside, NO_END)[1],
    )


def test_the_cache_holds_the_decoders_dtype():
    vlm = params.build(MODEL, weights(MODEL))
    cache = vlm.decoder.empty_cache(2, 9)
    assert cache.keys.shape == cache.values.shape == (3, 2, 3, 9, 4)
    assert cache.keys.dtype == jnp.float32
