"""Checkpoints: what is saved comes back, wherever it is put and whatever happened meanwhile."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.config import Checkpoint, Eval, Parallel, Rule, Tracking
from vlm_jax.errors import ConfigError, StorageError
from vlm_jax.models import params
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import adaptation, checkpoints
from vlm_jax.training import state as states

RULES = (Rule("encoder/.*", mode="frozen"), Rule(".*"))
CONFIG = tiny.config(adaptation=RULES, ema=0.9, checkpoint=Checkpoint(keep=2))


def abstract_of(config, devices=1):
    mesh = meshes.make(config.parallel, jax.devices()[:devices])
    plan = adaptation.of(config)
    return states.abstract(config, plan, mesh)


@pytest.fixture(scope="module")
def abstract():
    return abstract_of(CONFIG)


def filled(abstract, seed):
    """A state of random numbers; every leaf differs, the average from the parameters too."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        values = np.asarray(rng.normal(size=leaf.shape) * 100).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    state = jax.tree.map(fill, abstract)
    return dataclasses.replace(state, step=jax.device_put(jnp.int32(seed), abstract.step.sharding))


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def stream_at(step):
    stream = tiny.Stream()
    stream.next = step
    return stream


def save(workdir, abstract, *steps, config=CONFIG):
    with checkpoints.Checkpoints(workdir, config) as saved:
        for step in steps:
            saved.save(step, filled(abstract, step), stream_at(step))


def test_state_and_data_position_come_back_bit_for_bit(tmp_path, abstract):
    save(tmp_path, abstract, 3, 7)
    stream = tiny.Stream()
    with checkpoints.Checkpoints(tmp_path, CONFIG) as saved:
        state = saved.restore(abstract, stream)
    assert same(state, filled(abstract, 7)) and int(state.step) == 7 == stream.next
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [
        leaf.dtype for leaf in jax.tree.leaves(abstract)
    ]


def test_the_state_of_muon_comes_back(tmp_path):
    config = tiny.config(optimizer="muon")
    abstract = abstract_of(config)
    save(tmp_path, abstract, 3, config=config)
    with checkpoints.Checkpoints(tmp_path, config) as saved:
        state = saved.restore(abstract, tiny.Stream())
    assert same(state, filled(abstract, 3))
    assert jax.tree.structure(state) == jax.tree.structure(abstract)


def test_an_empty_workdir_has_nothing_to_restore(tmp_path, abstract):
    with checkpoints.Checkpoints(tmp_path, CONFIG) as saved:
        assert saved.restore(abstract, tiny.Stream()) is None


def test_a_save_does_not_see_what_the_next_steps_do_to_the_buffers(tmp_path):
    config = tiny.config(model=dataclasses.replace(tiny.MODEL))
    abstract = abstract_of(config)
    state, wanted = filled(abstract, 0), filled(abstract, 0)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with checkpoints.Checkpoints(tmp_path, config) as saved:
        saved.save(1, state, stream_at(1))
        for _ in range(5):
            state = overwrite(state)
    with checkpoints.Checkpoints(tmp_path, config) as saved:
        assert same(saved.restore(abstract, tiny.Stream()), wanted)


def test_the_last_ones_are_kept(tmp_path, abstract):
    save(tmp_path, abstract, 1, 2, 3, 4)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"3", "4"}


def test_a_half_written_checkpoint_is_cleaned_up_and_the_one_before_it_restored(tmp_path, abstract):
    save(tmp_path, abstract, 3)
    half = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp-123"
    (half / "trainable").mkdir(parents=True)
    (half / "trainable" / "data").write_bytes(b"half")
    with checkpoints.Checkpoints(tmp_path, CONFIG) as saved:
        assert int(saved.restore(abstract, tiny.Stream()).step) == 3
    assert not half.exists()


def damage(workdir, step):
    """Truncates every data file of a checkpoint."""
    files = [f for f in (workdir / "checkpoints" / str(step)).rglob("d/*") if f.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:10])


def test_an_unreadable_checkpoint_is_put_aside_for_the_one_before_it(tmp_path, abstract):
    save(tmp_path, abstract, 3, 5)
    damage(tmp_path, 5)
    stream = tiny.Stream()
    with checkpoints.Checkpoints(tmp_path, CONFIG) as saved:
        assert same(saved.restore(abstract, stream), filled(abstract, 3)) and stream.next == 3
        saved.save(5, filled(abstract, 6), stream_at(5))
    assert (tmp_path / "unreadable" / "5").is_dir()
    with checkpoints.Checkpoints(tmp_path, CONFIG) as saved:
        assert same(saved.restore(abstract, stream), filled(abstract, 6)) and stream.next == 5


