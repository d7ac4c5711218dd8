"""Patches of several images in one row give what each image gives in a slot of its own."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade import MODEL, weights
from vision_cases import SMALL, leaves

from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.models import packed, params
from vlm_jax.models.vit import _drop_path
from vlm_jax.presets.encoders import Encoder

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
PATCH, ROOM, SLOTS = 2, 15, 4
# Rows of images: more patches than entries of the table along one axis and fewer along the other,
# a row without images, and one that fills its patches.
ROWS = (((3, 2), (5, 3), (2, 7)), (), ((1, 1),), ((3, 5), (2, 2), (4, 3), (2, 4)))
BUDGET = 43

FIELDS = {
    "patch": PATCH,
    "image_size": 8,
    "max_patches": ROOM,
    "dtype": "float32",
    "remat": False,
}
SIZES = (12, 2, 18, 3)
ENCODERS = {
    "naflex": Encoder(*SIZES, position_resize="bilinear_antialias", **FIELDS),
    "idefics2": Encoder(*SIZES, position_resize="bucket", position_grid=(3, 3), **FIELDS),
    "bicubic, tapped": Encoder(*SIZES, taps=(-2, -1), final_norm=False, **FIELDS),
    "pix2struct": Encoder(*SIZES, position="row_column", position_grid=(17, 17), **FIELDS),
    "rotary, class token, registers": Encoder(
        *SIZES, rotary_grid=(4, 4), class_token=True, registers=2, keep_class=True, **FIELDS
    ),
    "class token alone": Encoder(*SIZES, class_token=True, pool="class", **FIELDS),
    "pooled": Encoder(*SIZES, pool="map", position_resize="bilinear_antialias", **FIELDS),
}


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


def model(encoder: Encoder, **fields) -> Model:
    """A Perceiver, which reads any number of features, over an encoder."""
    connector = dataclasses.replace(MODEL.connector, layers=1)
    return Model(dataclasses.replace(encoder, **fields), connector, MODEL.decoder)


@functools.lru_cache
def step(name: str):
    """Features, visual tokens, and the gradient of a sum of these with random weights."""
    made = model(ENCODERS[name])
    cotangent = np.random.default_rng(1).normal(size=(len(ROWS), SLOTS, 3, 20))

    def loss(flat, images):
        vlm = params.build(made, flat)
        tokens = vlm.visual(images)
        total = (tokens * cotangent * there()[..., None, None]).sum()
        return total, (vlm.encoder(images), tokens)

    return weights(made), jax.grad(loss, has_aux=True)


@functools.lru_cache
def of_slots(name: str):
    flat, run = step(name)
    return jax.jit(run)(flat, slots(pictures()))


WAYS = {"whole rows": packed.over_rows, "slot by slot": packed.by_slots}
QUICK = ("naflex",)
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_packed_images_give_the_features_visual_tokens_and_gradients_of_slots(
    name, way, monkeypatch
):
    monkeypatch.setattr(packed, "attention", WAYS[way])
    flat, run = step(name)
    ours, (found, tokens) = jax.jit(lambda *args: run(*args))(flat, together(pictures()))
    theirs, (wanted, expected) = of_slots(name)
    mask = np.ones(wanted.x.shape[:2], bool) if wanted.mask is None else wanted.mask
    keep = np.asarray(mask) & there().reshape(-1, 1)
    if wanted.mask is not None:
        np.testing.assert_array_equal(found.mask, wanted.mask)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(found.x)[keep], np.asarray(wanted.x)[keep], **close)
    np.testing.assert_allclose(tokens[there()], expected[there()], **close)
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for path, gradient in theirs.items():
        atol = 1e-4 * np.abs(gradient).max() + 1e-6 * largest
        np.testing.assert_allclose(ours[path], gradient, rtol=1e-3, atol=atol, err_msg=path)


TOWERS = {name: tower for name, tower in SMALL.items() if tower.grids}


def repacked(tower, x: np.ndarray, order: tuple[int, ...], garbage: float) -> Images:
    """One row of the tower's images in another order, with padding behind them."""
    kept = [x[i, : np.prod(tower.grids[i])] for i in order]
    padding = [np.full((5, x.shape[-1]), garbage, np.float32)]
    counts = [len(patches) for patches in kept]
    return Images(
        np.asarray([[tower.grids[i] for i in order]], np.int32),
        patches=np.concatenate(kept + padding)[None],
        patch_positions=np.concatenate(
            [places(tower.grids[i]) for i in order] + [np.full((5, 2), int(garbage))]
        )[None],
        patch_images=np.repeat([*range(len(order)), -1], [*counts, 5])[None],
        starts=np.cumsum([0, *counts[:-1]])[None],
    )


