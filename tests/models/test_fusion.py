"""Cross-attention between decoder layers: what must hold whatever the weights."""

import dataclasses
import itertools
import re

import handmade
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from handmade import VOCAB, change, document, lay_out, logits, weights
from test_properties import gradients

from vlm_jax.batch import Batch
from vlm_jax.config import Model
from vlm_jax.models import params, sampling
from vlm_jax.models.hooks import Hook, run
from vlm_jax.models.layers import Linear, Stack
from vlm_jax.presets.fusion import CrossAttention

CROSS = CrossAttention(
    26, heads=4, kv_heads=2, head_dim=6, every=2, width=16, norm_eps=1e-2, qk_norm=True
)
BOTH = CrossAttention(
    18, heads=3, kv_heads=3, head_dim=5, every=1, start=1, gate="vector", norm="layer", both=True
)


def fused(fusion: CrossAttention, **decoder) -> Model:
    """The handmade decoder behind the smallest encoder and connector."""
    made = handmade.model(connector={"kind": "linear"}, **decoder)
    encoder = dataclasses.replace(made.encoder, depth=1)
    return dataclasses.replace(made, encoder=encoder, fusion=fusion)


MODELS = {"looked at": fused(CROSS), "looked at and read": fused(BOTH)}
PARTS = [(2, "image", 4), ("image", 1, "image", 3)]  # two documents of a packed row


def documents(model: Model, parts=PARTS, seed: int = 0) -> list:
    """Documents in which an image takes as many positions as the model says."""
    rng = np.random.default_rng(seed)
    return [document(rng, part, model.image_positions) for part in parts]


def laid_out(model: Model, rows: list[list], tokens: int = 24, slots: int = 4, **fields) -> Batch:
    """As `lay_out`, with the image that each token looks at."""
    batch = lay_out(model, rows, tokens, slots, **fields)
    visual, segments = np.asarray(batch.visual_index), np.asarray(batch.segments)
    starts = visual >= 0
    if model.fusion.both:
        starts &= visual % model.visual_tokens == 0
    index = np.full_like(visual, -1)
    for row, t in itertools.product(*map(range, visual.shape)):
        before = starts[row, : t + 1] & (segments[row, : t + 1] == segments[row, t])
        if segments[row, t] and before.any():
            index[row, t] = starts[row, : t + 1].sum() - 1
    in_sequence = batch.visual_index if model.fusion.both else np.full_like(visual, -1)
    return batch._replace(image_index=jnp.asarray(index), visual_index=jnp.asarray(in_sequence))


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_gives_its_documents_logits_alone(name):
    model = MODELS[name]
    flat, (first, second) = weights(model), documents(model)
    lengths = len(first.tokens), len(second.tokens)
    packed = laid_out(model, [[first, second], []], empty=9.0)
    alone = laid_out(model, [[first], [second]])
    together, apart = logits(model, flat, packed)[0], logits(model, flat, alone)
    for start, row, length in ((0, 0, lengths[0]), (lengths[0], 1, lengths[1])):
        found = together[start : start + length]
        np.testing.assert_allclose(found, apart[row, :length], rtol=1e-4, atol=1e-5)


def test_an_image_changes_its_own_placeholder_and_what_follows():
    model = MODELS["looked at"]
    flat, (first, _) = weights(model), documents(model)
    other = first._replace(pixels=[first.pixels[0] + 1])
    one, two = logits(model, flat, laid_out(model, [[first], [other]]))
    np.testing.assert_array_equal(one[:2], two[:2])
    length = len(first.tokens)
    assert (np.abs(one[2:length] - two[2:length]).max(axis=-1) > 1e-3).all()


def test_text_alone_needs_no_encoder_and_gives_it_no_gradient():
    model = MODELS["looked at"]
    flat = weights(model)
    batch = laid_out(model, [documents(model, [(7,), (4,)]), []], empty=1.0)
    seen, unseen = (logits(model, flat, batch, visual=visual) for visual in (True, False))
    np.testing.assert_allclose(seen, unseen, rtol=1e-6, atol=1e-6)
    found = gradients(model, flat, batch)
    blind = {path for path, gradient in found.items() if not np.any(gradient)}
    looking = r"decoder/cross/.*/(norm1|attention|query_norm|key_norm|attention_gate)(/.*)?"
    unused = {p for p in found if not p.startswith("decoder/") or re.fullmatch(looking, p)}
    assert blind == unused


