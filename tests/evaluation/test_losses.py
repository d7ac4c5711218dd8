import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from vlm_jax import config as configs
from vlm_jax.data import heldout, pipeline
from vlm_jax.evaluation import losses
from vlm_jax.evaluation.vision import Vision
from vlm_jax.models import params
from vlm_jax.models.vlm import target_weights
from vlm_jax.parallel import mesh


def measured(config, parameters, images="right", limit=6, kind="caption"):
    batches = heldout.eval_batches(config, "validation", kind, limit, images)
    return losses.per_example(Vision(config, parameters), batches)


def test_a_uniform_model_loses_log_of_the_vocabulary():
    zeros = {path: jnp.zeros_like(leaf) for path, leaf in small.parameters().items()}
    found = measured(small.config(), zeros)
    assert len(found) == 6
    for loss in found.values():
        assert loss.nats / loss.tokens == pytest.approx(np.log(small.VOCAB), rel=1e-6)


def test_losses_are_those_of_a_softmax_over_every_next_token():
    config, parameters = small.config(), small.parameters()
    batch, info = next(heldout.eval_batches(config, "validation", "caption", 4))

    @jax.jit
    def logits_of(flat, batch):
        vlm = params.build(config.model, flat)
        return vlm.unembed(vlm.hidden(batch, vlm.visual(batch.images)))

    logits = np.asarray(logits_of(parameters, batch), np.float64)
    expected = np.zeros(4)
    for row, t in itertools.product(range(4), range(batch.tokens.shape[1] - 1)):
        scores = logits[row, t]
        nats = np.log(np.exp(scores).sum()) - scores[batch.tokens[row, t + 1]]
        expected[row] += batch.loss_weights[row, t + 1] * nats
    found = measured(config, parameters, limit=4)
    keys = [names[0][0] for names in info.documents]
    np.testing.assert_allclose([found[key].nats for key in keys], expected, rtol=1e-5)
    np.testing.assert_allclose(
        [found[key].tokens for key in keys], batch.loss_weights.sum(1), rtol=1e-6
    )


def test_nothing_is_lost_across_packed_documents():
    batch, _ = next(pipeline.train_stream(small.config()))
    weights = target_weights(batch)[:, :-1]
    starts = batch.segments[:, 1:] != batch.segments[:, :-1]
    assert starts.any() and not weights[starts].any()
    assert weights.sum() == batch.loss_weights.sum()


def test_long_rows_give_the_losses_of_short_ones():
    """Logits are made in chunks of positions; where they are cut must not matter."""
    config, parameters = small.config(), small.parameters()
    batch, _ = next(heldout.eval_batches(config, "validation", "caption", 4))
    visual = Vision(config, parameters)(batch)
    longer = batch._replace(
        **{
            name: np.pad(getattr(batch, name), ((0, 0), (0, 50)), constant_values=fill)
            for name, fill in {"visual_index": -1, "image_index": -1}.items()
        },
        **{
            name: np.pad(getattr(batch, name), ((0, 0), (0, 50)))
            for name in ("tokens", "segments", "positions", "loss_weights", "blocks")
        },
    )
    short, long = (
        losses._compiled(config.model)(
            parameters, one._replace(images=None, image_texts=None), visual
        )
        for one in (batch, longer)
    )
    assert long.shape[1] > losses.CHUNK
    np.testing.assert_allclose(long[:, : short.shape[1]], short, rtol=1e-4, atol=1e-5)
    assert not np.asarray(long)[:, short.shape[1] :].any()


def test_a_model_that_ignores_its_images_has_no_seeing_gap():
    config = small.config()
    blind = {
        path: jnp.zeros_like(leaf) if path.startswith("connector/") else leaf
        for path, leaf in small.parameters().items()
    }
    right, other = (measured(config, blind, images) for images in ("right", "shuffled"))
    assert losses.gap(right, other) == 0.0
    seeing = measured(config, small.parameters(), "shuffled")
    assert losses.gap(measured(config, small.parameters()), seeing) != 0.0


def test_the_gap_counts_tokens_and_not_examples():
    right = {"a": losses.Loss(1.0, 1.0), "b": losses.Loss(2.0, 4.0)}
    other = {"a": losses.Loss(2.0, 1.0), "b": losses.Loss(8.0, 4.0)}
    assert losses.gap(right, other) == pytest.approx((1 + 6) / 5)


@pytest.mark.parametrize("connector", ["perceiver", "mlp"])
def test_vision_gives_the_visual_tokens_of_the_model(connector):
    config, parameters = small.config(connector), small.parameters(connector)
    batch, _ = next(heldout.eval_batches(config, "validation", "compare", 3))
    visual_of = jax.jit(lambda flat, images: params.build(config.model, flat).visual(images))
    expected = np.asarray(visual_of(parameters, batch.images))
    present = batch.images.grids.any(axis=-1)
    assert present.sum() == 6  # three rows of two images, one empty row
    visual = Vision(config, parameters)(batch)
    # Features are of size 1 to 10; other batch sizes add up in other orders.
    np.testing.assert_allclose(visual[present], expected[present], atol=2e-4)
    assert not visual[~present].any()


def test_a_picture_is_encoded_once_whatever_is_asked_about_it():
    config = small.config()
    vision = Vision(config, small.parameters())
    for kind, images in itertools.product(("caption", "yes_no"), ("right", "shuffled")):
        for batch, _ in heldout.eval_batches(config, "validation", kind, 6, images):
            vision(batch)
    assert len(vision._known) == 6


def test_a_model_without_images_takes_the_same_program():
    config = small.config()
    before = losses._compiled(config.model)._cache_size()
    measured(config, small.parameters())
    compiled = losses._compiled(config.model)._cache_size()
    found = measured(small.blind(config), small.parameters())
    assert losses._compiled(config.model)._cache_size() == max(compiled, before)
    # Nor does it depend on which images there would have been.
    assert found == measured(small.blind(config), small.parameters(), "shuffled")


def test_losses_on_a_mesh_are_those_of_one_device():
    config, parameters = small.config(), small.parameters()
    expected = measured(config, parameters)
    with jax.set_mesh(mesh.make(configs.Parallel(data=2, fsdp=2, tensor=2))):
        found = measured(config, parameters)
    for key, loss in expected.items():
        assert found[key].nats == pytest.approx(loss.nats, rel=1e-4)
