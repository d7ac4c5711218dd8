"""BLIP-2's first stage from pictures to scores, and what its one pass shares between two masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import blip2
from vlm_jax import config as c
from vlm_jax.data import pipeline
from vlm_jax.errors import ConfigError
from vlm_jax.evaluation.evaluator import Evaluator
from vlm_jax.models import matching, params
from vlm_jax.models.layers import Features
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.training import adaptation, checkpoints, memory, metrics, objectives
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

ENCODER = Encoder(16, 1, 24, 2, patch=16, image_size=32, dtype="float32", remat=False)
SMALL = {"queries": 4, "width": 24, "depth": 2, "mlp": 40, "heads": 3, "positions": 20}
VOCAB = 3073


def config(**train) -> c.Config:
    """The recipe, with a small model, for a few steps."""
    full = c.resolve(blip2.get_config("stage1"))
    connector = dataclasses.replace(full.model.connector, **SMALL, vocab=VOCAB, dtype="float32")
    heads = dataclasses.replace(full.model.text, length=16, out=12, start=VOCAB - 1)
    return dataclasses.replace(
        full,
        model=c.Model(ENCODER, connector, text=heads),
        data=dataclasses.replace(full.data, rows=8, tokens=16, threads=0, pool=4),
        train=dataclasses.replace(full.train, steps=6, lr=3e-3, warmup_steps=1, **train),
        adaptation=c.FULL,
        checkpoint=c.Checkpoint(),
        tracking=c.Tracking(tensorboard=False),
        parallel=c.Parallel(),
        eval=c.Eval(every=6, splits=("validation",), examples=6, final_examples=6, rows=8),
    )


@pytest.fixture(scope="module")
def vlm():
    model = config().model
    flat = jax.jit(lambda: params.init(model, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    flat = {path: leaf + 0.2 * rng.normal(size=leaf.shape) for path, leaf in flat.items()}
    return params.build(model, jax.tree.map(jnp.float32, flat))


def given(seed: int = 1):
    rng = np.random.default_rng(seed)
    seen = Features(jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32))
    there = np.arange(6) < np.array([[6], [4]])
    return seen, np.where(there, rng.integers(1, VOCAB, (2, 6)), 0), there


def test_images_and_texts_do_not_see_each_other(vlm):
    seen, tokens, there = given()
    read = vlm.text.read(vlm.connector, seen, tokens, there, generate=True)
    other, words, _ = given(2)
    images = vlm.text.images(vlm.connector, seen)
    np.testing.assert_allclose(read.images, images, rtol=1e-5, atol=1e-6)
    changed = vlm.text.read(vlm.connector, other, tokens, there)
    np.testing.assert_allclose(changed.texts, read.texts, rtol=1e-5, atol=1e-6)
    assert np.abs(changed.images - read.images).max() > 0.01
    changed = vlm.text.read(vlm.connector, seen, np.where(there, words, 0), there)
    np.testing.assert_allclose(changed.images, read.images, rtol=1e-5, atol=1e-6)
    assert np.abs(changed.texts - read.texts).max() > 0.01


def test_a_text_that_is_told_sees_the_image_and_its_past_alone(vlm):
    seen, tokens, there = given()
    told = vlm.text.read(vlm.connector, seen, tokens, there, generate=True).generated
    later = tokens.copy()
    later[:, 3] = 5
    later[:, 0] = 9  # replaced by the token that stands first
    changed = vlm.text.read(vlm.connector, seen, later, there, generate=True).generated
    np.testing.assert_allclose(changed[:, :3], told[:, :3], rtol=1e-5, atol=1e-6)
    assert (np.abs(changed - told)[:, 3].max(axis=-1) > 0.01).all()
    changed = vlm.text.read(vlm.connector, given(2)[0], tokens, there, generate=True).generated
    assert (np.abs(changed - told)[:, 0].max(axis=-1) > 0.01).all()


def test_who_sees_whom_is_figure_2_of_the_paper():
    mask = matching.allowed(2, 3, generate=True)
    rows = ["11000000"] * 2 + ["00111000"] * 3 + ["11000100", "11000110", "11000111"]
    np.testing.assert_array_equal(mask, [[x == "1" for x in row] for row in rows])


@pytest.mark.slow
def test_it_trains_is_scored_and_the_second_stage_starts_from_it(tmp_path):
    run = config()
    mesh, plan = meshes.make(run.parallel, jax.devices()[:1]), adaptation.of(run)
    step, state = steps.make_step(run, plan, mesh), states.create(run, plan, mesh)
    with pipeline.train_stream(run) as stream, checkpoints.Checkpoints(tmp_path, run) as saved:
        batch, info = next(stream)
        lines = []
        for number in range(run.train.steps):
            state, sums = step(state, steps.place(batch, mesh))
            lines.append(metrics.row(number + 1, jax.device_get(sums), info))
        saved.save(run.train.steps, state, stream)
    for name in ("loss", "matching_loss", "told_loss", "objective"):
        assert lines[-1][name] < lines[0][name], name
    assert 0 <= lines[-1]["matching_accuracy"] <= 1 and state.guard.skipped == 0
    with jax.set_mesh(mesh):
        evaluate = Evaluator(run, tmp_path)
        assert np.isfinite(list(evaluate(6, state.evaluated()).values())).all()
        scores = evaluate.final(state.evaluated())
    found = {s.metric for s in scores.rows if s.system == "model"}
    assert found == {"exact", "cider", "loss", "gap"}

    connector = dataclasses.replace(run.model.connector, vocab=0)
    model = c.Model(ENCODER, connector, decoder("1m", vocab=3072))
    init = c.Init(str(tmp_path), "encoder"), c.Init(str(tmp_path), "connector")
    second = c.Config("second", model, c.Data({"emoji:caption": 1.0}), init=init)
    trainable = states.create(second, adaptation.of(second), mesh).trainable
    learned = state.evaluated()
    paths = [path for path in trainable if path.startswith(("encoder/", "connector/"))]
    drawn = {path for path in paths if path not in learned}
    assert drawn == {"connector/project/kernel", "connector/project/bias"}
    for path in set(paths) - drawn:
        np.testing.assert_array_equal(trainable[path], learned[path])


def test_the_estimate_counts_its_passes_and_logits():
    run = config()
    mesh = meshes.make(run.parallel, jax.devices()[:2])
    plan = adaptation.of(run)
    towers = [t for t in memory._towers(run, 8, 1) if t.name == "connector"]
    assert [(t.sequences, t.length) for t in towers] == [(8, 4 + 32), (24, 4 + 16)]
    needed = memory.needed(run, plan, mesh, states.abstract(run, plan, mesh))
    assert needed["activations"] > 2 * 4 * 16 * VOCAB * 4


@pytest.mark.slow
def test_a_rejected_pair_changes_nothing():
    run = config()
    flat = jax.jit(lambda: params.init(run.model, jax.random.key(0)))()
    with pipeline.train_stream(run) as stream:
        batch, _ = next(stream)
    batch.loss_weights[3] = 0  # as of a picture that could not be read
    losses = jax.jit(
        lambda flat, batch: objectives.losses(params.build(run.model, flat), batch, run)
    )
    mesh = meshes.make(c.Parallel(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        loss, sums = losses(flat, batch)
        batch.images.patches[3] = 7.0
        batch.tokens[3, 1:4] = 11
        again, _ = losses(flat, batch)
    assert sums["weight"] == 7 and sums["matching_pairs"] == 21
    np.testing.assert_allclose(again, loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("train", {"accumulate": 2}, "accumulate is 2; expected 1 of pairs"),
        ("train", {"pairs": "sigmoid"}, "pairs is 'sigmoid'; expected softmax of a Q-Former"),
        ("train", {"z_loss": 0.1}, "z_loss is 0.1; expected 0 of pairs"),
        ("data", {"tokens": 12}, "data.tokens is 12; expected the text tower's 16"),
        ("model", {"connector": None}, "expected a Q-Former with a vocabulary"),
        ("model", {"decoder": decoder("1m")}, "expected None beside heads of the first stage"),
    ],
)
def test_what_it_has_no_use_for_is_refused(part, changes, message):
    run = config()
    changed = dataclasses.replace(getattr(run, part), **changes)
    with pytest.raises(ConfigError, match=message):
        c.check(dataclasses.replace(run, **{part: changed}))
