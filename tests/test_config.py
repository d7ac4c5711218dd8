"""The config tree: what it accepts, what it refuses, and what it says then."""

import json

import pytest

from vlm_jax import config as configs
from vlm_jax import schema
from vlm_jax.errors import ConfigError
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit


def tree(**data):
    model = configs.Model(vit("Ti/8", image_size=64), Connector(), decoder("1m"))
    return configs.default(
        name="test", model=model, data=configs.Data(mixture={"emoji_caption": 1.0}, **data)
    )


def test_a_config_survives_config_json():
    config = configs.resolve(tree())
    assert configs.resolve(json.loads(json.dumps(schema.plain(config)))) == config


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        (("train", "stepz"), "config.train.steps"),
        (("train", "learning_rate"), "config.train"),
        (("model", "encodr"), "config.model.encoder"),
        (("model", "decoder", "n_heads"), "config.model.decoder.heads"),
        (("evaluation",), "config.eval"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(given, nearest):
    config = tree().to_dict()
    section = config
    for name in given[:-1]:
        section = section[name]
    section[given[-1]] = 1
    with pytest.raises(ConfigError, match=f"unknown config key config.*did you mean {nearest}"):
        configs.resolve(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.steps", "many", "config.train.steps is 'many'; expected int"),
        ("train.steps", True, "expected int"),
        ("train.steps", 1.5, "expected int"),
        ("model.encoder.pool", "gap", "expected one of none, map"),
        ("model.encoder.image_size", 65, "multiple of the patch size 8"),
        ("model.decoder.kv_heads", 3, "multiple of its 3 key/value heads"),
        ("model.decoder.rope_share", 0.3, "a share of head_dim 32 that is an even number"),
        (
            "model.decoder.position",
            "learned",
            "positions is 0; expected at least 0 more than the 256 of",
        ),
        ("model.decoder.pattern", ["global", "near"], "global and local, at least one"),
        ("model.decoder.pattern", ["local"], "window is 0; expected at least 1"),
        ("data.views", 0, "at least 1"),
        ("data.tokens", 64, "room for an image's 64 visual tokens"),
        ("data.mixture", {}, "at least one source with a positive weight"),
    ],
)
def test_a_wrong_value_is_refused_by_name(path, value, message):
    config = tree().to_dict()
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    with pytest.raises(ConfigError, match=message):
        configs.resolve(config)


def test_a_missing_section_is_named():
    config = tree().to_dict()
    del config["model"]
    with pytest.raises(ConfigError, match=r"config\.model is missing"):
        configs.resolve(config)


def test_whole_numbers_stand_for_floats():
    config = tree().to_dict()
    config["train"]["lr"] = 1
    assert configs.resolve(config).train.lr == 1.0
