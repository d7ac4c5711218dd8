"""The door `python -m vlm_jax.convert`."""

import dataclasses
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from vlm_jax import config as configs
from vlm_jax import convert
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.training import adaptation, checkpoints
from vlm_jax.training import state as states
from vlm_jax.weights import files, store

ROOT = pathlib.Path(__file__).parents[1]
DECODER = Decoder(31, 12, 2, 20, 3, 1, 4)


@pytest.fixture(autouse=True)
def parsed():
    flags.FLAGS.mark_as_parsed()


def leaves(model: configs.Model, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = params.abstract(model)
    return {p: rng.normal(size=s.shape).astype(np.float32) for p, s in shapes.items()}


def write_model(path: pathlib.Path, seed: int = 0) -> store.Stored:
    """A Llama's folder with random leaves."""
    stored = store.Stored(path, configs.Model(decoder=DECODER), "llama", {"eos_token_id": 2})
    arrays = leaves(stored.model, seed)
    path.mkdir()
    files.write(path / store.PARAMETERS, arrays, lambda name: [arrays[name]])
    store.write_config(stored)
    return stored


def test_import_export_and_check_follow_each_other(tmp_path, capsys):
    write_model(tmp_path / "model")
    convert.main(["convert", "export", str(tmp_path / "model"), str(tmp_path / "hf")])
    convert.main(["convert", "import", str(tmp_path / "hf"), str(tmp_path / "again")])
    first, second = (tmp_path / name / store.PARAMETERS for name in ("model", "again"))
    assert first.read_bytes() == second.read_bytes()
    np.savez(tmp_path / "in.npz", input_ids=np.array([[3, 4, 5]]))
    words = [str(tmp_path / name) for name in ("again", "in.npz", "out.npz")]
    convert.main(["convert", "check", *words])
    assert np.load(tmp_path / "out.npz")["logits"].shape == (1, 3, 31)
    count = sum(leaf.size for leaf in leaves(configs.Model(decoder=DECODER), 0).values())
    assert f"llama, {count:,} parameters" in capsys.readouterr().out


def test_a_trained_run_goes_out_to_the_family_it_came_from(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    config = configs.Config(
        name="x",
        model=configs.Model(
            Encoder(8, 1, 8, 2, patch=4, image_size=8), Connector("linear"), DECODER
        ),
        data=configs.Data({"emoji:caption": 1.0}),
        init=(configs.Init(str(tmp_path / "model")),),
    )
    trained = leaves(config.model, 1)
    monkeypatch.setattr(checkpoints, "load_params", lambda workdir: (config, trained))
    with pytest.raises(ConfigError, match="no place for connector"):
        convert.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "hf")])
    config = dataclasses.replace(config, model=configs.Model(decoder=DECODER))
    trained = leaves(config.model, 1)
    convert.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "hf")])
    exported = files.Folder(tmp_path / "hf")
    np.testing.assert_array_equal(
        exported.read("model.embed_tokens.weight"), trained["decoder/embedding"]
    )
    assert exported.config["eos_token_id"] == 2


def test_a_run_in_stages_goes_out_to_the_family_that_its_first_stage_came_from(
    tmp_path, monkeypatch
):
    """Its outer folder stands for the last stage that has ended."""
    stored = write_model(tmp_path / "model")
    first = configs.Config(
        name="x-one",
        model=stored.model,
        data=configs.Data({"emoji:caption": 1.0}, images=False),
        init=(configs.Init(str(tmp_path / "model")),),
    )
    run = tmp_path / "run"
    second = dataclasses.replace(first, name="x-two", init=(configs.Init(str(run / "1-one")),))
    whole = dataclasses.replace(first, stages=(configs.Stage("one"), configs.Stage("two")))
    checkpoints.write_config(run, whole)
    trained = {}
    for seed, (name, config) in enumerate({"1-one": first, "2-two": second}.items(), 1):
        mesh = meshes.make(configs.Parallel(), jax.devices()[:1])
        state = states.create(dataclasses.replace(config, init=()), adaptation.of(config), mesh)
        trained[name] = leaves(stored.model, seed)
        state = dataclasses.replace(state, trainable=jax.tree.map(jnp.asarray, trained[name]))
        with checkpoints.Checkpoints(run / name, config) as saved:
            saved.save(1, state, types.SimpleNamespace(get_state=dict))
        (run / name / "report.html").write_text("")
    convert.main(["convert", "export", str(run), str(tmp_path / "hf")])
    exported = files.Folder(tmp_path / "hf")
    assert exported.config["eos_token_id"] == 2
    np.testing.assert_array_equal(
        exported.read("model.embed_tokens.weight"), trained["2-two"]["decoder/embedding"]
    )