def test_with_gates_at_zero_where_they_start_the_model_says_what_its_decoder_says():
    model = MODELS["looked at"]
    gates = [path for path in params.abstract(model) if path.endswith("_gate")]
    flat = weights(model) | {path: jnp.zeros((2, 1)) for path in gates}
    batch = laid_out(model, [documents(model), []])
    plain = params.abstract(Model(decoder=model.decoder))
    decoder = params.build(Model(decoder=model.decoder), {p: flat[p] for p in plain})
    wanted = decoder.unembed(decoder.hidden(batch, None))
    np.testing.assert_allclose(logits(model, flat, batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_leaf_gets_the_same_finite_gradient_with_and_without_remat():
    model = MODELS["looked at"]
    flat, key = weights(model), jax.random.key(1)
    batch = laid_out(model, [documents(model), []])
    fusion = dataclasses.replace(model.fusion, dropout=0.2)
    plain, remat = (
        gradients(
            dataclasses.replace(change(model, dropout=0.2, remat=remat), fusion=fusion),
            *(flat, batch, key),
        )
        for remat in (False, True)
    )
    largest = max(np.abs(gradient).max() for gradient in plain.values())
    for path, gradient in plain.items():
        assert np.isfinite(gradient).all() and np.any(gradient), path
        atol = 1e-4 * np.abs(gradient).max() + 1e-6 * largest
        np.testing.assert_allclose(remat[path], gradient, rtol=1e-3, atol=atol, err_msg=path)


@pytest.mark.parametrize(
    "name", ["looked at", pytest.param("looked at and read", marks=pytest.mark.slow)]
)
def test_cached_generation_equals_full_passes(name):
    model = MODELS[name]
    flat = weights(model, seed=2)
    parts = [(3, "image", 2), ("image", 1, "image", 4), (5,), (2, "image", 6)]
    rows = [[made] for made in documents(model, parts, seed=2)] + [[]]
    longest = max(len(row[0].tokens) for row in rows[:-1])
    batch = laid_out(model, rows, longest, slots=2, padding=VOCAB - 1, empty=3.0)

    def generate(function):
        def run(flat, batch):
            vlm = params.build(model, flat)
            return function(vlm, batch, vlm.visual(batch.images), 6, -1)

        return np.asarray(jax.jit(run)(flat, batch))

    cached = generate(sampling.greedy)
    np.testing.assert_array_equal(cached, generate(sampling.greedy_uncached))
    assert len({tuple(row) for row in cached}) == 5  # rows that differ, or it would say little


def test_every_leaf_of_the_cache_has_rows_on_its_second_axis():
    model = MODELS["looked at"]
    vlm = params.build(model, weights(model))
    visual = jnp.ones((5, 2, model.visual_tokens, model.visual_width))
    cache = vlm.empty_cache(5, 9, visual)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [
        *[(3, 5, 3, 9, 4)] * 2,
        *[(2, 5, 2, 4, 2, 6)] * 2,
    ]


def test_every_parameter_has_logical_axes_of_its_rank():
    for fusion in (CROSS, BOTH):
        for path, leaf in params.abstract(fused(fusion, added=3, tied=False)).items():
            assert len(params.axes(path)) == len(leaf.shape), path


class Mix(nnx.Module):
    """A block of a stack of no particular kind; it commutes with no other."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = Linear((3,), (3,), bias=False, rngs=rngs)


@pytest.mark.parametrize(
    "first, every, places",
    [(0, 3, 2), (1, 2, 3), (2, 3, 2), (0, 2, 1), (3, 3, 2)],
)
def test_a_hook_stands_before_every_so_many_layers(first, every, places):
    remat = first > 0
    layers = Stack(Mix, 6, remat=remat, rngs=nnx.Rngs(0))
    blocks = Stack(Mix, places, remat=remat, rngs=nnx.Rngs(1))
    per_layer, per_place = jnp.arange(6.0), 10 + jnp.arange(float(places))

    def layer(block, x, number, key):
        x = jnp.tanh(block.linear(x) + number + jax.random.normal(key))
        return x, x.sum()

    def between(block, x, number, key):
        assert key is not None
        return x - block.linear(x * number)

    hook = Hook(blocks, first, every, between, per_place)
    x, key = jnp.ones(3), jax.random.key(3)
    found, outputs = run(layers, hook, layer, x, per_layer=per_layer, key=key)

    keys, sums = jax.random.split(key, 6), []
    at = lambda stack, k: jax.tree.map(lambda leaf: leaf[k], stack.blocks)  # noqa: E731
    for number in range(7):
        k, late = divmod(number - first, every)
        if number >= first and not late and k < places:
            x = between(at(blocks, k), x, per_place[k], key)
        if number < 6:  # a block may stand after the last layer
            x, total = layer(at(layers, number), x, per_layer[number], keys[number])
            sums.append(total)
    np.testing.assert_allclose(found, x, rtol=1e-5)
    np.testing.assert_allclose(outputs, sums, rtol=1e-5)


def test_blocks_beyond_the_last_layer_are_refused():
    layers, blocks = (Stack(Mix, n, remat=False, rngs=nnx.Rngs(0)) for n in (4, 3))
    hook = Hook(blocks, 1, 2, lambda block, x, inputs, key: x)
    with pytest.raises(ValueError, match="3 blocks every 2 layers do not fit 4 layers"):
        run(layers, hook, lambda block, x, inputs, key: (x, None), jnp.ones(3))


def test_a_decoder_takes_another_hook_than_its_own():
    model = handmade.MODEL
    flat, blocks = weights(model), Stack(Mix, 1, remat=False, rngs=nnx.Rngs(0))
    decoder = params.build(model, flat).decoder
    tokens = jnp.arange(1, 6)[None]
    positions, past = jnp.arange(5)[None], jnp.tril(jnp.ones((1, 1, 5, 5), bool))

    def first_three(block, x, inputs, key):
        return x.at[..., :3].add(block.linear(x[..., :3]))

    # Before the first layer, so that it may as well have been there from the start.
    x = decoder.embed(tokens)
    hook = Hook(blocks, 0, 3, first_three)
    only = jax.tree.map(lambda leaf: leaf[0], blocks.blocks)
    found, _ = decoder(x, positions, past, hook=hook)
    wanted, _ = decoder(first_three(only, x, None, None), positions, past)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(found - decoder(x, positions, past)[0]).max() > 1e-2