def test_without_a_readable_checkpoint_the_run_is_refused_and_nothing_is_moved(tmp_path, abstract):
    save(tmp_path, abstract, 3)
    damage(tmp_path, 3)
    with checkpoints.Checkpoints(tmp_path, CONFIG) as saved:
        with pytest.raises(StorageError, match=r"none of the checkpoints \[3\]"):
            saved.restore(abstract, tiny.Stream())
    assert (tmp_path / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize("parallel", [Parallel(1, 8, 1), Parallel(2, 2, 2)])
def test_a_checkpoint_moves_to_another_mesh(tmp_path, abstract, parallel):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    save(tmp_path, abstract, 3)
    config = dataclasses.replace(CONFIG, parallel=parallel)
    spread = abstract_of(config, 8)
    with checkpoints.Checkpoints(tmp_path, config) as saved:
        state = saved.restore(spread, tiny.Stream())
    assert same(state, filled(abstract, 3))
    assert states.shardings(state) == states.shardings(spread)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(CONFIG, seed=1), r"config\.seed was 0 and is 1"),
        (
            tiny.config(adaptation=RULES, ema=0.9, lr=1.0),
            r"config\.train\.lr was 0\.003 and is 1\.0",
        ),
        (
            tiny.config(adaptation=RULES, ema=0.9, steps=21),
            r"config\.train\.steps was 20 and is 21",
        ),
        (tiny.config(ema=0.9), r"config\.adaptation was \[\{'pattern': 'encoder/"),
        (
            tiny.config(adaptation=RULES, ema=0.9, data={"pool": 3}),
            r"config\.data\.pool was 64 and is 3",
        ),
    ],
)
def test_another_config_is_refused_by_name_and_value(tmp_path, abstract, config, message):
    with pytest.raises(ConfigError, match=message):
        checkpoints.refuse_other_config(checkpoints.as_json(CONFIG), config, tmp_path)


def test_what_does_not_change_the_result_may_change(tmp_path):
    free = tiny.config(
        adaptation=RULES,
        ema=0.9,
        log_every=77,
        data={"threads": 9, "bad_samples": 0.5},
        checkpoint=Checkpoint(every=3),
        eval=Eval(every=3),
        tracking=Tracking(tensorboard=False),
        parallel=Parallel(1, 8, 1),
    )
    checkpoints.refuse_other_config(checkpoints.as_json(CONFIG), free, tmp_path)


def test_restore_checks_the_config_of_the_checkpoint(tmp_path, abstract):
    save(tmp_path, abstract, 3)
    other = dataclasses.replace(CONFIG, seed=5)
    with checkpoints.Checkpoints(tmp_path, other) as saved:
        with pytest.raises(ConfigError, match=r"config\.seed was 0 and is 5"):
            saved.restore(abstract, tiny.Stream())


def test_inference_gets_the_average_and_the_frozen_parameters(tmp_path, abstract):
    save(tmp_path, abstract, 3, 5)
    config, flat = checkpoints.load_params(tmp_path)
    assert config == CONFIG
    assert flat.keys() == params.abstract(CONFIG.model).keys()
    assert same(flat, filled(abstract, 5).evaluated())
    assert same(checkpoints.load_params(tmp_path, 3)[1], filled(abstract, 3).evaluated())
    assert {leaf.sharding.num_devices for leaf in flat.values()} == {1}


def test_inference_without_an_average_gets_the_last_weights(tmp_path):
    config = tiny.config()
    abstract = abstract_of(config)
    save(tmp_path, abstract, 2, config=config)
    assert same(checkpoints.load_params(tmp_path)[1], filled(abstract, 2).trainable)


def test_missing_checkpoints_are_named(tmp_path, abstract):
    with pytest.raises(StorageError, match="is not a run's folder"):
        checkpoints.load_params(tmp_path)
    save(tmp_path, abstract, 3)
    with pytest.raises(StorageError, match=r"no checkpoint of step 9; it has \[3\]"):
        checkpoints.load_params(tmp_path, 9)


def test_config_json_is_plain_data_that_resolves_to_the_config(tmp_path):
    from vlm_jax.config import resolve

    checkpoints.write_config(tmp_path, CONFIG)
    assert resolve(json.loads((tmp_path / "config.json").read_text())) == CONFIG
