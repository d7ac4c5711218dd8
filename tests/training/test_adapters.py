"""Adapters in training: what trains, what it costs, and what they compute."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax import config as configs
from vlm_jax.config import Parallel, Rule
from vlm_jax.errors import ConfigError
from vlm_jax.models import adapters, params
from vlm_jax.models.layers import drop
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.decoders import decoder
from vlm_jax.training import adaptation, checkpoints, memory, objectives
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

# Every linear layer of the tower above adapted by DoRA, with dropout, a few below by LoRA.
RULES = (
    Rule(r"decoder/.*", "dora", rank=3, alpha=6.0, dropout=0.1),
    Rule(r"encoder/.*attention/.*", "lora", rank=2, alpha=5.0, rslora=True),
    Rule(r"connector/.*"),
    Rule(r".*", "frozen"),
)
ABOVE = (Rule(r"decoder/.*", "lora", rank=2, alpha=4.0), Rule(r".*", "frozen"))


def trained(config, count, devices=1, start=None):
    """Losses of some steps, and the state after them."""
    mesh, _, step, create = tiny.prepared(config, devices)
    state, losses = create() if start is None else start, []
    for number in range(int(state.step), count):
        state, metrics = step(state, steps.place(tiny.batch(number % 4), mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


@functools.cache
def on_one_device():
    return trained(tiny.config(adaptation=RULES, ema=0.9), 12)


def test_frozen_parameters_are_the_same_bits_after_a_hundred_steps():
    config = tiny.config(adaptation=RULES, ema=0.9)
    first = tiny.prepared(config).create()
    before = jax.tree.map(np.array, (first.frozen, first.trainable))
    _, state = trained(config, 100)
    frozen = jax.tree.map(
        lambda x, y: x.tobytes() == np.asarray(y).tobytes(), before[0], state.frozen
    )
    assert all(frozen.values()) and len(frozen) == len(before[0])
    for path, leaf in state.trainable.items():
        assert not np.array_equal(leaf, before[1][path]), path
    assert any(path.endswith("query/kernel") for path in state.frozen)


def test_the_optimizer_keeps_twice_the_bytes_of_what_trains():
    config = tiny.config(adaptation=RULES)
    state = tiny.prepared(config).create()
    moments = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.ndim or leaf.size > 1]
    trains = sum(4 * leaf.size for leaf in state.trainable.values())
    assert sum(leaf.nbytes for leaf in moments) == 2 * trains
    assert sum(states.kept_bytes(state).values()) == 2 * trains


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(Parallel(data=1, fsdp=4), marks=pytest.mark.slow),
        Parallel(data=1, fsdp=2, tensor=2),
    ],
)
def test_losses_do_not_depend_on_the_mesh(parallel):
    config = tiny.config(adaptation=RULES, ema=0.9, parallel=parallel)
    losses, state = trained(config, 12, devices=4)
    np.testing.assert_allclose(losses, on_one_device()[0], rtol=1e-5)
    spread = [leaf for leaf in state.trainable.values() if not leaf.sharding.is_fully_replicated]
    assert any(adapters.is_leaf(path) for path in state.trainable) and len(spread) > 4


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    config = tiny.config(adaptation=RULES, ema=0.9)
    mesh, plan, _, _ = tiny.prepared(config)
    _, half = trained(config, 6)
    with checkpoints.Checkpoints(tmp_path, config) as saved:
        saved.save(6, half, tiny.Stream())
    with checkpoints.Checkpoints(tmp_path, config) as saved:
        restored = saved.restore(states.abstract(config, plan, mesh), tiny.Stream())
    again, state = trained(config, 12, start=restored)
    losses, unbroken = on_one_device()
    assert again == losses[6:]
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), state.evaluated(), unbroken.evaluated())
    assert all(same.values())


def test_evaluation_sees_the_adapters_and_merging_changes_nothing():
    _, state = on_one_device()
    flat, batch = state.evaluated(), tiny.batch(9)

    @jax.jit
    def loss(flat):
        return objectives.losses(params.build(tiny.MODEL, flat), batch, tiny.config())[0]

    merged = adapters.merged(flat)
    assert merged.keys() == params.abstract(tiny.MODEL).keys()
    np.testing.assert_allclose(loss(merged), loss(flat), rtol=1e-5)
    plain = {path: leaf for path, leaf in flat.items() if not adapters.is_leaf(path)}
    assert abs(loss(plain) - loss(flat)) > 1e-4


def test_fresh_adapters_change_nothing():
    config = tiny.config(adaptation=RULES)
    state = tiny.prepared(config).create()
    plain = tiny.prepared(tiny.config()).create().trainable
    for path, leaf in adapters.merged(state.evaluated()).items():
        np.testing.assert_allclose(leaf, plain[path], rtol=1e-6)


@pytest.mark.slow
def test_muon_leaves_adapters_to_adamw():
    config = tiny.config(adaptation=RULES, optimizer="muon", adam_lr=1e-3)
    losses, state = trained(config, 12)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    kept = states.kept_bytes(state)
    lora = [path for path in kept if adapters.is_leaf(path)]
    assert all(kept[path] == 8 * state.trainable[path].size for path in lora)  # two moments
    assert kept["connector/embed/kernel"] == 4 * state.trainable["connector/embed/kernel"].size


def test_dropout_is_of_what_goes_into_the_adapter_alone():
    """The equations of peft's layers: its DoRA rescales what was dropped from, not the whole."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, kernel, a, b = draw(5, 7), draw(7, 3, 2), draw(7, 2), draw(2, 6)
    w, scale, magnitude, key = kernel.reshape(7, 6), 1.5, jnp.abs(draw(6)), jax.random.key(3)
    leaves = {adapters.A: a, adapters.B: b, adapters.SCALE: jnp.float32(scale)}
    dropped = drop(x, 0.5, key)
    assert (dropped == 0).any() and (dropped != 0).any()
    found = adapters.Lora(leaves, 0.5, key)(x, kernel, x @ w)
    np.testing.assert_allclose(found, x @ w + scale * dropped @ a @ b, rtol=1e-4, atol=1e-5)
    whole = w + scale * a @ b
    factor = magnitude / jnp.linalg.norm(whole, axis=0)
    found = adapters.Lora(leaves | {adapters.MAGNITUDE: magnitude}, 0.5, key)(x, kernel, x @ w)
    wanted = x @ w + (factor - 1) * (dropped @ w) + factor * (scale * dropped @ a @ b)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    still = adapters.Lora(leaves | {adapters.MAGNITUDE: magnitude}, 0.5)(x, kernel, x @ w)
    np.testing.assert_allclose(still, x @ (whole * factor), rtol=1e-4, atol=1e-5)


