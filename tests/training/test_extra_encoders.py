"""A small Cambrian through the whole program: two encoders of other sizes, samplers between layers.

Trained on the embedded captions, evaluated, and asked; in a mesh as on one device.
"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.config import Config, Data, Eval, Model, Parallel, Rule, Train
from vlm_jax.data import heldout, pipeline
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.evaluation import losses
from vlm_jax.evaluation.evaluator import without_images
from vlm_jax.evaluation.predictor import Predictor
from vlm_jax.evaluation.vision import Vision
from vlm_jax.models import params, sampling
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.convnets import ConvNet, convnext_stages
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.sva import Samplers, Sva
from vlm_jax.training import adaptation, memory
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

PLAIN = {"dtype": "float32"}
MODEL = Model(
    Encoder(16, 1, 32, 2, patch=16, image_size=64, **PLAIN),
    Sva(sides=(2, 4), side=2, width=16, layers=1, heads=2, **PLAIN),
    Decoder(tokenizers.load("embedded").size, 16, 2, 32, 2, 1, 8, tied=True, **PLAIN),
    (ConvNet(convnext_stages((1,), (8,)), 8, stem_stride=8, image_size=32, **PLAIN),),
    samplers=Samplers(start=0, stride=1, count=2),
)


def config(parallel: Parallel | None = None, model: Model = MODEL) -> Config:
    return Config(
        name="two",
        model=model,
        data=Data({"emoji:caption": 1.0}, rows=4, tokens=96, images_per_row=3, threads=0),
        train=Train(steps=8, warmup_steps=1, lr=1e-2),
        eval=Eval(rows=4, max_new_tokens=3),
        parallel=parallel or Parallel(),
    )


def trained(config: Config, devices: int = 1, count: int = 8):
    """Losses of some steps on the first batch of the stream, and the last state."""
    mesh, _, step, create = tiny.prepared(config, devices)
    batch = steps.place(next(pipeline.train_stream(config))[0], mesh)
    state, found = create(), []
    for _ in range(count):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found, state


@pytest.fixture(scope="module")
def run():
    return trained(config())


@pytest.fixture(scope="module")
def seeing(run):
    """The trained model, which answers."""
    return Predictor(config(), run[1].evaluated())


def test_losses_fall(run):
    found, _ = run
    assert found[-1] < found[0] - 0.5


def test_held_out_losses_and_answers_are_those_of_full_passes_over_all_encoders(seeing):
    @jax.jit
    def uncached(flat, batch):
        vlm = params.build(MODEL, flat)
        visual = vlm.visual((batch.images, *batch.extra_images))
        return sampling.greedy_uncached(vlm, batch, visual, 3, seeing._end)

    @jax.jit
    def nats(flat, batch):
        visual = params.build(MODEL, flat).visual((batch.images, *batch.extra_images))
        return losses.token_nats(MODEL, flat, batch, visual).sum()

    examples = heldout.eval_examples(seeing.config, "validation", "caption", 4)
    prompts = [heldout.prompt_of(example) for example in examples]
    (batch,) = heldout.prompt_batches(seeing.config, prompts)
    wanted = [
        seeing._text(row, [seeing._end]) for row in np.asarray(uncached(seeing.params, batch))
    ]
    assert seeing.answer(examples) == wanted

    batches = list(heldout.eval_batches(seeing.config, "validation", "caption", 4))
    wanted = float(nats(seeing.params, batches[0][0]))
    found = losses.per_example(seeing.vision, batches)
    assert sum(loss.nats for loss in found.values()) == pytest.approx(wanted, rel=1e-5)


def test_a_picture_that_only_the_second_encoder_tells_apart_is_seen_anew(seeing):
    ((batch, _),) = heldout.eval_batches(seeing.config, "validation", "caption", 4)
    (extra,) = batch.extra_images
    changed = batch._replace(extra_images=(extra._replace(pixels=-extra.pixels),))
    one, other = (seeing.vision(each) for each in (batch, changed))
    assert np.abs(one.tokens - other.tokens)[:, 0].max() > 1e-3
    assert not one.tokens[:, 1:].any()  # slots without a picture
    np.testing.assert_array_equal(one.windows.features[0], other.windows.features[0])
    assert np.abs(one.windows.features[1] - other.windows.features[1]).max() > 1e-3


@pytest.mark.slow
def test_the_model_of_text_alone_trains_and_answers():
    blind = without_images(config())
    found, state = trained(blind, count=3)
    assert found[-1] < found[0]
    predictor = Predictor(blind, state.evaluated())
    examples = heldout.eval_examples(blind, "validation", "caption", 2)
    assert len(predictor.answer(examples)) == 2
    measured = losses.per_example(
        Vision(blind, state.evaluated()), heldout.eval_batches(blind, "validation", "caption", 2)
    )
    assert np.isfinite(losses.total(measured))


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(run):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 simulated devices")
    found, _ = trained(config(Parallel(1, 2, 2)), devices=4, count=3)
    np.testing.assert_allclose(found, run[0][:3], rtol=1e-5)


def test_all_encoders_and_the_samplers_count_in_the_estimate_of_memory():
    def activations(model: Model, *frozen: str) -> int:
        rules = tuple(Rule(pattern, mode="frozen") for pattern in frozen)
        planned = config(model=model)
        planned = dataclasses.replace(planned, adaptation=(*rules, *planned.adaptation))
        mesh = meshes.make(planned.parallel, jax.devices()[:1])
        plan = adaptation.plan(params.abstract(model), planned.adaptation)
        return memory.needed(planned, plan, mesh, states.abstract(planned, plan, mesh))[
            "activations"
        ]

    deep = dataclasses.replace(MODEL.extra_encoders[0], stages=convnext_stages((5,), (8,)))
    deeper = dataclasses.replace(MODEL, extra_encoders=(deep,))
    assert activations(deeper) > activations(MODEL)
    assert activations(MODEL) > activations(dataclasses.replace(MODEL, samplers=None))
    # A frozen encoder is not held because another one trains beside it.
    held = activations(deeper) - activations(MODEL)
    alone = activations(deeper, "extra_encoders/.*") - activations(MODEL, "extra_encoders/.*")
    assert alone < held
