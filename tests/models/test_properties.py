"""What must hold whatever the weights: packing, padding, empty slots, dtypes, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade import (
    FAMILIES,
    MODEL,
    QUERIES,
    VOCAB,
    change,
    document,
    lay_out,
    logits,
    model,
    weights,
)

from vlm_jax.models import params
from vlm_jax.models.grids import sincos2d
from vlm_jax.models.layers import drop
from vlm_jax.models.stems import gather
from vlm_jax.models.vlm import attention_mask

PARTS = [(2, "image", 4), ("image", 1, "image", 3)]  # two documents of a packed row


def documents(queries: int = QUERIES, prompt: int = 0, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    return [document(rng, parts, queries, prompt) for parts in PARTS]


def gradients(model, flat, batch, dropout=None, visual=True) -> dict[str, jax.Array]:
    """Of the mean squared logit over real tokens."""

    def loss(flat):
        vlm = params.build(model, flat)
        seen = vlm.visual(batch.images, dropout) if visual else None
        real = (batch.segments > 0)[..., None]
        squares = jnp.square(vlm.unembed(vlm.hidden(batch, seen, dropout)))
        return jnp.sum(jnp.where(real, squares, 0)) / real.sum()

    return jax.jit(jax.grad(loss))(flat)


@pytest.mark.parametrize("family", [None, *FAMILIES])
@pytest.mark.parametrize("prompt", [0, 5], ids=["causal", "prefix"])
def test_a_packed_row_gives_its_documents_logits_alone(prompt, family):
    made = model(**FAMILIES.get(family, {}))
    flat, (first, second) = weights(made), documents(prompt=prompt)
    size = len(first.tokens) + len(second.tokens) + 4
    packed = lay_out(made, [[first, second], [second, first]], size, slots=4)
    alone = lay_out(made, [[first], [second]], size, slots=4)
    together, apart = logits(made, flat, packed), logits(made, flat, alone)
    lengths = len(first.tokens), len(second.tokens)
    for row, order in enumerate(([0, 1], [1, 0])):
        start = 0
        for number in order:
            found = together[row, start : start + lengths[number]]
            wanted = apart[number, : lengths[number]]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
            start += lengths[number]


def test_every_token_sees_its_documents_past_and_its_own_block():
    first, second = documents(prompt=5)
    size = len(first.tokens) + len(second.tokens) + 2
    mask = np.asarray(attention_mask(lay_out(MODEL, [[first, second]], size, slots=4)))[0, 0]
    cut = len(first.tokens)
    for query in range(size - 2):
        start = 0 if query < cut else cut
        end = max(query + 1, start + 5) if query < start + 5 else query + 1
        np.testing.assert_array_equal(np.flatnonzero(mask[query]), np.arange(start, end))


def test_padding_and_empty_image_slots_have_no_influence():
    flat, both = weights(MODEL), documents()
    size = sum(len(d.tokens) for d in both)
    tight = logits(MODEL, flat, lay_out(MODEL, [both], size, slots=3))
    loose = lay_out(MODEL, [both], size + 5, slots=5, padding=VOCAB - 1, empty=9.0)
    np.testing.assert_allclose(logits(MODEL, flat, loose)[:, :size], tight, rtol=1e-5, atol=1e-5)


def test_empty_image_slots_get_no_gradient():
    batch = lay_out(MODEL, [documents()], 30, slots=5, empty=9.0)
    flat = weights(MODEL)

    def loss(patches):
        vlm = params.build(MODEL, flat)
        visual = vlm.visual(batch.images._replace(patches=patches))
        return jnp.square(vlm.unembed(vlm.hidden(batch, visual))).sum()

    slots = jax.jit(jax.grad(loss))(batch.images.patches).reshape(5, -1)
    assert (np.abs(slots[:3]).max(axis=1) > 0).all()
    np.testing.assert_array_equal(slots[3:], 0)


def test_the_image_matters_where_it_is_looked_at_and_only_from_there_on():
    flat, (first, _) = weights(MODEL), documents()
    other = first._replace(pixels=[first.pixels[0] + 1])
    batch = lay_out(MODEL, [[first], [other]], len(first.tokens), slots=1)
    one, two = logits(MODEL, flat, batch)
    np.testing.assert_array_equal(one[:2], two[:2])
    assert (np.abs(one[2:] - two[2:]).max(axis=-1) > 1e-3).all()


def test_text_alone_needs_no_encoder():
    rng = np.random.default_rng(0)
    batch = lay_out(MODEL, [[document(rng, (7,)), document(rng, (4,))]], 13, slots=2, empty=1.0)
    flat = weights(MODEL)
    seen, unseen = (logits(MODEL, flat, batch, visual=visual) for visual in (True, False))
    np.testing.assert_allclose(seen, unseen, rtol=1e-6, atol=1e-6)
    for path, gradient in gradients(MODEL, flat, batch).items():
        assert path.startswith("decoder/") == bool(np.any(gradient)), path


KINDS = {
    "patches, perceiver": MODEL,
    "convolutions, mlp": model("conv", {"kind": "mlp"}, tied=False),
    **{name: model(**fields) for name, fields in FAMILIES.items()},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_leaf_gets_the_same_finite_gradient_with_and_without_remat(name):
    model = KINDS[name]
    flat, key = weights(model), jax.random.key(1)
    batch = lay_out(model, [documents(model.visual_tokens)], 30, slots=3)
    dropped = change(model, dropout=0.2, drop_path=0.2)
    plain, remat = (
        gradients(change(dropped, remat=remat), flat, batch, key) for remat in (False, True)
    )
    # A softmax does not feel key biases: their gradients are rounding errors of 0. Others: changing
    # every weight by half a float32 rounding moves those of normed queries by 7e-5 of the largest.
    largest = max(np.abs(gradient).max() for gradient in plain.values())
    for path, gradient in plain.items():
        assert np.isfinite(gradient).all() and np.any(gradient), path
        atol = 1e-4 * np.abs(gradient).max() + 1e-6 * largest
        np.testing.assert_allclose(remat[path], gradient, rtol=1e-3, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_errs_a_few_times_what_rounding_the_weights_alone_does(name):
    model = KINDS[name]
    half = change(model, dtype="bfloat16", remat=True)
    flat = {path: 0.5 * leaf for path, leaf in weights(model).items()}
    batch = lay_out(model, [documents(model.visual_tokens)], 30, slots=3)
    exact, rough = logits(model, flat, batch), logits(half, flat, batch)
    assert rough.dtype == jnp.float32
    rounded = {path: leaf.astype(jnp.bfloat16).astype(leaf.dtype) for path, leaf in flat.items()}
    error = lambda found: np.sqrt(np.mean((exact - found) ** 2) / np.mean(exact**2))  # noqa: E731
    # 1.1 to 2.9 times over these models and four seeds: 0.4 to 0.9 % of the logits, 3.5 % where
    # heads of four numbers are normed. A part computed in fewer bits would be far above.
    assert error(rough) < 4 * error(logits(model, rounded, batch)) < 0.1
    if not model.decoder.tied:  # the logits were not rounded to bfloat16 on their way
        assert np.any(np.asarray(rough) != np.asarray(rough.astype(jnp.bfloat16), np.float32))


def test_gradients_of_a_frequent_token_add_up_in_float32():
    half = change(MODEL, dtype="bfloat16")
    flat = weights(MODEL)

    def loss(flat):
        x = params.build(half, flat).decoder.embed(jnp.full((1, 1001), 7))
        return x.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss))(flat)["decoder/embedding"]
    np.testing.assert_array_equal(gradient[7], 1001)  # bfloat16 has no 1001


def test_gradients_of_a_frequent_position_add_up_in_float32():
    # A document of one token sees nothing else: every row adds the same to its one position.
    made = change(model(**FAMILIES["learned positions"]), dtype="bfloat16")
    flat = weights(made)

    def gradient(rows):
        def loss(flat):
            x = jnp.ones((rows, 1, made.decoder.width), jnp.bfloat16)
            at = jnp.full((rows, 1), 3)
            hidden, _ = params.build(made, flat).decoder(x, at, jnp.ones((rows, 1, 1, 1), bool))
            return hidden.astype(jnp.float32).sum()

        return np.asarray(jax.jit(jax.grad(loss))(flat)["decoder/positions"], np.float64)

    one, many = gradient(1), gradient(1001)
    assert np.flatnonzero(one.any(axis=1)).tolist() == [5]  # OPT's offset is 2
    np.testing.assert_allclose(many[5], 1001 * one[5], rtol=1e-5)


def test_dropout_and_stochastic_depth_are_off_without_a_key():
    dropped = change(MODEL, dropout=0.5, drop_path=0.5)
    flat, batch = weights(MODEL), lay_out(MODEL, [documents()], 30, slots=3)
    kept = logits(MODEL, flat, batch)
    np.testing.assert_allclose(logits(dropped, flat, batch), kept, rtol=1e-6, atol=1e-6)
    one, same, other = (
        logits(dropped, flat, batch, dropout=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2 and np.abs(one - kept).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_expectation(rate, dtype):
    ones = jnp.ones((400, 500), dtype)
    dropped = drop(ones, rate, jax.random.key(0))
    assert dropped.dtype == ones.dtype
    values = np.asarray(dropped, np.float32)
    # Five standard errors, and what one value rounded to bfloat16 can be off.
    rounding = 2**-9 if dtype == "bfloat16" else 0.0
    error = 5 * np.sqrt(rate / (1 - rate) / values.size)
    assert abs(values.mean() - 1) < error + rounding
    assert abs((values == 0).mean() - rate) < error


def test_stochastic_depth_drops_whole_rows():
    dropped = np.asarray(drop(jnp.ones((1000, 3, 4)), 0.25, jax.random.key(0), per_row=True))
    rows = dropped.reshape(1000, -1)
    assert (rows == rows[:, :1]).all()
    assert abs((rows[:, 0] == 0).mean() - 0.25) < 0.06


def test_attention_maps_are_the_weights_on_patches():
    flat = weights(MODEL)
    batch = lay_out(MODEL, [documents()], 30, slots=3)
    maps = jax.jit(lambda flat: params.build(MODEL, flat).attention_maps(batch.images))(flat)
    assert maps.shape == (1, 3, QUERIES, MODEL.encoder.patches)
    assert (maps >= 0).all() and (maps.sum(axis=-1) < 1).all() and (maps.sum(axis=-1) > 0).all()


def test_gather_moves_squares_into_channels():
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype(np.float32)
    found = np.asarray(gather(jnp.asarray(x), 2))
    assert found.shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(found[1, 2, 1], x[1, 4:6, 2:4].ravel())


def test_sincos_positions_are_those_of_moco_v3():
    found = np.asarray(sincos2d((2, 3), 16))
    for row in range(2):
        for column in range(3):
            rates = [10_000 ** (-i / 3) for i in range(4)]
            wanted = [f(p * r) for p in (column, row) for f in (np.sin, np.cos) for r in rates]
            np.testing.assert_allclose(found[3 * row + column], wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4, not 10"):
        sincos2d((3, 3), 10)
