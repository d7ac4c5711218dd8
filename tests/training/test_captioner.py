"""Captioners: contrastive beside telling (CoCa), and telling all at once (CapPa)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.config import Parallel, check
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.models.layers import Features
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.presets.text import TextTower
from vlm_jax.training import masking, memory, objectives
from vlm_jax.training import step as steps

TEXT = TextTower(
    tiny.VOCAB,
    tiny.TEXT,
    width=16,
    depth=1,
    mlp=24,
    heads=2,
    out=12,
    image_pool="map",
    project_images=True,
    logit_bias=True,
    dtype="float32",
)
LOOKS = CrossAttention(0, 2, 2, 8, every=1, start=1, gate="none", both=True)
DECODER = dataclasses.replace(tiny.MODEL.decoder, masked=True, dropout=0.0)
COCA = dataclasses.replace(tiny.MODEL, decoder=DECODER, fusion=LOOKS, text=TEXT)
WEIGHT = 0.5


@pytest.fixture(scope="module")
def flat():
    return jax.jit(lambda: params.init(COCA, jax.random.key(0)))()


def losses(config, flat, batch, key=None, devices=1):
    mesh = meshes.make(Parallel(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda flat, batch: objectives.losses(
                params.build(config.model, flat), batch, config, key
            )
        )
        return jax.tree.map(np.asarray, run(flat, batch))


@pytest.mark.parametrize(
    ("kind", "devices"), [("softmax", 4), pytest.param("sigmoid", 1, marks=pytest.mark.slow)]
)
def test_the_contrastive_loss_stands_beside_the_captions(flat, kind, devices):
    batch = tiny.batch(0)
    batch.image_texts[2, 1] = 0  # has no text
    config = tiny.config(COCA, pairs=kind, pairs_weight=WEIGHT)
    check(config)
    loss, sums = losses(config, flat, batch, devices=devices)
    alone, _ = losses(tiny.config(COCA), flat, batch)

    vlm = params.build(COCA, flat)
    texts = batch.image_texts.reshape(-1, tiny.TEXT)
    there = (texts > 0).any(1) & (batch.images.grids[..., 0] > 0).reshape(-1)
    features = vlm.encoder(batch.images)
    pooled = vlm.text.images(Features(features.x[there]))
    logits = vlm.text.similarity(pooled, vlm.text(texts[there], np.ones(texts[there].shape, bool)))
    whole = {"sigmoid": objectives.sigmoid_pairs, "softmax": objectives.softmax_pairs}[kind]
    np.testing.assert_allclose(loss, alone + WEIGHT * whole(logits), rtol=1e-5)
    assert sums["pairs_images"] == there.sum() == 13
    np.testing.assert_allclose(sums["pairs_nll"] / 13, whole(logits), rtol=1e-5)
    nearest = logits.argmax(1) == np.arange(13)
    assert sums["pairs_correct"] == nearest.sum()


def test_masked_documents_tell_nothing_of_themselves(flat):
    """Whatever the learned tokens are, the logits of a document told at once are the same."""
    batch = tiny.batch(0)
    vlm = params.build(COCA, flat)
    visual = vlm.visual(batch.images)
    chosen = batch.segments == 1

    def logits(batch):
        read = masking.masked(batch, jnp.asarray(chosen), DECODER.tokens)
        return np.asarray(vlm.unembed(vlm.hidden(read, visual)))

    other = np.random.default_rng(7).integers(1, tiny.VOCAB, batch.tokens.shape)
    changed = batch._replace(tokens=np.where(batch.loss_weights > 0, other, batch.tokens))
    changed = changed._replace(tokens=changed.tokens.astype(np.int32))
    found, again = logits(batch), logits(changed)
    np.testing.assert_allclose(again[chosen], found[chosen], rtol=1e-5, atol=1e-6)
    second = batch.segments == 2
    assert np.abs(again[second] - found[second]).max() > 0.01
    plain = np.asarray(vlm.unembed(vlm.hidden(batch, visual)))
    np.testing.assert_allclose(found[second], plain[second], rtol=1e-5, atol=1e-6)


def test_documents_are_drawn_by_their_share_and_whole():
    batch = jax.tree.map(lambda x: np.repeat(x, 100, axis=0), tiny.batch(0))
    masked = masking.drawn(batch, 0.75, tiny.VOCAB, jax.random.key(2))
    chosen = np.asarray(masked.blocks) > 0
    shares = []
    for number in (1, 2):
        inside = batch.segments == number
        of_row = np.where(inside, chosen, False).sum(1)
        assert np.isin(of_row, (0, 1) * inside.sum(1)[:, None]).all()
        shares.append((of_row > 0).mean())
    # Four standard deviations of 800 draws.
    np.testing.assert_allclose(shares, 0.75, atol=4 * np.sqrt(0.75 * 0.25 / 800))
    assert not chosen[batch.segments == 0].any()
    told = np.asarray(masked.tokens) == tiny.VOCAB
    np.testing.assert_array_equal(told, chosen & (batch.loss_weights > 0))


def test_it_is_for_training_alone(flat):
    batch = tiny.batch(0)
    one = tiny.config(COCA, parallel=1.0)
    plain = losses(tiny.config(COCA), flat, batch)[0]
    np.testing.assert_array_equal(losses(one, flat, batch)[0], plain)
    assert abs(losses(one, flat, batch, jax.random.key(1))[0] - plain) > 1e-3


@pytest.mark.slow
def test_steps_train_every_part():
    config = tiny.config(COCA, pairs="sigmoid", pairs_weight=WEIGHT, parallel=0.5, steps=8)
    mesh, _, step, create = tiny.prepared(config, 2)
    state, first = create(), None
    before = jax.tree.map(np.asarray, state.trainable)
    batch = steps.place(tiny.batch(0), mesh)
    for _ in range(8):
        state, sums = step(state, batch)
        first = float(sums["loss"]) if first is None else first
    assert float(sums["loss"]) < first
    for path, leaf in state.trainable.items():
        assert np.any(np.asarray(leaf) != before[path]), path
    names = {t.name for t in memory._towers(config, 4, 1)}
    assert names == {"encoder", "text", "connector", "decoder/cross", "decoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs_weight": 0.0}, "pairs_weight is 0.0; expected more than 0, or no model.text"),
        ({"accumulate": 2}, "accumulate is 2; expected 1 beside train.pairs_weight"),
        ({"parallel": 1.5}, "parallel is 1.5; expected a share from 0 to 1"),
        ({"model": dataclasses.replace(COCA, text=None)}, "expected 0 without model.text"),
        (
            {"model": dataclasses.replace(COCA, decoder=tiny.MODEL.decoder), "parallel": 0.5},
            "decoder.masked is False; expected True",
        ),
        (
            {"model": dataclasses.replace(COCA, text=dataclasses.replace(TEXT, image_pool="none"))},
            "image_pool is 'none'; expected an encoder that pools",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    fields = {"model": COCA, "pairs_weight": WEIGHT} | changes
    with pytest.raises(ConfigError, match=message):
        check(tiny.config(**fields))
