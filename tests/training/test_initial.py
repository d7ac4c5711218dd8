"""Runs that start from imported weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError
from vlm_jax.models import adapters, grids, params
from vlm_jax.models.vit import Vit
from vlm_jax.parallel import mesh, sharding
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.training import adaptation, initial
from vlm_jax.training import state as states
from vlm_jax.training import step as steps
from vlm_jax.weights import files, peft, store


def folder(path, model, dtype=np.float16) -> dict[str, np.ndarray]:
    """Writes a model's folder with random leaves; returns them."""
    rng = np.random.default_rng(0)
    shapes = params.abstract(model)
    leaves = {p: rng.normal(size=leaf.shape).astype(dtype) for p, leaf in shapes.items()}
    path.mkdir()
    files.write(path / store.PARAMETERS, leaves, lambda name: [leaves[name]])
    store.write_config(store.Stored(path, model, "llama", {}))
    return leaves


def test_parts_come_from_their_folders_and_frozen_ones_keep_their_dtype(tmp_path):
    config = tiny.config()
    leaves = folder(tmp_path / "tower", configs.Model(decoder=config.model.decoder))
    config = dataclasses.replace(
        config,
        init=(configs.Init(str(tmp_path / "tower"), "decoder"),),
        adaptation=(configs.Rule(r"decoder/stack/.*", mode="frozen"), configs.Rule(r".*")),
    )
    plan = adaptation.of(config)
    made = mesh.make(configs.Parallel(data=1, fsdp=2), jax.devices()[:2])
    state = states.create(config, plan, made)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), states.abstract(config, plan, made)
    )
    everything = {**state.frozen, **state.trainable}
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(everything[path], leaf)
        frozen = path.startswith("decoder/stack/")
        assert everything[path].dtype == (np.float16 if frozen else np.float32)
    drawn = states.create(dataclasses.replace(config, init=()), plan, made)
    np.testing.assert_array_equal(
        everything["encoder/stem/embed/kernel"], drawn.trainable["encoder/stem/embed/kernel"]
    )


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [("decoder", {"mlp": 7}, "presets are not those"), ("head", {}, "no part 'head'")],
)
def test_a_folder_of_another_model_is_refused(part, changes, message, tmp_path):
    config = tiny.config()
    other = dataclasses.replace(config.model.decoder, **changes)
    folder(tmp_path / "tower", configs.Model(decoder=other))
    config = dataclasses.replace(config, init=(configs.Init(str(tmp_path / "tower"), part),))
    plan = adaptation.of(config)
    with pytest.raises(ConfigError, match=message):
        states.create(config, plan, mesh.make(configs.Parallel(), jax.devices()[:1]))


def test_an_adapter_of_peft_goes_on_training(tmp_path):
    tower = configs.Model(decoder=tiny.MODEL.decoder)
    rules = (
        configs.Rule(r"decoder/.*", "dora", rank=2, alpha=3.0),
        configs.Rule(r".*", "frozen"),
    )
    base, adapter = str(tmp_path / "tower"), str(tmp_path / "adapter")
    config = tiny.config(adaptation=rules, init=(configs.Init(base, "decoder"),))
    leaves = folder(tmp_path / "tower", tower, np.float32)
    plan, rng = adaptation.of(config), np.random.default_rng(1)
    own = {
        path: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in plan.shapes.items()
        if adapters.is_leaf(path)
    }
    own |= {path: np.full_like(leaf, 1.5) for path, leaf in own.items() if path.endswith("_scale")}
    peft.write(tmp_path / "adapter", tower, "llama", leaves | own)
    both = (*config.init, configs.Init(adapter, "decoder"))
    mesh_ = mesh.make(configs.Parallel(data=1, fsdp=2), jax.devices()[:2])
    state = states.create(dataclasses.replace(config, init=both), plan, mesh_)
    for path, leaf in (leaves | own).items():
        np.testing.assert_array_equal(state.evaluated()[path], leaf)

    def refused(message, **changes):
        changed = dataclasses.replace(config, **{"init": both} | changes)
        with pytest.raises(ConfigError, match=message):
            states.abstract(changed, adaptation.of(changed), mesh_)

    refused("above it with the model that it adapts", init=both[1:])
    refused("adaptation makes .*rank", adaptation=(dataclasses.replace(rules[0], rank=3), rules[1]))
    refused("the adapter's alpha", adaptation=(dataclasses.replace(rules[0], alpha=4), rules[1]))


def test_added_tokens_train_while_the_table_that_they_extend_stays_frozen(tmp_path):
    leaves = folder(tmp_path / "tower", configs.Model(decoder=tiny.MODEL.decoder), np.float32)
    larger = dataclasses.replace(tiny.MODEL.decoder, added=3)
    config = tiny.config(
        dataclasses.replace(tiny.MODEL, decoder=larger),
        init=(configs.Init(str(tmp_path / "tower"), "decoder"),),
        adaptation=(configs.Rule(r"decoder/added_.*"), configs.Rule(r".*", mode="frozen")),
    )
    run = tiny.prepared(config)
    state = states.create(config, run.plan, run.mesh)
    before = np.array(state.trainable["decoder/added_embedding"])
    batch = tiny.batch(0)
    tokens = batch.tokens.copy()
    tokens[:, 1::3] = tiny.VOCAB + 1
    batch = batch._replace(tokens=tokens)
    for _ in range(3):
        state, _ = run.step(state, steps.place(batch, run.mesh))
    assert state.trainable.keys() == {"decoder/added_embedding"}
    assert not np.array_equal(before[1], state.trainable["decoder/added_embedding"][1])
    np.testing.assert_array_equal(state.frozen["decoder/embedding"], leaves["decoder/embedding"])


