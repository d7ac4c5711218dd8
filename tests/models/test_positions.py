"""What decoders make of positions, where transformers says nothing: blocks, packed rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from handmade import MODEL

from vlm_jax.models import positions

AT = jnp.asarray([[0, 1, 2, 3, 0, 1]])  # two packed documents


def view(layer: str = "global", mask=None, **fields) -> positions.View:
    decoder = dataclasses.replace(MODEL.decoder, **fields)
    mask = jnp.ones((1, 1, 6, 6), bool) if mask is None else mask
    return positions.view(decoder, layer, mask, AT, AT)


def test_linear_biases_grow_with_the_distance_both_ways_within_a_document():
    distance = np.asarray(view(position="alibi").distance)[0, 0]
    np.testing.assert_array_equal(distance[:4, :4], distance[:4, :4].T)
    np.testing.assert_array_equal(distance[3, :4], [3, 2, 1, 0])
    np.testing.assert_array_equal(distance[4:, 4:], [[0, 1], [1, 0]])


def test_slopes_are_the_powers_of_the_paper():
    np.testing.assert_allclose(positions.slopes(8), 0.5 ** np.arange(1, 9))
    assert len(set(positions.slopes(6).tolist())) == 6


def test_a_window_holds_within_blocks_unless_the_preset_lifts_it_there():
    together = np.zeros((1, 1, 6, 6), bool)
    together[..., :4, :4] = True
    fields = {"window": 2, "pattern": ("local",)}
    held, lifted = (
        dataclasses.replace(MODEL.decoder, **fields, window_in_blocks=held)
        for held in (True, False)
    )
    mask = jnp.ones((1, 1, 6, 6), bool)
    seen = np.asarray(positions.view(held, "local", mask, AT, AT).mask)[0, 0]
    assert seen[3, :4].tolist() == [False, False, True, True]
    seen = np.asarray(positions.view(lifted, "local", mask, AT, AT, together).mask)[0, 0]
    assert seen[:4, :4].all() and not seen[3, 4:].any()


def test_a_window_counts_back_in_the_document_and_hides_nothing_ahead():
    fields = {"window": 2, "pattern": ("local", "global")}
    seen = np.asarray(view("local", **fields).mask)[0, 0]
    assert seen[3, :4].tolist() == [False, False, True, True]
    assert seen[0, :4].all() and seen[5, 4:].all()
    assert np.asarray(view("global", **fields).mask).all()
