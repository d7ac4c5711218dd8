"""Gradients of whole systems: every leaf's, against those of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import published  # noqa: E402

from vlm_jax.models import params  # noqa: E402
from vlm_jax.weights import checking, registry, tables  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["instructblip", "idefics"])
def test_every_leaf_of_a_system_has_the_gradient_of_transformers(name):
    case = published.CASES[name]
    theirs, arrays = published.make(case, seed=2), published.case_inputs(case, seed=2)
    hf = case.config.to_dict()
    family = registry.family(hf["model_type"])
    model = checking.exact(family.read(hf))
    prompts, rows = family.inputs(model, hf, arrays), family.rows(model)
    logits = _logits(theirs, arrays)
    weights = np.random.default_rng(3).normal(size=logits.shape).astype(np.float32)
    weights *= arrays["attention_mask"][..., None]
    (logits * torch.from_numpy(weights)).sum().backward()

    shapes = {path: leaf.shape for path, leaf in params.abstract(model).items()}
    named = dict(theirs.named_parameters())
    values = {n: p.detach().numpy() for n, p in named.items()}
    wanted = {n: p.grad.numpy() for n, p in named.items() if p.grad is not None}
    gradient = jax.jit(jax.grad(functools.partial(_loss, model, prompts.batch)))
    found = gradient(tables.gather(rows, shapes, values), prompts.moved(weights))
    wanted = tables.gather(rows, shapes, wanted)
    assert wanted.keys() == shapes.keys()
    for path, gradient in wanted.items():
        # Softmax takes no notice of what is added to all keys: their biases have rounding alone.
        same = path.replace("key", "query") if path.endswith("bias") else path
        beside = np.linalg.norm(wanted[same])
        # What the last layer makes of an instruction is not looked at: zero on both sides.
        error = np.linalg.norm(found[path] - gradient)
        assert error <= 1e-4 * beside, f"{path} differs by {error} of {beside}"


def _logits(theirs, arrays):
    for parameter in theirs.parameters():  # Idefics1 freezes most of itself
        parameter.requires_grad_(True)
    return theirs(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits


def _loss(model, batch, leaves, weights):
    vlm = params.build(model, leaves)
    batch = jax.tree.map(jnp.asarray, batch)
    texts = batch.image_texts if batch.image_texts.size else None
    visual = vlm.visual((batch.images,), texts=texts)
    return (vlm.unembed(vlm.hidden(batch, visual)) * weights).sum()