def grown(method="bicubic", **fields):
    """An encoder of 2 x 3 patches with a class token, and itself at 4 x 5."""
    small = dataclasses.replace(
        tiny.MODEL.encoder,
        image_size=(8, 12),
        class_token=True,
        position_resize=method,
        **fields,
    )
    return small, dataclasses.replace(small, image_size=(16, 20))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_positions_of_another_grid_are_what_the_encoder_would_read_from_the_old_table(
    tmp_path, dtype
):
    small, large = grown()
    towers = [configs.Model(extra_encoders=(e,), encoder=e) for e in (small, large)]
    leaves = folder(tmp_path / "tower", towers[0], dtype)
    config = dataclasses.replace(
        tiny.config(dataclasses.replace(tiny.MODEL, encoder=large, extra_encoders=(large,))),
        init=(configs.Init(str(tmp_path / "tower"), "extra_encoders/0", "encoder"),),
        adaptation=(configs.Rule("extra_encoders/.*", "frozen"), configs.Rule(".*")),
    )
    made = mesh.make(configs.Parallel(data=1, fsdp=2), jax.devices()[:2])
    places = sharding.named(made, adaptation.of(config).shapes, params.axes)
    assert initial.shapes(config)["extra_encoders/0/positions"].shape == (21, 16)
    found = initial.load(config, places)
    table = found.pop("extra_encoders/0/positions")
    assert (table.shape, table.dtype) == ((21, 16), dtype)
    assert table.sharding == places["extra_encoders/0/positions"]
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, leaves[path.replace("extra_encoders/0", "encoder")])
    old = leaves["encoder/positions"].astype(np.float32)
    read = Vit(dataclasses.replace(large, position_grid=(2, 3)), nnx.Rngs(0))
    read.positions[...] = jnp.asarray(old)
    wanted = np.concatenate([old[:1], read._positions(grids.all_places((4, 5)))[0]])
    np.testing.assert_allclose(
        table.astype(np.float32), wanted, atol=2e-3 if dtype == np.float16 else 1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mode", "antialias"),
    [
        ("bicubic", "bicubic", False),  # as `interpolate_pos_encoding` of transformers
        ("bicubic_antialias", "bicubic", True),
        ("bilinear_antialias", "bilinear", True),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_tables_of_positions_are_resized_as_torch_does(method, mode, antialias, backwards):
    import torch

    old, new = grown(method)[:: -1 if backwards else 1]
    table = np.random.default_rng(0).normal(size=(1 + old.patches, 16)).astype(np.float32)
    grid = torch.tensor(table[1:]).reshape(1, *old.grid, 16).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(
        grid, new.grid, mode=mode, antialias=antialias, align_corners=False
    )
    theirs = theirs.permute(0, 2, 3, 1).reshape(-1, 16).numpy()
    ours = initial.regridded(table, old, new)
    np.testing.assert_array_equal(ours[:1], table[:1])
    np.testing.assert_allclose(ours[1:], theirs, atol=2e-6)


def test_tables_that_differ_in_more_than_their_grid_are_refused(tmp_path):
    small, large = grown()
    folder(tmp_path / "tower", configs.Model(small))
    for changes in ({"class_token": False}, {"width": 32}):
        other = dataclasses.replace(large, **changes)
        config = tiny.config(
            dataclasses.replace(tiny.MODEL, encoder=other),
            init=(configs.Init(str(tmp_path / "tower"), "encoder"),),
        )
        with pytest.raises(ConfigError, match="presets are not those"):
            initial.shapes(config)


def test_gated_blocks_are_drawn_where_the_folder_has_none_and_read_where_it_has(tmp_path):
    blocks = CrossAttention(16, heads=2, kv_heads=2, head_dim=8, every=1)
    model = dataclasses.replace(tiny.MODEL, fusion=blocks)
    gates = "decoder/cross/stack/blocks/attention/query/kernel"
    made = mesh.make(configs.Parallel(), jax.devices()[:1])

    def started(name: str, source: configs.Model):
        leaves = folder(tmp_path / name, source, np.float32)
        init = (configs.Init(str(tmp_path / name), "decoder"),)
        config = tiny.config(model, init=init)
        return leaves, states.create(config, adaptation.of(config), made).trainable

    leaves, found = started("plain", configs.Model(decoder=model.decoder))
    assert gates in found and gates not in leaves
    np.testing.assert_array_equal(found["decoder/norm/scale"], leaves["decoder/norm/scale"])
    leaves, found = started("gated", model)
    np.testing.assert_array_equal(found[gates], leaves[gates])
