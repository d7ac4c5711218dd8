"""Runs over kernels in few bits and with prefixes: what is held, resumed, refused and exported."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax import config as configs
from vlm_jax import convert
from vlm_jax.config import Init, Model, Parallel, Rule
from vlm_jax.errors import ConfigError
from vlm_jax.models import adapters, params, prefixes, quantised
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.decoders import decoder
from vlm_jax.training import adaptation, checkpoints, objectives
from vlm_jax.training import state as states
from vlm_jax.training import step as steps
from vlm_jax.weights import files, peft, store

LORA = {"rank": 2, "alpha": 4.0}
# Each way of holding a kernel and each adapter over it, and a prefix that a network makes.
RULES = (
    Rule(r"decoder/.*mlp/.*", "dora", dropout=0.1, base="nf4", **LORA),
    Rule(r"decoder/.*attention/key/.*", "prefix", rank=3, hidden=5, base="nf4"),
    Rule(r"decoder/.*", "lora", base="nf4", **LORA),
    Rule(r"encoder/.*", "frozen", base="int8"),
    Rule(r"connector/.*"),
    Rule(r".*", "frozen"),
)


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
    return trained(tiny.config(adaptation=RULES), 8)


def test_codes_stay_and_adapters_learn():
    first, (_, state) = tiny.prepared(tiny.config(adaptation=RULES)).create(), on_one_device()
    for path, leaf in first.frozen.items():
        assert leaf.dtype == state.frozen[path].dtype
        assert np.array_equal(leaf, state.frozen[path]), path
    for path, leaf in first.trainable.items():
        assert not np.array_equal(leaf, state.trainable[path]), path
    assert not any(path.endswith("kernel") for path in state.frozen if "decoder/" in path)
    names = {path.rpartition("/")[2] for path in state.trainable}
    assert {*prefixes.MADE, adapters.A, adapters.MAGNITUDE} <= names


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    config = tiny.config(adaptation=RULES)
    mesh, plan, _, _ = tiny.prepared(config)
    _, half = trained(config, 4)
    with checkpoints.Checkpoints(tmp_path, config) as saved:
        saved.save(4, half, tiny.Stream())
    with checkpoints.Checkpoints(tmp_path, config) as saved:
        restored = saved.restore(states.abstract(config, plan, mesh), tiny.Stream())
    again, state = trained(config, 8, start=restored)
    losses, unbroken = on_one_device()
    assert again == losses[4:]
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), state.evaluated(), unbroken.evaluated())
    assert all(same.values())


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh():
    config = tiny.config(adaptation=RULES, parallel=Parallel(data=1, fsdp=2, tensor=2))
    losses, state = trained(config, 8, devices=4)
    np.testing.assert_allclose(losses, on_one_device()[0], rtol=1e-5)
    codes = state.frozen["decoder/stack/blocks/mlp/up/kernel_codes"]
    assert codes.addressable_shards[0].data.size == codes.size // 4


def test_magnitudes_start_as_lengths_of_what_is_held():
    state = tiny.prepared(tiny.config(adaptation=RULES)).create()
    flat = params.restored(tiny.MODEL, state.frozen)
    path = "decoder/stack/blocks/mlp/up/"
    lengths = jnp.linalg.norm(flat[path + "kernel"], axis=-2)
    np.testing.assert_allclose(state.trainable[path + adapters.MAGNITUDE], lengths, rtol=1e-5)


def test_merged_kernels_do_what_codes_and_adapters_did():
    state, batch = on_one_device()[1], tiny.batch(9)
    rng = np.random.default_rng(0)
    flat = {
        path: 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
        if path.endswith(adapters.B)
        else leaf
        for path, leaf in state.evaluated().items()
        if path.rpartition("/")[2] not in prefixes.LEAVES
    }

    @jax.jit
    def loss(flat):
        return objectives.losses(params.build(tiny.MODEL, flat), batch, tiny.config())[0]

    restored = params.restored(tiny.MODEL, flat)
    merged = adapters.merged(restored)
    assert merged.keys() == params.abstract(tiny.MODEL).keys()
    np.testing.assert_allclose(loss(merged), loss(flat), rtol=1e-5)
    plain = {path: leaf for path, leaf in restored.items() if not adapters.is_leaf(path)}
    assert abs(loss(plain) - loss(flat)) > 1e-3
    assert params.count(tiny.MODEL, plain) == params.count(
        tiny.MODEL, {path: leaf for path, leaf in flat.items() if not adapters.is_leaf(path)}
    )


def test_export_says_that_kernels_were_held_in_few_bits(capsys, tmp_path):
    flat = dict(on_one_device()[1].evaluated())
    stored = convert._restored(store.Stored(tmp_path, tiny.MODEL, "llama", {}, flat))
    held = quantised.kernels(flat)
    assert f"{len(held)} kernels were held in few bits" in capsys.readouterr().out
    assert set(held) <= stored.trained.keys() and not quantised.kernels(stored.trained)
    assert convert._restored(stored) is stored


def test_a_7b_decoder_takes_four_and_a_half_bits_a_weight():
    model = Model(tiny.MODEL.encoder, tiny.MODEL.connector, decoder("llama2-7b"))
    held = Rule(r"decoder/.*", "lora", rank=16, alpha=32.0, base="nf4")
    config = tiny.config(model, adaptation=(held, Rule(".*", "frozen")))
    plan = adaptation.of(config)
    state = states.abstract(config, plan, meshes.make(config.parallel, jax.devices()[:1]))
    first, *_ = adaptation.groups(plan, 1e-3, {}, states.own_bytes(state))
    weights = first.parameters - first.trained - 32 * 7 - 1  # but for the scales of adapters
    assert weights == sum(held.kernel.size for held in plan.held.values()) > 6.4e9
    assert 4.5 <= 8 * (first.bytes - 4 * first.trained) / weights < 4.50001
    assert first.base == "nf4"


def folder(path, leaves):
    """A model's folder with these leaves of the decoder."""
    path.mkdir()
    files.write(path / store.PARAMETERS, leaves, lambda name: [leaves[name]])
    store.write_config(store.Stored(path, Model(decoder=tiny.MODEL.decoder), "llama", {}))
    return Init(str(path), "decoder")


