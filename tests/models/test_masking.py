"""Documents told all at once: transformers given the same embeddings and a mask that sees all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import theirs
import torch
from cases import LARGER, assert_gradients_equal, leaves

from vlm_jax.batch import Batch
from vlm_jax.models import params
from vlm_jax.models.vlm import attention_mask
from vlm_jax.training import masking, objectives

pytestmark = pytest.mark.slow
LENGTHS = (6, 8, 5)  # documents of one row; the second is told token by token


def test_losses_and_gradients_are_those_of_transformers():
    case = LARGER["llama_gqa"]
    vocab, width = case.model.decoder.vocab, case.model.decoder.width
    rng = np.random.default_rng(1)
    segments = np.repeat([1, 2, 3, 0], (*LENGTHS, 2))[None].astype(np.int32)
    tokens = rng.integers(0, vocab, segments.shape).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (*LENGTHS, 2)])[None].astype(np.int32)
    weights = ((positions >= 2) & (segments > 0)).astype(np.float32)  # two tokens of prompt each
    mask = rng.normal(size=width).astype(np.float32)

    module = theirs.make(case)
    embed = module.get_input_embeddings()
    given = torch.tensor(mask, requires_grad=True)
    total, start = 0.0, 0
    for number, length in enumerate(LENGTHS):
        ids = torch.from_numpy(tokens[:, start : start + length]).long()
        learned = torch.from_numpy(weights[:, start : start + length]) > 0
        whole = torch.ones(length, length, dtype=torch.bool)
        x, seen = embed(ids), whole.tril()
        if number != 1:
            x, seen = torch.where(learned[..., None], given, x), whole
        seen = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        logits = module(inputs_embeds=x, attention_mask=seen).logits
        target = learned[0, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[0, :-1][target], ids[0, 1:][target], reduction="sum"
        )
        total, start = total + losses, start + length
    wanted = total / weights.sum()
    wanted.backward()
    named = {n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}

    none = np.full(segments.shape, -1, np.int32)
    batch = Batch(tokens, segments, positions, weights, 0 * segments, none, none, None, None)
    decoder = dataclasses.replace(case.model.decoder, masked=True)
    model = dataclasses.replace(case.model, decoder=decoder)
    chosen = (segments == 1) | (segments == 3)

    def loss(compared):
        vlm = params.build(model, others | compared)
        read = masking.masked(batch, chosen, decoder.tokens)
        x = vlm.decoder.embed(read.tokens)
        hidden, _ = vlm.decoder(x, batch.positions, attention_mask(read))
        return objectives.next_token(vlm.unembed(hidden), batch)[0]

    shapes = params.abstract(model).items()
    others = {p: jnp.zeros(s.shape, s.dtype) for p, s in shapes if not p.startswith("decoder/")}
    compared = leaves(case, theirs.weights(case, module)) | {"decoder/mask_embedding": mask}
    found, slope = jax.jit(jax.value_and_grad(loss))(compared)
    np.testing.assert_allclose(found, wanted.item(), rtol=1e-5)
    own = slope.pop("decoder/mask_embedding")
    np.testing.assert_allclose(own, given.grad, rtol=1e-4, atol=1e-5 * np.abs(own).max())
    assert_gradients_equal(case, slope, theirs._named(case, named))
