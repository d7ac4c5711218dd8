"""Prefixes: what attention does with them, where they may stand, packing and generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade import FAMILIES, MODEL, document, lay_out, logits, model, weights

from vlm_jax.config import Model
from vlm_jax.models import adapters, packed, params, prefixes, quantised, sampling
from vlm_jax.models.layers import attend
from vlm_jax.presets.mapping import Mapping
from vlm_jax.presets.qformer import QFormer

LENGTH = 3


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def prefixed(made: Model, part: str = "", seed: int = 5) -> dict[str, jax.Array]:
    """Prefixes of all attentions of a part that can have one."""
    flat, rng = params.abstract(made), np.random.default_rng(seed)
    spec, found = adapters.Spec(LENGTH, 1.0, prefix=True), {}
    for path in sorted(params.prefixable(made)):
        if path.startswith(part):
            stacked = "/stack/blocks/" in path
            for name, leaf in adapters.shapes(spec, flat[path], 1, stacked).items():
                drawn = rng.normal(size=leaf.shape).astype(np.float32)
                found[adapters.beside(path, name)] = jnp.asarray(drawn)
    return found


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_every_query_looks_at_the_prefix_too(cap):
    """Attention written down in numpy, one query after the other."""
    query, key, value = draw(2, 4, 6, 5, seed=1), draw(2, 4, 3, 5, seed=2), draw(2, 4, 3, 5, seed=3)
    keys, values = draw(LENGTH, 3, 5, seed=4), draw(LENGTH, 3, 5, seed=5)
    mask = jnp.tril(jnp.ones((4, 4), bool))[None, None]
    before = prefixes.Prefix(keys, values)
    found = attend(query, key, value, mask, cap=cap, prefix=before)
    for row, t, head in np.ndindex(2, 4, 6):
        there = np.concatenate([keys[:, head // 2], key[row, : t + 1, head // 2]])
        given = np.concatenate([values[:, head // 2], value[row, : t + 1, head // 2]])
        scores = there @ np.asarray(query[row, t, head]) / np.sqrt(5)
        scores = cap * np.tanh(scores / cap) if cap else scores
        np.testing.assert_allclose(
            found[row, t, head], softmax(scores) @ given, rtol=1e-4, atol=1e-5
        )


def test_what_a_network_makes_is_an_mlp_of_its_embedding():
    own = prefixes.shapes(LENGTH, 7, (2, 5))
    lead = {name: () if name in prefixes.SHARED else (4,) for name in own}
    leaves = {n: draw(*lead[n], *shape, seed=i) for i, (n, shape) in enumerate(own.items())}
    keys, values = prefixes.keys_values(leaves)
    flat = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    hidden = np.tanh(flat[prefixes.EMBEDDING] @ flat[prefixes.INNER] + flat[prefixes.INNER_BIAS])
    for layer, part in np.ndindex(4, 2):
        matrix = flat[prefixes.OUTER][layer, :, part].reshape(7, 10)
        wanted = hidden @ matrix + flat[prefixes.OUTER_BIAS][layer, part].reshape(10)
        found = (keys, values)[part][layer].reshape(LENGTH, 10)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_attentions_of_tokens_to_each_other_can_have_one():
    fewer = {"queries": 2, "width": 12, "heads": 2, "dtype": "float32"}
    former = QFormer(depth=2, mlp=8, every=2, **fewer)
    mapper = Mapping("transformer", queries=2, seeds=2, layers=1, heads=2, dtype="float32")
    pooled = dataclasses.replace(MODEL.encoder, pool="map")
    found = {
        "perceiver": params.prefixable(MODEL),
        "qformer": params.prefixable(dataclasses.replace(MODEL, connector=former)),
        "mapping": params.prefixable(Model(pooled, mapper, MODEL.decoder)),
    }
    towers = {f"{tower}/stack/blocks/attention/key/kernel" for tower in ("encoder", "decoder")}
    assert found["perceiver"] == towers
    layers = "connector/stack/blocks/layers/{}/attention/key/kernel"
    assert found["qformer"] == towers | {layers.format(i) for i in range(2)}
    assert found["mapping"] == towers | {"connector/mapper/stack/blocks/attention/key/kernel"}


OTHERS = ["learned positions", "half rotated, parallel"]


@pytest.mark.parametrize(
    "family", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_each_document_of_a_packed_row_sees_the_prefix_alike(family):
    """With blocks of prompts that see each other both ways, as in a row of its own."""
    made = model(**FAMILIES.get(family, {}))
    rng = np.random.default_rng(0)
    first, second = (document(rng, parts, prompt=5) for parts in ((2, "image", 4), (3, "image", 1)))
    flat = weights(made) | prefixed(made)
    size = len(first.tokens) + len(second.tokens) + 2
    together = logits(made, flat, lay_out(made, [[first, second]], size, slots=2))[0]
    apart = logits(made, flat, lay_out(made, [[first], [second]], size, slots=2))
    cut = len(first.tokens)
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(together[:cut], apart[0, :cut], **close)
    np.testing.assert_allclose(together[cut : size - 2], apart[1, : size - 2 - cut], **close)
    plain = logits(made, weights(made), lay_out(made, [[first], [second]], size, slots=2))
    assert np.abs(plain[0, :cut] - apart[0, :cut]).max() > 0.1


def test_generation_with_a_cache_says_the_same_as_without():
    """Over kernels in few bits, which a loop of single tokens cuts out of their stack."""
    rng, made, flat = np.random.default_rng(1), MODEL, weights(MODEL)
    for path, axes in params.linears(made).items():
        if path.startswith("decoder/") and "mlp" in path:
            held = quantised.hold("nf4", flat.pop(path), axes, True)
            flat |= {quantised.beside(path, name): leaf for name, leaf in held.items()}
    flat |= prefixed(made)
    rows = [[document(rng, (2, "image", 4))], [document(rng, (3,))]]
    batch = lay_out(made, rows, 12, slots=1)

    def generate(how):
        @jax.jit
        def run(flat):
            vlm = params.build(made, flat)
            return how(vlm, batch, vlm.visual(batch.images), 6, 0)

        return np.asarray(run(flat))

    cached = generate(sampling.greedy)
    np.testing.assert_array_equal(cached, generate(sampling.greedy_uncached))
    assert len(np.unique(cached)) > 2


def test_packed_images_see_the_prefix_each():
    """Both ways of attending within images: rows of two slots, the second shorter."""
    rows = packed.Rows(
        owner=jnp.asarray([[0, 0, 0, 1, 1, -1]]),
        place=jnp.asarray([[0, 1, 2, 0, 1, 0]]),
        tokens=jnp.asarray([[[0, 1, 2], [3, 4, 0]]]),
        there=jnp.asarray([[[True] * 3, [True, True, False]]]),
    )
    query, key, value = (draw(1, 6, 2, 5, seed=i) for i in range(3))
    before = prefixes.Prefix(draw(LENGTH, 2, 5, seed=7), draw(LENGTH, 2, 5, seed=8))
    run = functools.partial(packed.over_rows, query, key, value, rows, None)
    found = packed.by_slots(query, key, value, rows, None, before)[:, :5]
    np.testing.assert_allclose(found, run(before)[:, :5], rtol=1e-4, atol=1e-5)
    assert np.abs(found - run()[:, :5]).max() > 0.1
