"""NEFTune's noise: its size by document, where it falls, and transformers' hook beside it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade import MODEL, document, lay_out, weights

from vlm_jax.models import noise, params

ALPHA = 5.0


def packed():
    rng = np.random.default_rng(0)
    parts = [(2, "image", 4), ("image", 1, "image", 3)]
    documents = [document(rng, p) for p in parts]
    size = sum(len(d.tokens) for d in documents) + 4
    return documents, lay_out(MODEL, [documents], size, slots=4)


def test_its_size_is_that_of_the_document_and_padding_gets_none():
    documents, batch = packed()
    key, width = jax.random.key(3), 6
    drawn = noise.drawn(batch.segments, width, ALPHA, key)[0]
    start = 0
    for document_ in documents:
        most = ALPHA / np.sqrt(len(document_.tokens) * width)
        part = np.abs(drawn[start : start + len(document_.tokens)])
        assert 0.9 * most < part.max() <= most
        start += len(document_.tokens)
    assert not drawn[start:].any()


def test_it_reaches_tokens_alone_and_only_in_training():
    _, batch = packed()
    vlm = params.build(MODEL, weights(MODEL))
    visual = vlm.visual(batch.images)
    quiet = vlm.hidden(batch, visual)
    np.testing.assert_array_equal(vlm.hidden(batch, visual, None, ALPHA), quiet)
    key = jax.random.key(3)
    width = MODEL.decoder.embedded
    noisy = vlm.fuse(batch, visual, noise.drawn(batch.segments, width, ALPHA, key))
    moved = np.any(noisy != vlm.fuse(batch, visual), axis=-1)
    np.testing.assert_array_equal(moved, (batch.segments > 0) & (batch.visual_index < 0))
    still = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, dropout=0.0))
    vlm = params.build(still, weights(MODEL))
    assert np.abs(vlm.hidden(batch, visual, key, ALPHA) - quiet).max() > 0.01
    np.testing.assert_array_equal(vlm.hidden(batch, visual, key), quiet)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "gemma"])
def test_logits_and_gradients_are_those_of_transformers_with_its_hook(name, monkeypatch):
    import theirs
    import torch
    from cases import LARGER, assert_gradients_equal, leaves
    from transformers.integrations.neftune import activate_neftune

    case = LARGER[name]
    decoder, lengths = case.model.decoder, (5, 9)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, decoder.vocab, (1, sum(lengths))).astype(np.int32)
    draws = rng.uniform(-1, 1, (*tokens.shape, decoder.embedded)).astype(np.float32)
    cuts = [0, *itertools.accumulate(lengths)]

    module = theirs.make(case)
    activate_neftune(module, ALPHA)
    module.train()
    pieces = iter([draws[:, a:b] for a, b in itertools.pairwise(cuts)])

    def given(self, low, high):
        return low + (high - low) * (torch.from_numpy(next(pieces)) + 1) / 2

    monkeypatch.setattr(torch.Tensor, "uniform_", given)
    wanted = torch.cat(
        [
            module(torch.from_numpy(tokens[:, a:b]).long()).logits
            for a, b in itertools.pairwise(cuts)
        ],
        dim=1,
    )
    pull = rng.normal(size=wanted.shape).astype(np.float32)
    (wanted * torch.from_numpy(pull)).sum().backward()
    named = {n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}
    gradients = theirs._named(case, named)

    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    mask = np.tril(segments[0][:, None] == segments[0])[None, None]

    def logits(compared):
        vlm = params.build(case.model, compared)
        x = vlm.decoder.embed(tokens, noise.scaled(jnp.asarray(draws), segments, ALPHA))
        return vlm.unembed(vlm.decoder(x, positions, mask)[0])

    shapes = params.abstract(case.model).items()
    others = {p: jnp.zeros(s.shape, s.dtype) for p, s in shapes if not p.startswith("decoder/")}
    compared = leaves(case, theirs.weights(case, module))
    found = jax.jit(lambda c: logits(others | c))(compared)
    wanted = wanted.detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    slope = jax.jit(jax.grad(lambda c: (logits(others | c) * pull).sum()))(compared)
    assert_gradients_equal(case, slope, gradients)
