"""Gradients in micro-batches against those of the whole batch."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.config import Parallel, check
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.training import accumulation, objectives
from vlm_jax.training import step as steps

DECODER = dataclasses.replace(tiny.MODEL.decoder, dropout=0.0)
MODEL = dataclasses.replace(tiny.MODEL, decoder=DECODER)
FIELDS = {"bag_of_words": 0.5, "label_smoothing": 0.1, "z_loss": 0.01}


def uneven():
    """Packed rows whose weights differ much: some have none, some a fraction, one three times."""
    batch = tiny.batch(3)
    scale = np.array([0.0, 1.0, 3.0, 0.1, 0.0, 1.0, 0.5, 1.0], np.float32)
    texts = batch.image_texts * (np.arange(tiny.ROWS) % 3 > 0)[:, None, None]
    return batch._replace(
        loss_weights=batch.loss_weights * scale[:, None], image_texts=texts.astype(np.int32)
    )


def found(config, devices=1):
    """Loss, sums and gradient of the uneven batch, compiled on a mesh of that many devices."""
    mesh, _, _, create = tiny.prepared(config, devices)
    state = create()
    whole = None
    if config.train.accumulate > 1:
        whole = objectives.totals(uneven())

    def objective(trainable, rows, key):
        vlm = params.build(config.model, {**state.frozen, **trainable})
        return objectives.losses(vlm, rows, config, key, whole)

    def run(trainable, batch):
        return accumulation.gradient(
            objective, trainable, batch, jax.random.key(0), config.train.accumulate
        )

    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, jax.jit(run)(state.trainable, steps.place(uneven(), mesh)))


@pytest.fixture(scope="module")
def at_once():
    return found(tiny.config(MODEL, **FIELDS))


@pytest.mark.parametrize(
    ("count", "parallel", "devices"),
    [
        (4, Parallel(1, 1, 1), 1),
        (2, Parallel(data=2, fsdp=2), 4),
        pytest.param(8, Parallel(1, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param(4, Parallel(1, 2, 2), 4, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(at_once, count, parallel, devices):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} simulated devices")
    config = tiny.config(MODEL, accumulate=count, parallel=parallel, **FIELDS)
    (loss, sums), gradient = found(config, devices)
    (wanted_loss, wanted_sums), wanted = at_once
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert sums.keys() == wanted_sums.keys()
    for name, value in wanted_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    largest = max(np.linalg.norm(leaf) for leaf in wanted.values())
    for path, leaf in wanted.items():  # the true gradient of key biases and the like is zero
        off = np.linalg.norm(gradient[path] - leaf)
        assert off <= 1e-5 * np.linalg.norm(leaf) + 1e-7 * largest, path


def test_a_mean_of_means_would_be_another_gradient(at_once):
    batch, config = uneven(), tiny.config(MODEL, **FIELDS)
    vlm = params.build(config.model, tiny.prepared(config)[3]().trainable)
    part = jax.jit(lambda rows: objectives.losses(vlm, rows, config)[0])
    parts = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
    mean = np.mean([part(rows) for rows in parts])
    assert abs(mean - at_once[0][0]) > 0.01


def test_rows_are_dealt_out_so_that_none_leaves_its_device():
    dealt = accumulation.split(uneven(), 2).tokens
    np.testing.assert_array_equal(dealt[0], uneven().tokens[0::2])
    np.testing.assert_array_equal(dealt[1], uneven().tokens[1::2])


def test_a_whole_step_accumulates_with_its_own_dropout_per_micro_batch():
    config = tiny.config(accumulate=2)
    mesh, _, step, create = tiny.prepared(config)
    state, metrics = step(create(), steps.place(tiny.batch(0), mesh))
    assert int(metrics["positions"]) == tiny.ROWS * tiny.TOKENS and int(state.step) == 1
    assert np.isfinite(float(metrics["loss"]))


WRONG = [
    ({"accumulate": 3}, r"train\.accumulate is 3; expected a divisor of data\.rows, 8"),
    ({"accumulate": 0}, r"train\.accumulate is 0"),
    ({"accumulate": 2, "contrastive": 0.5}, r"1 beside train\.contrastive, which compares"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_cannot_be_split_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(tiny.config(**fields))


def test_micro_batches_that_do_not_divide_over_the_mesh_are_refused():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    with pytest.raises(ConfigError, match=r"multiple of the 8 devices.*times the 2 of config"):
        tiny.prepared(tiny.config(accumulate=2, parallel=Parallel(1, 8, 1)), 8)
