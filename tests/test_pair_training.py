"""A model of pairs from pictures to scores: its batches, its loss, what it answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import siglip
from vlm_jax import config as c
from vlm_jax import schema
from vlm_jax.data import heldout, pipeline
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.errors import ConfigError
from vlm_jax.evaluation import questions
from vlm_jax.evaluation.evaluator import Evaluator
from vlm_jax.evaluation.retrieval import Retriever
from vlm_jax.models import params
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.training import adaptation, checkpoints, features, objectives
from vlm_jax.training import state as states
from vlm_jax.training import step as steps_of


def config(**train) -> c.Config:
    tree = siglip.get_config("ti")
    tree.data.update(rows=8, threads=0, pool=4, augment=schema.plain(c.Augment()))
    tree.train.update(steps=4, warmup_steps=1, **train)
    tree.eval.update(rows=8, examples=6, final_examples=6, splits=("validation",))
    resolved = c.resolve(tree)
    tower = Encoder(16, 1, 24, 2, patch=16, image_size=32, pool="map", dtype="float32")
    text = dataclasses.replace(resolved.model.text, width=24, depth=1, mlp=40, heads=3, out=20)
    return dataclasses.replace(resolved, model=c.Model(encoder=tower, text=text))


@pytest.fixture(scope="module")
def leaves():
    flat = jax.jit(lambda key: params.init(config().model, key))(jax.random.key(0))
    # Published towers start where all pairs look alike.
    return {**flat, "text/logit_bias": jnp.asarray(-2.0)}


def test_a_row_is_a_caption_and_its_picture():
    tokenizer = tokenizers.load("embedded")
    with pipeline.train_stream(config()) as stream:
        batch, info = next(stream)
    assert batch.tokens.shape == (8, 16) and batch.images.grids[..., 0].all()
    assert [len(row) for row in info.documents] == [1] * 8
    for row, segments in zip(batch.tokens, batch.segments, strict=True):
        ids = row[segments > 0]
        assert ids[-1] == tokenizer.eos and (row[segments == 0] == tokenizer.pad).all()
        assert tokenizer.image not in ids


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_loss_is_that_of_all_similarities_without_what_was_rejected(kind, leaves):
    run = config(pairs=kind)
    with pipeline.train_stream(run) as stream:
        batch, _ = next(stream)
    batch.loss_weights[3] = 0  # as of a picture that could not be read
    kept = np.array([i for i in range(8) if i != 3])
    vlm = params.build(run.model, leaves)
    whole = vlm.similarity(batch.images, batch.tokens, jnp.ones(batch.tokens.shape, bool))
    whole = np.asarray(whole)[kept][:, kept]
    mesh = meshes.make(c.Parallel(data=2, fsdp=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        loss, sums = jax.jit(
            lambda flat, batch: objectives.losses(params.build(run.model, flat), batch, run)
        )(leaves, batch)
    reference = {"sigmoid": objectives.sigmoid_pairs, "softmax": objectives.softmax_pairs}[kind]
    np.testing.assert_allclose(loss, reference(whole), rtol=1e-5)
    assert sums["weight"] == 7 and sums["images"] == 8
    assert sums["correct"] == (whole.argmax(axis=1) == np.arange(7)).sum()


def test_it_answers_with_the_nearest_name_and_its_loss_is_over_all_names(leaves):
    run = config()
    examples = heldout.eval_examples(run, "validation", "caption", 11)
    vlm = params.build(run.model, leaves)
    names = sorted({questions.reference(e) for e in examples})
    batches = list(heldout.batches(run, examples))
    assert {b.tokens.shape for b, _ in batches} == {(8, 16)}
    images, texts = (
        np.concatenate(x)[:11]
        for x in zip(
            *(
                vlm.embeddings(b.images, b.tokens, np.ones(b.tokens.shape, bool))
                for b, _ in batches
            ),
            strict=True,
        )
    )
    of = {questions.reference(e): texts[i] for i, e in enumerate(examples)}
    scale, bias = vlm.text.scale_and_bias()
    logits = scale * images @ np.stack([of[name] for name in names]).T + bias
    model = Retriever(run, leaves)
    assert model.answer(examples) == [names[i] for i in logits.argmax(axis=1)]
    found, log_probs = model.losses(examples), jax.nn.log_softmax(logits)
    for i, example in enumerate(examples):
        right = names.index(questions.reference(example))
        np.testing.assert_allclose(found[example.key].nats, -log_probs[i, right], rtol=1e-4)


def test_a_step_trains_and_all_scores_are_made(tmp_path):
    run = config()
    mesh = meshes.make(run.parallel, jax.devices()[:1])
    plan = adaptation.plan(params.abstract(run.model), run.adaptation)
    step, state = steps_of.make_step(run, plan, mesh), states.create(run, plan, mesh)
    with pipeline.train_stream(run) as stream:
        batch, _ = next(stream)
    first = None
    for _ in range(4):
        state, sums = step(state, steps_of.place(batch, mesh))
        first = float(sums["loss"]) if first is None else first
    assert float(sums["loss"]) < first
    _starts_an_encoder(run, state, tmp_path / "run", mesh)
    with jax.set_mesh(mesh):
        evaluate = Evaluator(run, tmp_path)
        assert np.isfinite(list(evaluate(4, state.evaluated()).values())).all()
        scores = evaluate.final(state.evaluated())
    assert {s.metric for s in scores.rows if s.system == "model"} == {
        "exact",
        "cider",
        "loss",
        "gap",
    }


def _starts_an_encoder(run, state, workdir, mesh):
    """A model that writes starts from the encoder, without the head that pools it."""
    with pipeline.train_stream(run) as stream, checkpoints.Checkpoints(workdir, run) as saved:
        saved.save(4, state, stream)
    tower = dataclasses.replace(run.model.encoder, pool="none")
    model = c.Model(tower, Connector(), decoder("1m", vocab=3072))
    started = c.Config(
        "started", model, c.Data({"emoji:caption": 1.0}), init=(c.Init(str(workdir), "encoder"),)
    )
    plan = adaptation.plan(params.abstract(model), started.adaptation)
    trainable = states.create(started, plan, mesh).trainable
    learned = state.evaluated()
    paths = [path for path in trainable if path.startswith("encoder/")]
    assert paths
    for path in paths:
        np.testing.assert_array_equal(trainable[path], learned[path])


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("data", {"images_per_row": 2}, "images_per_row is 2; expected 1 of a pair"),
        ("data", {"tokens": 32}, "data.tokens is 32; expected the text tower's 16"),
        ("train", {"bag_of_words": 0.5}, "bag_of_words is 0.5; expected 0 of pairs"),
        ("train", {"pairs": "triplet"}, "one of sigmoid, softmax"),
        ("eval", {"text_only_steps": 5}, "0 of pairs"),
    ],
)
def test_what_pairs_have_no_use_for_is_refused(part, changes, message):
    run = config()
    changed = dataclasses.replace(getattr(run, part), **changes)
    with pytest.raises(ConfigError, match=message):
        c.check(dataclasses.replace(run, **{part: changed}))


def test_a_frozen_encoder_may_have_seen_the_pictures_before(leaves):
    run = dataclasses.replace(
        config(feature_cache=0.1),
        adaptation=(c.Rule(r"encoder/.*", "frozen"), *c.FULL),  # as in LiT (Zhai et al. 2022)
        parallel=c.Parallel(data=1),
    )
    features.check(run, adaptation.of(run))
    with pipeline.train_stream(run) as stream:
        batch, _ = next(stream)
    mesh = meshes.make(c.Parallel(), jax.devices()[:1])
    seen = features.Cache(run, mesh)(batch, leaves)
    assert seen.images.patches is None and seen.images.features.shape == (8, 1, 1, 16)
    vlm = params.build(run.model, leaves)
    with jax.set_mesh(mesh):
        losses = [objectives.losses(vlm, each, run)[0] for each in (batch, seen)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