def test_a_run_that_began_at_random_names_its_family(tmp_path, monkeypatch):
    config = configs.Config("x", configs.Model(decoder=DECODER), configs.Data({"a": 1.0}))
    found = (config, leaves(config.model, 1))
    monkeypatch.setattr(checkpoints, "load_params", lambda workdir: found)
    with pytest.raises(ConfigError, match="--family"):
        convert.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "hf")])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["impart", "a", "b"],
            78,
            "unknown command 'impart'; expected import, export, adapter, check",
        ),
        (["import", "a"], 78, "import was given 1 words; expected SOURCE DIR"),
        (["import", "nowhere", "b"], 65, "nowhere does not exist"),
    ],
)
def test_refusals_end_with_their_code_and_no_traceback(words, code, message, tmp_path):
    command = [sys.executable, "-m", "vlm_jax.convert", *words]
    result = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_adapters_go_out_merged_or_in_pefts_format_and_come_in_again(tmp_path, monkeypatch):
    stored = write_model(tmp_path / "model")
    rules = (
        configs.Rule("decoder/.*attention/.*", "lora", rank=2, alpha=3.0, dropout=0.1),
        configs.Rule("decoder/norm/scale"),
        configs.Rule(".*", "frozen"),
    )
    config = configs.Config(
        name="x",
        model=stored.model,
        data=configs.Data({"emoji:caption": 1.0}),
        init=(configs.Init(str(tmp_path / "model")),),
        adaptation=rules,
    )
    plan, rng = adaptation.of(config), np.random.default_rng(5)
    trained = {p: stored.parameters.read(p) for p in stored.parameters.shapes}
    for path, leaf in plan.shapes.items():
        if plan.trains(path):
            trained[path] = rng.normal(size=leaf.shape).astype(np.float32)
        elif path not in trained:
            trained[path] = np.full(leaf.shape, 1.5, np.float32)
    monkeypatch.setattr(checkpoints, "load_params", lambda workdir: (config, trained))

    run, model, peft_folder = (str(tmp_path / name) for name in ("run", "model", "peft"))
    convert.main(["convert", "adapter", run, peft_folder])
    settings = files.read_json(tmp_path / "peft" / "adapter_config.json")
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (2, 3, 0.1)
    assert settings["modules_to_save"] == ["model.norm"] and len(settings["target_modules"]) == 8
    convert.main(["convert", "export", run, str(tmp_path / "merged")])
    monkeypatch.setattr(flags.FLAGS, "adapter", peft_folder)
    convert.main(["convert", "export", model, str(tmp_path / "again")])
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")
    )
    assert first == second
    merged = files.Folder(tmp_path / "merged")
    kernel = trained["decoder/stack/blocks/attention/key/kernel"][1].reshape(12, 4)
    a, b = (trained[f"decoder/stack/blocks/attention/key/lora_{x}"][1] for x in "ab")
    weight = merged.read("model.layers.1.self_attn.k_proj.weight")
    np.testing.assert_allclose(weight, (kernel + 1.5 * a @ b).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged.read("model.norm.weight"), trained["decoder/norm/scale"])
