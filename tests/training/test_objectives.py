"""The losses against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.models import params
from vlm_jax.training import objectives


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def flat():
    return jax.jit(lambda: params.init(tiny.MODEL, jax.random.key(0)))()


def logits_for(batch, seed=1):
    return np.random.default_rng(seed).normal(size=(*batch.tokens.shape, tiny.VOCAB)) * 2


def numpy_next_token(logits, batch, smoothing):
    """Token by token, in loops."""
    log_probs, loss, nll, weight, correct = log_softmax(logits), 0.0, 0.0, 0.0, 0.0
    for row in range(batch.tokens.shape[0]):
        for t in range(batch.tokens.shape[1] - 1):
            w = batch.loss_weights[row, t + 1]
            if batch.segments[row, t] != batch.segments[row, t + 1] or w == 0:
                continue
            chosen = log_probs[row, t, batch.tokens[row, t + 1]]
            smoothed = (1 - smoothing) * chosen + smoothing * log_probs[row, t].mean()
            loss, nll, weight = loss - w * smoothed, nll - w * chosen, weight + w
            correct += w * (log_probs[row, t].argmax() == batch.tokens[row, t + 1])
    return loss / max(weight, 1), nll, weight, correct


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_next_token_loss_equals_a_loop_over_tokens(smoothing):
    batch = tiny.batch(0)
    batch.loss_weights[:, 5] *= 0.5
    batch.loss_weights[:, 0] = 1.0  # nothing comes before: must not be counted
    logits = logits_for(batch)
    loss, sums = objectives.next_token(jnp.asarray(logits, jnp.float32), batch, smoothing)
    expected = numpy_next_token(logits, batch, smoothing)
    got = loss, sums["nll"], sums["weight"], sums["correct"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_z_loss_is_a_loop_over_tokens_in_torch():
    torch = pytest.importorskip("torch")
    batch = tiny.batch(0)
    batch.loss_weights[:, 6] *= 0.25
    given = logits_for(batch).astype(np.float32)
    theirs = torch.tensor(given, requires_grad=True)
    total, square, weight = 0.0, 0.0, 0.0
    for row, t in np.argwhere(np.asarray(batch.segments)[:, 1:] == batch.segments[:, :-1]):
        w = float(batch.loss_weights[row, t + 1])
        target = torch.tensor(int(batch.tokens[row, t + 1]))
        total = total + w * torch.nn.functional.cross_entropy(theirs[row, t], target)
        square = square + w * torch.logsumexp(theirs[row, t], 0) ** 2
        weight += w
    wanted = (total + 1e-2 * square) / weight
    wanted.backward()
    both = jax.value_and_grad(lambda x: objectives.next_token(x, batch, z_loss=1e-2), has_aux=True)
    (loss, sums), gradient = both(jnp.asarray(given))
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(sums["z"], square.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-4, atol=1e-7)


def test_an_unsupervised_batch_has_loss_zero():
    batch = tiny.batch(0)
    batch = batch._replace(loss_weights=np.zeros_like(batch.loss_weights))
    loss, _ = objectives.next_token(jnp.asarray(logits_for(batch), jnp.float32), batch)
    assert loss == 0


def test_half_batches_combine_by_their_supervised_tokens(flat):
    @jax.jit
    def value_and_gradient(flat, batch):
        def loss(flat):
            return objectives.losses(params.build(tiny.MODEL, flat), batch, tiny.config())

        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(flat)
        return value, sums["weight"], gradient

    whole = tiny.batch(0)
    whole.loss_weights[:4, ::2] = 0  # so that the halves differ in count
    first = np.arange(tiny.ROWS)[:, None] < 4
    value, weight, gradient = value_and_gradient(flat, whole)
    # A half keeps the shapes, so that one program serves all: the other half is not supervised.
    (a, wa, ga), (b, wb, gb) = (
        value_and_gradient(flat, whole._replace(loss_weights=whole.loss_weights * kept))
        for kept in (first, ~first)
    )
    assert 0 < wa < wb and wa + wb == weight
    np.testing.assert_allclose(value, (wa * a + wb * b) / weight, rtol=1e-6)
    for path in gradient:
        combined = (wa * ga[path] + wb * gb[path]) / weight
        np.testing.assert_allclose(gradient[path], combined, rtol=1e-4, atol=1e-6)


def test_counts_are_of_real_tokens_and_images(flat):
    batch = tiny.batch(0)
    vlm = params.build(tiny.MODEL, flat)
    _, sums = objectives.losses(vlm, batch, tiny.config())
    assert sums["tokens"] == (batch.segments > 0).sum()
    assert sums["positions"] == batch.segments.size
    assert sums["images"] == 2 * (tiny.ROWS - 1)


def test_bag_of_words_equals_a_loop_over_images(flat):
    vlm = params.build(tiny.MODEL, flat)
    batch = tiny.batch(0)
    batch.image_texts[0, 0] = [7, 7, 3, 7, 0]
    batch.image_texts[1, 1] = 0
    visual = vlm.visual(batch.images)
    loss, sums = objectives.bag_of_words(vlm, visual, batch.image_texts)
    log_probs = log_softmax(vlm.unembed(visual.mean(axis=2)))
    expected = [
        -np.mean([log_probs[row, n, token] for token in set(text.tolist()) - {0}])
        for row in range(tiny.ROWS)
        for n, text in enumerate(batch.image_texts[row])
        if text.any()
    ]
    assert sums["words_images"] == len(expected) == 2 * (tiny.ROWS - 1) - 1
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


def test_bag_of_words_is_added_with_its_weight(flat):
    vlm, batch = params.build(tiny.MODEL, flat), tiny.batch(0)
    plain, _ = objectives.losses(vlm, batch, tiny.config())
    total, sums = objectives.losses(vlm, batch, tiny.config(bag_of_words=0.25))
    words = sums["words_nll"] / sums["words_images"]
    np.testing.assert_allclose(total, plain + 0.25 * words, rtol=1e-6)


def test_the_contrastive_loss_equals_a_loop_over_images():
    batch, rng = tiny.batch(0), np.random.default_rng(5)
    visual = jnp.asarray(rng.normal(size=(tiny.ROWS, tiny.IMAGES, tiny.QUERIES, 16)), jnp.float32)
    texts = np.stack([[3, 1, 0, 0, 0], [3, 1, 4, 0, 0], [9, 0, 0, 0, 0], [0] * 5])
    batch.image_texts[...] = texts[rng.integers(0, 4, batch.image_texts.shape[:2])]
    batch.image_texts[0, 0] = [8, 8, 8, 8, 8]  # alone: others are told from it, it has no partner
    loss, sums = objectives.contrastive(visual, batch.image_texts, 0.2)

    words = [tuple(text) for text in batch.image_texts.reshape(-1, tiny.TEXT).tolist()]
    mean = np.asarray(visual, np.float64).mean(2).reshape(len(words), -1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    expected = []
    for i, text in enumerate(words):
        others = [j for j in range(len(words)) if j != i and any(words[j])]
        same = [j for j in others if words[j] == text and any(text)]
        if same:
            total = np.log(sum(np.exp(mean[i] @ mean[j] / 0.2) for j in others))
            expected.append(np.mean([total - mean[i] @ mean[j] / 0.2 for j in same]))
    assert sums["contrastive_images"] == len(expected) > 8
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("texts", [0, 1])
def test_images_without_partners_give_no_contrastive_gradient(texts):
    batch = tiny.batch(0)
    batch.image_texts[...] = 0
    batch.image_texts[:texts, 0] = 7
    visual = jnp.ones((tiny.ROWS, tiny.IMAGES, tiny.QUERIES, 16)).at[0].set(0.0)
    gradient = jax.grad(lambda x: objectives.contrastive(x, batch.image_texts, 0.1)[0])(visual)
    assert not np.asarray(gradient).any()


def test_the_contrastive_loss_is_added_with_its_weight(flat):
    vlm, batch = params.build(tiny.MODEL, flat), tiny.batch(0)
    batch.image_texts[:, 1] = batch.image_texts[:, 0]
    plain, _ = objectives.losses(vlm, batch, tiny.config())
    total, sums = objectives.losses(vlm, batch, tiny.config(contrastive=0.25))
    apart = sums["contrastive_nll"] / sums["contrastive_images"]
    assert apart > 0
    np.testing.assert_allclose(total, plain + 0.25 * apart, rtol=1e-6)


def test_a_run_without_images_leaves_the_encoder_alone(flat):
    batch = tiny.batch(0)
    blind = batch._replace(visual_index=np.full_like(batch.visual_index, -1))
    config = tiny.config(data={"images": False}, bag_of_words=1.0)
    vlm = params.build(tiny.MODEL, flat)
    without, _ = objectives.losses(vlm, blind, config)
    looked, _ = objectives.losses(vlm, blind, tiny.config())
    np.testing.assert_allclose(without, looked, rtol=1e-6)