def test_each_layer_drops_other_numbers():
    model = tiny.MODEL
    plan = adaptation.of(tiny.config(adaptation=RULES))
    flat = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in plan.shapes.items()}
    vlm = params.build(model, flat, plan.dropout, jax.random.key(0))
    blocks = vlm.decoder.stack.blocks
    keys = [blocks.attention.query.adapter.key[...], blocks.mlp.up.adapter.key[...]]
    data = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == 2 * model.decoder.depth
    assert vlm.encoder.stack.blocks.attention.query.adapter.key is None  # no dropout there


def compiled(config):
    """The step of a config, compiled for one device."""
    mesh = meshes.make(config.parallel, jax.devices()[:1])
    plan = adaptation.of(config)
    abstract = states.abstract(config, plan, mesh)
    run = functools.partial(steps._step, config, plan, steps.optimizer.make(config.train, plan))
    return jax.jit(run).lower(abstract, tiny.batch(0)).compile()


def flops(config) -> float:
    return compiled(config).cost_analysis()["flops"]


@pytest.mark.slow
def test_a_frozen_tower_below_all_training_costs_no_backward_pass():
    """What a deeper encoder adds to a step, in FLOPs: forward alone, or three times that."""

    def added(adaptation):
        costs = []
        for depth in (2, 6):
            encoder = dataclasses.replace(tiny.MODEL.encoder, depth=depth, remat=False)
            model = dataclasses.replace(tiny.MODEL, encoder=encoder)
            costs.append(flops(tiny.config(model, adaptation=adaptation)))
        return costs[1] - costs[0]

    forward = added(ABOVE)
    below = (Rule(r"encoder/stem/.*"), *ABOVE)  # something trains below: gradients must flow
    assert 1.6 * forward < added(below)
    assert 2.2 * forward < added((Rule(".*"),))


@pytest.mark.slow
def test_no_gradient_as_large_as_a_kernel_is_made():
    """In the compiled step a stack's frozen kernels are handed on and copied out, nothing else."""
    wide = dataclasses.replace(tiny.MODEL.decoder, width=24, mlp=56, depth=12, heads=4, kv_heads=4)
    model = dataclasses.replace(tiny.MODEL, decoder=wide)
    shapes = {
        f"f32[{','.join(map(str, leaf.shape))}]"
        for path, leaf in params.abstract(model).items()
        if path.startswith("decoder/stack/") and path.endswith("kernel")
    }
    made = {}
    for name, rules in {"lora": ABOVE, "full": (Rule(".*"),)}.items():
        text = compiled(tiny.config(model, adaptation=rules)).as_text()
        found = re.findall(r"= (f32\[[\d,]+\])\S* ([\w-]+)\(", text)
        made[name] = {operation for shape, operation in found if shape in shapes}
    assert made["lora"] <= {"parameter", "get-tuple-element", "copy", "bitcast"}
    assert {"dynamic-update-slice", "multiply", "sqrt"} <= made["full"]  # gradients, moments


