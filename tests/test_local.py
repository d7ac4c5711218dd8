"""The `local` variants of published systems: their recipes at sizes for a CPU."""

import jax
import numpy as np
import pytest
import systems

from vlm_jax.data import pipeline
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import adaptation
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

LOCAL = systems.local()


def losses(config, count: int) -> list[float]:
    """Of some steps on the first batch of the stream."""
    mesh = meshes.make(config.parallel, jax.devices()[:1])
    plan = adaptation.of(config)
    with pipeline.train_stream(config) as stream:
        batch, info = next(stream)
    assert not info.rejects
    step, batch = steps.make_step(config, plan, mesh), steps.place(batch, mesh)
    state, found = states.create(config, plan, mesh), []
    for _ in range(count):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("name", LOCAL)
def test_trains(name):
    import time

    t = time.time()
    found = losses(systems.config(name), 6)
    print(name, time.time() - t, found)
    assert np.isfinite(found).all() and found[-1] < found[0]