def random(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = params.abstract(Model(decoder=tiny.MODEL.decoder))
    return {path: rng.normal(size=leaf.shape).astype("bfloat16") for path, leaf in shapes.items()}


def test_folders_of_weights_and_of_a_prefix_are_where_runs_start_from(tmp_path):
    rules = (
        Rule(r"decoder/.*mlp/.*", "frozen", base="nf4"),
        Rule(r"decoder/.*", "prefix", rank=3, base="int8"),
        Rule(".*", "frozen"),
    )
    plan, rng = adaptation.of(tiny.config(adaptation=rules)), np.random.default_rng(1)
    own = {path: rng.normal(size=plan.shapes[path].shape).astype(np.float32) for path in plan.lr}
    tower, base = Model(decoder=tiny.MODEL.decoder), random()
    peft.write(tmp_path / "prefix", tower, "llama", base | own)
    inits = folder(tmp_path / "base", base), Init(str(tmp_path / "prefix"), "decoder")
    config = tiny.config(adaptation=rules, init=inits)
    mesh = meshes.make(config.parallel, jax.devices()[:1])
    state = states.create(config, plan, mesh)
    assert state.trainable.keys() == own.keys()
    for path, leaf in own.items():
        np.testing.assert_array_equal(state.trainable[path], leaf)
    assert len(quantised.kernels(state.frozen)) == 4
    for path, held in plan.held.items():
        for place, leaf in held.hold(path, jnp.asarray(base[path])).items():
            np.testing.assert_array_equal(state.frozen[place], leaf)

    other = (rules[0], dataclasses.replace(rules[1], rank=4), rules[2])
    other = dataclasses.replace(config, adaptation=other)
    with pytest.raises(ConfigError, match="rank"):
        states.abstract(other, adaptation.of(other), mesh)
    with pytest.raises(ConfigError, match="a prefix adapter, which cannot be merged"):
        adapters.merged(base | own)
    with pytest.raises(ConfigError, match="norm/scale was trained beside a prefix"):
        peft.write(tmp_path / "no", tower, "llama", base | own, ["decoder/norm/scale"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(".*", base="nf4"), "base is 'nf4'; expected float: the rule is full"),
        (Rule(".*", "lora", base="fp4", **LORA), "base is 'fp4'; expected one of float, nf4, int8"),
        (Rule(".*", "prefix"), "rank is 0; expected at least 1"),
        (Rule(".*", "prefix", rank=2, alpha=1.0), "alpha is 1.0; expected 0: the rule is prefix"),
        (Rule(".*", "prefix", rank=2, hidden=-1), "hidden is -1; expected at least 0"),
        (Rule(".*", "lora", hidden=3, **LORA), "hidden is 3; expected 0: the rule is lora"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(rule, message):
    with pytest.raises(ConfigError, match=message):
        configs.check(tiny.config(adaptation=(rule,)))


PREFIX = Rule(r"decoder/.*", "prefix", rank=3)
LEARNED = {"position": "learned", "positions": tiny.TOKENS + 2}


@pytest.mark.parametrize(
    ("fields", "rule", "message"),
    [
        ({}, dataclasses.replace(PREFIX, pattern="connector/.*"), "no kernel of the keys of an"),
        ({}, Rule("decoder/norm.*", "frozen", base="int8"), "no kernel of a linear layer"),
        ({"window": 4, "pattern": ("local",)}, PREFIX, "a decoder with a sliding window"),
        ({"position": "alibi"}, PREFIX, r"linear biases \(ALiBi\)"),
        (
            LEARNED,
            PREFIX,
            "positions is 26; with a prefix of 3 expected at least 0 more than the 27",
        ),
    ],
)
def test_what_cannot_have_a_prefix_or_few_bits_is_refused(fields, rule, message):
    model = dataclasses.replace(
        tiny.MODEL, decoder=dataclasses.replace(tiny.MODEL.decoder, **fields)
    )
    with pytest.raises(ConfigError, match=message) as refused:
        adaptation.of(tiny.config(model, adaptation=(rule, Rule(".*"))))
    assert refused.value.exit_code == 78