def test_lora_of_a_135m_decoder_holds_under_a_twentieth_of_gradients_and_state():
    model = configs.Model(
        tiny.MODEL.encoder, dataclasses.replace(tiny.MODEL.connector), decoder("smollm2-135m")
    )
    rest = Rule("(encoder|connector)/.*", "frozen")
    every = Rule(r"decoder/stack/.*", "lora", rank=16, alpha=32.0)

    def held(*rules):
        config = tiny.config(model, adaptation=rules)
        mesh, plan = meshes.make(config.parallel, jax.devices()[:1]), adaptation.of(config)
        parts = memory.needed(config, plan, mesh, states.abstract(config, plan, mesh))
        return parts["gradients"] + parts["optimizer"]

    assert held(rest, every, Rule(".*", "frozen")) < 0.05 * held(rest, Rule(".*"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(r"decoder/.*bias", "lora", rank=2, alpha=2.0), "matches no kernel of a linear layer"),
        (Rule(r"decoder/embedding", "dora", rank=2, alpha=2.0), "matches no kernel of a linear"),
        (Rule(r"nowhere/.*", "lora", rank=2, alpha=2.0), "paths look like '.*kernel'"),
    ],
)
def test_a_rule_that_matches_no_kernel_is_refused(rule, message):
    with pytest.raises(ConfigError, match=message) as refused:
        adaptation.of(tiny.config(adaptation=(rule, Rule(".*"))))
    assert refused.value.exit_code == 78


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(".*", "qlora"), "mode is 'qlora'; expected one of full, frozen, lora, dora, bottle"),
        (Rule(".*", "bottleneck", rank=2, alpha=2.0), "alpha is 2.0; expected 0: the rule is bot"),
        (Rule(".*", "bottleneck"), "rank is 0; expected at least 1"),
        (Rule(".*", "lora", alpha=2.0), "rank is 0; expected at least 1"),
        (Rule(".*", "lora", rank=2), "alpha is 0.0; expected more than 0"),
        (Rule(".*", "dora", rank=2, alpha=2.0, dropout=1.0), "dropout is 1.0"),
        (Rule(".*", rank=2), "rank is 2; expected 0: the rule is full"),
        (Rule(".*", "frozen", dropout=0.1), "dropout is 0.1; expected 0: the rule is frozen"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(rule, message):
    with pytest.raises(ConfigError, match=message):
        configs.check(tiny.config(adaptation=(rule,)))


def test_adapters_lie_where_their_kernels_do():
    rules = (Rule(".*", "dora", rank=2, alpha=2.0), Rule(".*", "frozen"))
    plan = adaptation.of(tiny.config(adaptation=rules))
    for path, leaf in plan.shapes.items():
        assert len(params.axes(path)) == len(leaf.shape), path
    block = "decoder/stack/blocks/"
    assert params.axes(f"{block}attention/query/lora_b") == ("layers", None, "heads")
    assert params.axes(f"{block}attention/out/lora_a") == ("layers", "heads", None)
    assert params.axes(f"{block}mlp/down/magnitude") == ("layers", "embed")
    assert params.axes("encoder/stem/embed/lora_b") == (None, "embed")


# Houlsby's places: what comes out of attention and of the feed-forward part.
HOULSBY = (
    Rule(r"(encoder|decoder)/.*(attention/out|mlp/down)/kernel", "bottleneck", rank=3),
    Rule(r".*", "frozen"),
)


def test_bottlenecks_follow_their_layers_and_start_near_nothing():
    config = tiny.config(adaptation=HOULSBY)
    state = tiny.prepared(config).create()
    path = "decoder/stack/blocks/mlp/down/"
    leaves = {name: state.trainable[path + name] for name in adapters.BOTTLENECK}
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        adapters.DOWN: (2, 16, 3),
        adapters.DOWN_BIAS: (2, 3),
        adapters.UP: (2, 3, 16),
        adapters.UP_BIAS: (2, 16),
    }
    rng = np.random.default_rng(0)
    drawn = {name: jnp.asarray(rng.normal(size=leaf.shape[1:])) for name, leaf in leaves.items()}
    y = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    inner = jax.nn.gelu(y @ drawn[adapters.DOWN] + drawn[adapters.DOWN_BIAS], approximate=False)
    wanted = y + inner @ drawn[adapters.UP] + drawn[adapters.UP_BIAS]
    np.testing.assert_allclose(adapters.Bottleneck(drawn)(y), wanted, rtol=1e-5, atol=1e-5)
    start = adapters.Bottleneck({name: leaf[0] for name, leaf in leaves.items()})(y)
    assert 0 < np.abs(start - y).max() < 1e-4
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapters.merged(state.evaluated())


@pytest.mark.slow
def test_bottlenecks_train_alone_and_alike_on_any_mesh():
    one, first = trained(tiny.config(adaptation=HOULSBY), 8)
    four, _ = trained(tiny.config(adaptation=HOULSBY, parallel=Parallel(data=2, tensor=2)), 8, 4)
    np.testing.assert_allclose(one, four, rtol=1e-5)
    start = tiny.prepared(tiny.config(adaptation=HOULSBY)).create()
    assert all(path.rpartition("/")[2] in adapters.BOTTLENECK for path in first.trainable)
    for path, leaf in first.trainable.items():
        assert not np.array_equal(leaf, start.trainable[path]), path
    for path, leaf in first.frozen.items():
        assert np.array_equal(leaf, start.frozen[path])
