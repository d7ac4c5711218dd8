"""Patches of several images in one row give what each image gives in a slot of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade import MODEL, weights

from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.models import packed, params
from vlm_jax.presets.encoders import Encoder

PATCH, ROOM, SLOTS = 2, 15, 4
# Rows of images: more patches than entries of the table along one axis and fewer along the other,
# a row without images, and one that fills its patches.
ROWS = (((3, 2), (5, 3), (2, 7)), (), ((1, 1),), ((3, 5), (2, 2), (4, 3), (2, 4)))
BUDGET = 39

FIELDS = {
    "patch": PATCH,
    "image_size": 8,
    "max_patches": ROOM,
    "dtype": "float32",
    "remat": False,
}
SIZES = (12, 3, 18, 3)
ENCODERS = {
    "naflex": Encoder(*SIZES, position_resize="bilinear_antialias", **FIELDS),
    "idefics2": Encoder(*SIZES, position_resize="bucket", position_grid=(3, 3), **FIELDS),
    "bicubic, tapped": Encoder(*SIZES, taps=(-3, -1), final_norm=False, **FIELDS),
    "pix2struct": Encoder(*SIZES, position="row_column", position_grid=(17, 17), **FIELDS),
    "rotary, class token, registers": Encoder(
        *SIZES, rotary_grid=(4, 4), class_token=True, registers=2, keep_class=True, **FIELDS
    ),
    "class token alone": Encoder(*SIZES, class_token=True, pool="class", **FIELDS),
    "pooled": Encoder(*SIZES, pool="map", position_resize="bilinear_antialias", **FIELDS),
}


def model(encoder: Encoder, **fields) -> Model:
    """A Perceiver, which reads any number of features, over an encoder."""
    return dataclasses.replace(MODEL, encoder=dataclasses.replace(encoder, **fields))


def pictures(rows=ROWS, seed: int = 0) -> list[list[np.ndarray]]:
    """Flattened patches [rows * columns, patch_dim] of every image."""
    rng = np.random.default_rng(seed)
    normal = lambda grid: rng.normal(size=(grid[0] * grid[1], 3 * PATCH**2))  # noqa: E731
    return [[normal(grid).astype(np.float32) for grid in row] for row in rows]


def places(grid: tuple[int, int]) -> np.ndarray:
    return np.indices(grid).reshape(2, -1).T


def slots(seen, rows=ROWS) -> Images:
    """Room of its own for every image."""
    made = empty(len(rows), SLOTS * ROOM)
    for b, row in enumerate(rows):
        for n, grid in enumerate(row):
            here = b, slice(n * ROOM, n * ROOM + grid[0] * grid[1])
            fill(made, b, n, here, grid, seen[b][n])
    return made


def together(seen, rows=ROWS, budget: int = BUDGET, garbage: float = 0.0) -> Images:
    """One after another."""
    made = empty(len(rows), budget)._replace(starts=np.zeros((len(rows), SLOTS), np.int32))
    made.patches[:], made.patch_positions[:] = garbage, int(garbage)
    for b, row in enumerate(rows):
        start = 0
        for n, grid in enumerate(row):
            end = start + grid[0] * grid[1]
            fill(made, b, n, (b, slice(start, end)), grid, seen[b][n])
            made.starts[b, n] = start
            start = end
    return made


def empty(rows: int, patches: int) -> Images:
    return Images(
        grids=np.zeros((rows, SLOTS, 2), np.int32),
        patches=np.zeros((rows, patches, 3 * PATCH**2), np.float32),
        patch_positions=np.zeros((rows, patches, 2), np.int32),
        patch_images=np.full((rows, patches), -1, np.int32),
    )


def fill(made: Images, row: int, slot: int, here, grid, patches) -> None:
    made.grids[row, slot] = grid
    made.patches[here], made.patch_positions[here] = patches, places(grid)
    made.patch_images[here] = slot


def there(rows=ROWS) -> np.ndarray:
    """True where a slot has an image."""
    return np.array([[n < len(row) for n in range(SLOTS)] for row in rows])


def visual(model: Model, flat: dict, images: Images, key=None):
    see = lambda flat, images: params.build(model, flat).visual(images, key)  # noqa: E731
    return jax.jit(see)(flat, jax.tree.map(jnp.asarray, images))


def features(model: Model, flat: dict, images: Images):
    return jax.jit(lambda flat, images: params.build(model, flat).encoder(images))(flat, images)


@pytest.fixture(params=["whole rows", "slot by slot"])
def way(request, monkeypatch) -> str:
    """Makes attention take the given way whatever the shapes."""
    plain = packed.attention
    chosen = {"whole rows": packed.over_rows, "slot by slot": packed.by_slots}[request.param]
    monkeypatch.setattr(packed, "attention", chosen)
    assert plain is not chosen
    return request.param


@pytest.mark.parametrize("name", ENCODERS)
def test_packed_images_give_the_features_visual_tokens_and_gradients_of_slots(name, way):
    made, seen = model(ENCODERS[name]), pictures()
    flat = weights(made)
    apart, packed_rows = slots(seen), together(seen, garbage=7.0)
    found, wanted = (features(made, flat, images) for images in (packed_rows, apart))
    if wanted.mask is not None:
        np.testing.assert_array_equal(found.mask[there().ravel()], wanted.mask[there().ravel()])
    keep = there().ravel()[:, None] & (True if wanted.mask is None else np.asarray(wanted.mask))
    np.testing.assert_allclose(
        np.asarray(found.x)[keep], np.asarray(wanted.x)[keep], rtol=1e-4, atol=1e-5
    )
    cotangent = np.random.default_rng(1).normal(size=(len(ROWS), SLOTS, 3, 20))

    def loss(flat, images):
        tokens = params.build(made, flat).visual(images)
        return (tokens * cotangent * there()[..., None, None]).sum(), tokens

    step = jax.jit(jax.grad(loss, has_aux=True))
    (ours, tokens), (theirs, expected) = step(flat, packed_rows), step(flat, apart)
    np.testing.assert_allclose(tokens[there()], expected[there()], rtol=1e-4, atol=1e-5)
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for path, gradient in theirs.items():
        atol = 1e-4 * np.abs(gradient).max() + 1e-6 * largest
        np.testing.assert_allclose(ours[path], gradient, rtol=1e-3, atol=atol, err_msg=path)
