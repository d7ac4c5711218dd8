"""Convolutional and windowed encoders in the training step."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.config import Parallel
from vlm_jax.models import params
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.convnets import ConvNet, convnext_stages
from vlm_jax.presets.sam import Sam
from vlm_jax.training import adaptation, memory
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

SIDE = tiny.SIDE
FIELDS = {"image_size": SIDE, "dtype": "float32"}
ENCODERS = {
    "convnext": ConvNet(convnext_stages((1, 1), (8, 16)), 8, stem_stride=2, **FIELDS),
    "efficientnet": ConvNet(
        ((2, 8, 3, 1, 1), (1, 16, 3, 2, 2)),
        8,
        stem_stride=2,
        layer_scale=0.0,
        activation="relu6",
        kind="efficientnet",
        **FIELDS,
    ),
    "sam": Sam(16, 2, 32, 2, (1,), window=2, patch=2, out=8, **FIELDS),
}


def config(name: str, **fields):
    """The tiny config with another encoder."""
    return tiny.config(dataclasses.replace(tiny.MODEL, encoder=ENCODERS[name]), **fields)


def batch(seed: int):
    """The tiny batch with whole pixels."""
    made = tiny.batch(seed)
    shape = (*made.images.grids.shape[:2], SIDE, SIDE, 3)
    pixels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return made._replace(images=made.images._replace(pixels=pixels, patches=None))


def run(config, devices: int = 1):
    """Losses of two steps, and the states before and after."""
    mesh, _, step, create = tiny.prepared(config, devices)
    state, losses = create(), []
    for seed in range(2):
        state, metrics = step(state, steps.place(batch(seed), mesh))
        losses.append(float(metrics["loss"]))
    return losses, create(), state


def test_training_moves_all_of_an_efficientnet_but_its_statistics():
    _, before, after = run(config("efficientnet", weight_decay=0.5, warmup_steps=1))
    encoder = [path for path in before.trainable if path.startswith("encoder/")]
    assert len(encoder) > 20
    for path in encoder:
        same = np.array_equal(before.trainable[path], after.trainable[path])
        assert same == path.endswith(("/mean", "/variance")), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_losses_do_not_depend_on_the_mesh(name):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    wanted = run(config(name))[0]
    found = run(config(name, parallel=Parallel(2, 2, 2)), devices=8)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_activations_grow_with_the_blocks_of_the_encoder(name):
    def activations(model) -> int:
        run = tiny.config(model)
        mesh = meshes.make(run.parallel, jax.devices()[:1])
        plan = adaptation.plan(params.abstract(model), run.adaptation)
        return memory.needed(run, plan, mesh, states.abstract(run, plan, mesh))["activations"]

    model = config(name).model
    larger = dataclasses.replace(model.encoder, image_size=4 * SIDE)
    assert activations(dataclasses.replace(model, encoder=larger)) > activations(model) > 0
