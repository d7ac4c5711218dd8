"""Pictures of differing sizes that share a row's patches, through packer, model and loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_packing_exact import MODEL, config, examples

from vlm_jax import config as configs
from vlm_jax.data import documents, packing
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.models import params
from vlm_jax.training import objectives

GRIDS = ((2, 3), (4, 4), (1, 7), (5, 3), (1, 1))
NAFLEX = {"position_resize": "bilinear_antialias"}
IDEFICS2 = {"position_resize": "bucket", "position_grid": (3, 3)}


def native(run: configs.Config, seed: int = 0) -> list[documents.Document]:
    """The examples, their pictures replaced by noise of sizes of its own."""
    tokenizer, rng = tokenizers.for_config(run), np.random.default_rng(seed)
    made = [documents.document(e, run, tokenizer) for e in examples()]
    grids = iter(GRIDS)
    sizes = lambda: (*(16 * side for side in next(grids)), 3)  # noqa: E731
    draw = lambda: rng.integers(0, 256, sizes(), np.uint8)  # noqa: E731
    return [dataclasses.replace(d, pixels=[draw() for _ in d.pixels]) for d in made]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [NAFLEX, IDEFICS2], ids=["naflex", "idefics2"])
def test_rows_that_share_patches_give_the_loss_and_gradients_of_documents_alone(fields):
    run = config()
    encoder = dataclasses.replace(MODEL.encoder, max_patches=16, **fields)
    model = dataclasses.replace(MODEL, encoder=encoder)
    data = dataclasses.replace(run.data, patches_per_row=48)
    run = dataclasses.replace(run, model=model, data=data)
    configs.check(run)
    made, pad = native(run), tokenizers.for_config(run).pad
    together = packing.assemble([made[:3], made[3:]], packing.shape_of(run, pad))
    own = packing.shape_of(run, pad, rows=4, patches=0)
    alone = packing.assemble([[document] for document in made], own)
    assert together.images.patches.shape[1] == 48 and alone.images.patches.shape[1] == 6 * 16
    flat = params.init(run.model, jax.random.key(0))

    @jax.jit
    def total(flat, batch):
        nats = lambda flat: objectives.losses(params.build(model, flat), batch, run)  # noqa: E731
        return jax.value_and_grad(nats, has_aux=True)(flat)

    ((loss, sums), gradient), ((expected, _), wanted) = (total(flat, b) for b in (together, alone))
    assert sums["images"] == 5
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in wanted.values())
    for path, leaf in wanted.items():
        scale = max(float(jnp.abs(leaf).max()), 1e-3 * largest)
        assert leaf.any(), path
        np.testing.assert_allclose(gradient[path] / scale, leaf / scale, atol=1e-5, err_msg=path)


def test_one_program_sees_rows_with_any_images():
    run = config()
    encoder = dataclasses.replace(MODEL.encoder, max_patches=16)
    model = dataclasses.replace(MODEL, encoder=encoder)
    shape = packing.shape_of(dataclasses.replace(run, model=model), 0, rows=1, patches=64)
    made = native(run)
    flat = params.init(model, jax.random.key(0))
    see = jax.jit(lambda images: params.build(model, flat).visual(images))
    seen = functools.partial(packing.assemble, shape=shape)
    several, one, none = (see(seen([row]).images) for row in (made[1:], made[1:2], made[:1]))
    assert see._cache_size() == 1
    np.testing.assert_allclose(one[0, 0], several[0, 0], rtol=1e-4, atol=1e-5)
    assert np.isfinite(none).all()
