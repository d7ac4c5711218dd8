"""Training a model that looks at images by cross-attention: meshes, memory."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.config import Config, Parallel
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.training import adaptation, memory
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

CROSS = CrossAttention(
    32, heads=4, kv_heads=2, head_dim=6, every=1, width=24, qk_norm=True, dropout=0.1
)


def config(fusion: CrossAttention | None = CROSS, parallel: Parallel | None = None) -> Config:
    model = dataclasses.replace(tiny.MODEL, fusion=fusion)
    return tiny.config(model, parallel=parallel or Parallel())


@pytest.mark.slow
def test_losses_fall_and_do_not_depend_on_the_mesh():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 simulated devices")

    def losses(parallel, devices):
        mesh, plan, step, create = tiny.prepared(config(parallel=parallel), devices)
        state, found = create(), []
        for number in range(12):
            state, metrics = step(state, steps.place(tiny.batch(number % 2), mesh))
            found.append(float(metrics["loss"]))
        gates = [path for path in plan.lr if path.endswith("_gate")]
        assert len(gates) == 2 and all(np.asarray(state.trainable[path]).all() for path in gates)
        return found

    one, four = losses(Parallel(), 1), losses(Parallel(1, 2, 2), 4)
    np.testing.assert_allclose(four, one, rtol=1e-5)
    assert np.mean(one[-2:]) < np.mean(one[:2])


def test_the_gated_blocks_count_in_the_estimate_of_memory():
    def needed(config):
        mesh = meshes.make(config.parallel, jax.devices()[:1])
        plan = adaptation.of(config)
        return memory.needed(config, plan, mesh, states.abstract(config, plan, mesh))

    with_blocks, without = needed(config()), needed(config(fusion=None))
    assert with_blocks["activations"] > without["activations"]
    assert with_blocks["parameters"] > without["parameters"]
