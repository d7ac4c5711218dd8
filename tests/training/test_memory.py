"""The memory check: exact for what is stored, refused before anything is allocated."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.config import Parallel, Rule
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.parallel import devices
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit
from vlm_jax.training import adaptation, memory
from vlm_jax.training import state as states

GIB = 2**30
LARGE = dataclasses.replace(tiny.MODEL, encoder=vit("g/14"), decoder=decoder("llama2-7b"))


def planned(config, count=1):
    mesh = meshes.make(config.parallel, jax.devices()[:count])
    plan = adaptation.of(config)
    return config, plan, mesh, states.abstract(config, plan, mesh)


def test_stored_bytes_are_those_of_a_real_state():
    config, plan, mesh, abstract = planned(
        tiny.config(ema=0.9, adaptation=(Rule("encoder/.*", mode="frozen"), Rule(".*")))
    )
    parts = memory.needed(config, plan, mesh, abstract)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert parts["parameters"] == size(state.trainable) + size(state.frozen)
    assert parts["gradients"] == parts["average"] == size(state.trainable)
    assert parts["optimizer"] == size(state.opt)


def test_fsdp_divides_what_is_stored():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    one = memory.needed(*planned(tiny.config(LARGE)))
    eight = memory.needed(*planned(tiny.config(LARGE, parallel=Parallel(1, 8, 1)), 8))
    for part in ("parameters", "gradients", "optimizer"):
        assert one[part] / 8 <= eight[part] < one[part] / 7.9
    assert eight["activations"] < one["activations"]


def test_a_model_that_does_not_fit_is_refused_with_its_bytes(monkeypatch):
    monkeypatch.setattr(devices, "memory", lambda local: 16 * GIB)
    config, plan, mesh, abstract = planned(tiny.config(LARGE))
    total = sum(memory.needed(config, plan, mesh, abstract).values())
    with pytest.raises(ConfigError) as refused:
        memory.check(config, plan, mesh, abstract, hint="try --config=x.py:local")
    message = str(refused.value)
    assert f"needs {total:,} bytes" in message and f"has {16 * GIB:,} (16.0 GiB)" in message
    for part in ("parameters", "gradients", "optimizer", "activations", "x.py:local"):
        assert part in message
    assert refused.value.exit_code == 78


def test_a_model_that_fits_passes():
    planned_run = planned(tiny.config())
    assert memory.check(*planned_run) == memory.needed(*planned_run)


def test_frozen_towers_below_all_training_keep_no_activations():
    deep = dataclasses.replace(
        tiny.MODEL, encoder=dataclasses.replace(tiny.MODEL.encoder, depth=20, remat=False)
    )
    frozen = (Rule("encoder/.*", mode="frozen"), Rule(".*"))
    trained = memory.needed(*planned(tiny.config(deep)))["activations"]
    resting = memory.needed(*planned(tiny.config(deep, adaptation=frozen)))["activations"]
    above = (Rule("decoder/.*", mode="frozen"), Rule(".*"))
    assert resting < trained / 2
    assert memory.needed(*planned(tiny.config(deep, adaptation=above)))["activations"] == trained


@pytest.mark.slow
def test_the_estimate_of_activations_is_near_what_the_compiler_takes():
    """Within a factor of three, on shapes where blocks outweigh everything else."""
    wide = dataclasses.replace(
        tiny.MODEL,
        decoder=dataclasses.replace(
            tiny.MODEL.decoder, width=64, depth=12, mlp=256, heads=4, kv_heads=4, head_dim=16
        ),
    )
    for remat in (False, True):
        model = dataclasses.replace(
            wide, decoder=dataclasses.replace(wide.decoder, remat=remat, dropout=0.0)
        )
        config, plan, mesh, abstract = planned(tiny.config(model))
        estimated = memory.needed(config, plan, mesh, abstract)["activations"]
        compiled = compile_step(config, plan, mesh, abstract)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        assert temporary / 3 < estimated < temporary * 3, (remat, temporary, estimated)


def compile_step(config, plan, mesh, abstract):
    from vlm_jax.training import objectives

    def loss(flat, batch):
        return objectives.losses(params.build(config.model, flat), batch, config)[0]

    return jax.jit(jax.grad(loss)).lower(abstract.trainable, tiny.batch(0)).compile()
