"""Stages as configs: what they change, how they are stated, and what is refused."""

import dataclasses
import json

import pytest
from absl import flags
from ml_collections import config_flags

from configs import llava15, tiny
from vlm_jax import config as configs
from vlm_jax import doors, schema
from vlm_jax.config import Init, Rule, Stage
from vlm_jax.errors import ConfigError

TINY = configs.resolve(tiny.get_config())


def staged(*changes, **fields):
    stages = tuple(Stage(f"s{i}", change) for i, change in enumerate(changes))
    return dataclasses.replace(TINY, stages=stages, **fields)


def test_a_stage_changes_the_config_and_not_the_stage_before_it():
    rules = (Rule("encoder/.*", "frozen"), Rule(".*"))
    config = staged(
        {"train.steps": 5, "model.encoder.stem_stages.1.2": 2, "data.mixture": {"emoji:yes_no": 1}},
        {"adaptation": rules, "model.encoder.image_size": 32},
        init=(Init("published"),),
    )
    first, second = configs.walked(config)
    alone = dataclasses.replace(config, stages=())
    stem = dataclasses.replace(TINY.model.encoder, stem_stages=((4, 32, 1), (2, 96, 2)))
    assert first == dataclasses.replace(
        alone,
        name="tiny-s0",
        train=dataclasses.replace(TINY.train, steps=5),
        data=dataclasses.replace(TINY.data, mixture={"emoji:yes_no": 1.0}),
        model=dataclasses.replace(TINY.model, encoder=stem),
        eval=dataclasses.replace(TINY.eval, text_only_steps=0),  # the last stage has the baseline
    )
    small = dataclasses.replace(TINY.model.encoder, image_size=32)
    assert second == dataclasses.replace(
        alone,
        name="tiny-s1",
        init=(),  # the published folder is where the first stage starts
        adaptation=rules,
        model=dataclasses.replace(TINY.model, encoder=small),
    )
    assert configs.walked(TINY) == (TINY,)


def test_a_baseline_of_an_earlier_stage_is_there_when_asked_for():
    first, second = configs.walked(staged({"eval.text_only_steps": 7}, {}))
    assert (first.eval.text_only_steps, second.eval.text_only_steps) == (7, 200)


def test_stages_survive_config_json():
    config = staged({"adaptation": (Rule("encoder/.*", "frozen"), Rule(".*"))}, {})
    again = configs.resolve(json.loads(json.dumps(schema.plain(config))))
    assert configs.walked(again) == configs.walked(config)
    assert configs.resolve(schema.plain(again)) == again


def test_configs_are_joined_by_what_differs_and_split_again():
    align, tune = (llava15.get_config(word) for word in ("align", ""))
    joined = configs.resolve(configs.in_stages("llava15", align=align, tune=tune))
    for given, stage in zip((align, tune), configs.walked(joined), strict=True):
        assert dataclasses.replace(stage, name=given.name) == configs.resolve(given)
    differing = joined.stages[0].changes.keys()
    assert differing == joined.stages[1].changes.keys()
    assert {"adaptation", "train.steps", "model.encoder.resize.mode"} <= differing
    assert not {"model.decoder", "train.clip", "name"} & differing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.stepz": 3}, r"stage 's1': unknown config key config\.train\.stepz; did you mean"),
        (
            {"trian.steps": 3},
            r"unknown config key config\.trian\.steps; did you mean config\.train",
        ),
        ({"train.steps": "many"}, r"stage 's1': config\.train\.steps is 'many'; expected int"),
        ({"model.extra_encoders.0.width": 3}, "unknown config key"),
        ({"model.encoder.image_size": 65}, r"stage 's1': .*multiple of the patch size"),
        ({"name": "x"}, "name is no field that a stage can change"),
        ({"stages": []}, "stages is no field"),
        ({"init": [{"folder": "models/llm"}]}, "whole model from models/llm; expected parts"),
    ],
)
def test_what_a_stage_gets_wrong_is_named_with_it(changes, message):
    with pytest.raises(ConfigError, match=message):
        configs.resolve(schema.plain(staged({}, changes)))


@pytest.mark.parametrize("names", [("a", "a"), ("A", "b"), ("", "b"), ("a/b", "b")])
def test_names_are_folders_of_their_own(names):
    config = dataclasses.replace(TINY, stages=tuple(Stage(name) for name in names))
    with pytest.raises(ConfigError, match="expected a name of its own"):
        configs.resolve(schema.plain(config))


def test_single_stages_are_changed_by_their_names():
    config = staged({"train.steps": 5}, {"data.mixture": {"emoji:caption": 1.0}})
    said = ["s0.train.steps=9", "s1.train.optimizer=lion", "s1.data.mixture={'emoji:yes_no': 2}"]
    first, second = configs.walked(configs.overridden(config, said))
    assert (first.train.steps, first.train.optimizer) == (9, "muon")
    assert (second.train.steps, second.train.optimizer) == (TINY.train.steps, "lion")
    assert second.data.mixture == {"emoji:yes_no": 2.0}
    for wrong in ("s2.train.steps=3", "s0=3", "s0.train.steps"):
        with pytest.raises(ConfigError, match=r"expected STAGE.FIELD=VALUE.* are: s0, s1"):
            configs.overridden(config, [wrong])
    with pytest.raises(ConfigError, match="are: none"):
        configs.overridden(TINY, ["s0.train.steps=3"])
    with pytest.raises(ConfigError, match=r"stage 's0': unknown config key config\.train\.stepz"):
        configs.overridden(config, ["s0.train.stepz=3"])


def test_one_stage_is_had_by_its_name_and_the_last_by_none():
    config = staged({"train.steps": 5}, {})
    assert configs.one_stage(config, "s0") == configs.walked(config)[0]
    assert configs.one_stage(config) == configs.walked(config)[1]
    assert configs.one_stage(TINY) == TINY
    with pytest.raises(ConfigError, match="no stage 'x'; it has: s0, s1"):
        configs.one_stage(config, "x")


def override(*arguments):
    """The config that a command line with these overrides gives."""
    values = flags.FlagValues()
    made = configs.default(name="tiny", model=TINY.model, data=TINY.data)
    made.stages = schema.plain(staged({"train.steps": 5, "data.mixture": {"a": 1.0}}, {}).stages)
    said = ["main", *arguments]
    flag = config_flags.DEFINE_config_dict("config", made, flag_values=values, sys_argv=said)
    values(said)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        return doors.config(flag)


def test_an_override_that_a_stage_would_hide_is_refused_with_what_to_say_instead():
    first, second = configs.walked(override("--config.train.lr=0.5"))
    assert first.train.lr == second.train.lr == 0.5
    first, second = configs.walked(override('--config.stages[0].changes["train.steps"]=7'))
    assert (first.train.steps, second.train.steps) == (7, 1000)
    for argument in ("--config.train.steps=3", '--config.data.mixture["emoji:caption"]=3.0'):
        with pytest.raises(ConfigError, match=r"stage 's0', which has a .*--stage=s0\."):
            override(argument)