@pytest.mark.parametrize("name", TOWERS)
def test_packed_images_in_any_order_give_what_transformers_computed(name):
    tower = TOWERS[name]
    with np.load(FOLDER / f"vision_{name}.npz") as file:
        x, wanted = file["inputs"], file["output"]
        stored = {key: file[key] for key in file.files}
    flat = leaves(tower, {k.removeprefix("weights/"): v for k, v in stored.items() if "/" in k})
    flat = {f"encoder/{path}": jnp.asarray(leaf) for path, leaf in flat.items()}
    see = jax.jit(lambda images: params.build(Model(tower.preset), flat).encoder(images))
    counts = [rows * columns for rows, columns in tower.grids]
    whole = tower.output == "pooled"
    theirs = list(wanted) if whole else np.split(wanted, np.cumsum(counts)[:-1])
    for order, garbage in (((0, 1, 2), 0.0), ((2, 0, 1), 50.0)):
        found = see(repacked(tower, x, order, garbage)).x
        for i, features in zip(order, found, strict=True):
            ours = np.asarray(features if whole else features[: counts[i]])
            error = np.linalg.norm(ours - theirs[i]) / np.linalg.norm(theirs[i])
            assert error < 1e-4, (order, i)


def test_padding_changes_nothing_and_gets_no_gradient():
    made, clean = model(ENCODERS["naflex"]), together(pictures())
    flat = weights(made)

    @jax.jit
    def run(images):
        def total(patches):
            seen = images._replace(patches=patches)
            tokens = params.build(made, flat).visual(seen)
            return jnp.square(tokens * there()[..., None, None]).sum(), tokens

        return jax.grad(total, has_aux=True)(images.patches)

    (gradient, tokens), (_, found) = run(clean), run(together(pictures(), garbage=9.0))
    np.testing.assert_array_equal(found[there()], tokens[there()])
    assert np.isfinite(found).all()  # empty slots too
    real = clean.patch_images >= 0
    assert not gradient[~real].any() and np.abs(gradient[real]).max(axis=-1).min() > 0


def test_shapes_decide_how_attention_runs(monkeypatch):
    seen = []
    for name in ("over_rows", "by_slots"):
        plain = getattr(packed, name)
        monkeypatch.setattr(packed, name, lambda *a, p=plain, n=name: seen.append(n) or p(*a))
    images = jax.tree.map(jnp.asarray, together(pictures()))
    x = jnp.ones((len(ROWS), BUDGET, 1, 2))
    for room in (ROOM, 40):
        packed.attention(x, x, x, packed.rows(images, 0, room))
    assert seen == ["by_slots", "over_rows"]


def test_stochastic_depth_drops_whole_images():
    rows = packed.rows(together(pictures()), before=1, room=ROOM)
    x = jnp.ones((len(ROWS), SLOTS + BUDGET, 2))
    kept = np.zeros((200, len(ROWS), SLOTS))
    for i in range(len(kept)):
        y = np.asarray(_drop_path(x, 0.25, jax.random.key(i), rows))
        for row, slot in zip(*np.nonzero(there()), strict=True):
            own = y[row, rows.owner[row] == slot]
            assert len(own) == 1 + np.prod(ROWS[row][slot]) and (own == own[0, 0]).all()
            kept[i, row, slot] = own[0, 0]
    assert set(np.unique(kept[:, there()])) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_allclose(kept[:, there()].mean(), 1, atol=0.05)
