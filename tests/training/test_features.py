"""Features of frozen encoders: known by the pixels they were made of, read by a step."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from vlm_jax import config as configs
from vlm_jax.config import Augment, Rule, Tracking
from vlm_jax.data import pipeline
from vlm_jax.data.packing import Info
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.training import adaptation, features, loop
from vlm_jax.training import step as steps

FROZEN = (Rule(r"encoder/.*", mode="frozen"), *configs.FULL)
CONFIG = tiny.config(
    feature_cache=1.0,
    steps=6,
    adaptation=FROZEN,
    tracking=Tracking(tensorboard=False),
)
IMAGES = 2 * (tiny.ROWS - 1)


class Twice(tiny.Stream):
    """A stream whose every batch comes two times."""

    def __next__(self):
        self.next += 1
        made, info = tiny.batch((self.next + 1) // 2), Info((), {})
        return made, info


@pytest.fixture(scope="module")
def made():
    return tiny.prepared(CONFIG, len(jax.devices()))


@pytest.fixture
def calls(monkeypatch):
    """How many slots went to the encoder at each call, as a list that grows."""
    found, place = [], steps.place

    def spy(every, mesh):
        found.append(len(every[0].grids))
        return place(every, mesh)

    monkeypatch.setattr(steps, "place", spy)
    return found


def test_features_are_those_of_the_encoder_whatever_was_remembered(made, calls):
    cache = features.Cache(CONFIG, made.mesh)
    flat = made.create().frozen
    build = jax.jit(lambda flat, images: params.build(CONFIG.model, flat).features(images))
    whole = jax.device_get(made.create().trainable) | jax.device_get(flat)
    mixed = tiny.batch(1)
    mixed.images.patches[::2] = tiny.batch(2).images.patches[::2]  # some are new, some are not
    for batch, expected in ((tiny.batch(1), 1), (tiny.batch(1), 1), (mixed, 2), (tiny.batch(2), 3)):
        seen = cache(batch, flat).images
        assert len(calls) == expected and seen.patches is None and seen.pixels is None
        (right,) = build(whole, (batch.images,))
        there = batch.images.grids.any(axis=-1)
        np.testing.assert_array_equal(seen.features[~there], 0)
        right = np.asarray(right.x).reshape(seen.features.shape)
        np.testing.assert_allclose(seen.features[there], right[there], atol=5e-6)


def test_a_full_memory_costs_time_and_nothing_else(made, calls):
    cache = features.Cache(CONFIG, made.mesh)
    flat = made.create().frozen
    first = cache(tiny.batch(1), flat)
    cache._left = 0
    for _ in range(2):
        cache(tiny.batch(2), flat)
    again = cache(tiny.batch(1), flat)
    assert len(calls) == 3 and len(cache._known) == IMAGES
    np.testing.assert_array_equal(first.images.features, again.images.features)


@pytest.mark.slow
def test_a_run_with_remembered_features_is_the_run_without(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "train_stream", lambda config: Twice())
    without = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, feature_cache=0.0)
    )
    ended = [
        loop.train(config, tmp_path / str(i), lambda *_: {}).trainable
        for i, config in enumerate((CONFIG, without))
    ]
    # Equal but for the rounding of an encoder compiled on its own, six steps of Adam long.
    for path, leaf in ended[0].items():
        np.testing.assert_allclose(leaf, ended[1][path], atol=2e-5, err_msg=path)


def test_a_batch_without_images_is_of_the_same_structure(made):
    cache = features.Cache(CONFIG, made.mesh)
    batch = tiny.batch(1)
    empty = batch._replace(images=batch.images._replace(grids=np.zeros_like(batch.images.grids)))
    flat = made.create().frozen
    seen, other = cache(empty, flat), cache(batch, flat)
    assert jax.tree.structure(seen) == jax.tree.structure(other)
    assert not seen.images.features.any()
    state, _ = made.step(made.create(), steps.place(seen, made.mesh))
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"augment": Augment(flip=0.5)}}, "config.data.augment is .*do not come again"),
        ({"feature_cache": -1.0}, "config.train.feature_cache is -1.0; expected at least 0"),
    ],
)
def test_what_contradicts_it_is_refused(changes, message):
    config = tiny.config(**{"feature_cache": 1.0, "adaptation": FROZEN} | changes)
    with pytest.raises(ConfigError, match=message):
        configs.check(config)


def test_an_encoder_that_trains_is_refused():
    config = tiny.config(feature_cache=1.0)
    with pytest.raises(ConfigError, match=r"feature_cache is 1.0 and encoder/\S+ trains"):
        features.check(config, adaptation.of(config))
