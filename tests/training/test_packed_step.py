"""Rows that share patches in the training step: in a mesh, and what memory they are counted for."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.batch import Batch
from vlm_jax.config import Parallel
from vlm_jax.presets.encoders import vit
from vlm_jax.training import memory
from vlm_jax.training import step as steps

ROOM, BUDGET = 4, 7  # an image of four patches and one of up to three share a row
ENCODER = dataclasses.replace(tiny.MODEL.encoder, max_patches=ROOM, remat=True)
MODEL = dataclasses.replace(tiny.MODEL, encoder=ENCODER)


def batches(seed: int) -> tuple[Batch, Batch]:
    """The tiny batch, the second image of a row with three patches or fewer: in slots, packed."""
    batch = tiny.batch(seed)
    grids, owner = batch.images.grids.copy(), batch.images.patch_images.copy()
    grids[:, 1] = np.where(grids[:, 1] > 0, (1, 3), 0)
    places = batch.images.patch_positions.copy()
    places[:, ROOM:] = np.stack([np.zeros(ROOM), np.arange(ROOM)], axis=-1)
    owner[:, -1] = -1
    owner[grids[:, 0, 0] == 0] = -1
    images = batch.images._replace(grids=grids, patch_positions=places, patch_images=owner)
    starts = np.tile(np.array([0, ROOM], np.int32), (len(grids), 1))
    shared = images._replace(
        patches=images.patches[:, :BUDGET],
        patch_positions=places[:, :BUDGET],
        patch_images=owner[:, :BUDGET],
        starts=starts,
    )
    return batch._replace(images=images), batch._replace(images=shared)


def losses(config, which: int, devices: int = 1) -> list[float]:
    """Of two steps on one batch."""
    mesh, _, step, create = tiny.prepared(config, devices)
    batch, state, found = steps.place(batches(0)[which], mesh), create(), []
    for _ in range(2):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
def test_steps_on_rows_that_share_patches_are_those_on_slots_in_any_mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    wanted = losses(tiny.config(MODEL), 0)
    np.testing.assert_allclose(losses(tiny.config(MODEL), 1), wanted, rtol=1e-5)
    spread = tiny.config(MODEL, parallel=Parallel(2, 2, 2))
    np.testing.assert_allclose(losses(spread, 1, devices=8), wanted, rtol=1e-5)


def test_rows_that_share_patches_are_counted_as_what_runs():
    encoder = vit("So400m/14", image_size=448, max_patches=1024)
    assert encoder.packed_runs(10, 4096) == ((4096, 2560, 1152, 4304, 16, 27),)  # slot by slot
    assert encoder.packed_runs(64, 4096) == ((4096, 4096, 1152, 4304, 16, 27),)  # whole rows
    assert dataclasses.replace(encoder, class_token=True).packed_runs(10, 4096)[0][0] == 4106


def test_less_room_for_patches_takes_less_memory():
    model = dataclasses.replace(
        tiny.MODEL, encoder=vit("B/16", max_patches=196, position_resize="bucket")
    )

    def activations(shared: int) -> float:
        data = {"images_per_row": 16, "patches_per_row": shared}
        config = tiny.config(model, data)
        mesh, plan, *_ = tiny.prepared(tiny.config(), 1)
        return memory._activations(config, plan, mesh.shape)

    slots, whole, half = (activations(shared) for shared in (0, 16 * 196, 8 * 196))
    assert half < whole <= slots
