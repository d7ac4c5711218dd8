"""What the tests of streams and of held-out batches share."""

import hashlib

import jax

from vlm_jax.batch import Batch


def digest(batch: Batch) -> str:
    """A hash of every byte of a batch."""
    state = hashlib.sha256()
    for array in jax.tree.leaves(batch):
        state.update(repr((array.shape, array.dtype)).encode() + array.tobytes())
    return state.hexdigest()


def with_pictures(**data) -> dict:
    """Fields of `config.Data` for the embedded captions."""
    return {"mixture": {"emoji:caption": 1.0}, "pool": 8, **data}
