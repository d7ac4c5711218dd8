"""Runs in stages against the same runs made one by one."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from test_initial import folder

from vlm_jax import config as configs
from vlm_jax import main
from vlm_jax.config import Checkpoint, Eval, Init, Parallel, Rule, Stage, Tracking
from vlm_jax.data import heldout, pipeline
from vlm_jax.errors import ConfigError, Interrupted, StorageError
from vlm_jax.evaluation import evaluator, report
from vlm_jax.models import adapters
from vlm_jax.parallel import devices
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import adaptation, checkpoints, loop, preflight, stages
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

LORA = (
    Rule(r"decoder/stack/.*query/kernel", "lora", rank=2, alpha=4.0),
    Rule(r"connector/.*", lr=0.5),
    Rule(".*", "frozen"),
)
ALIGN = (Rule(r"connector/.*"), Rule(".*", "frozen"))
FULL = (Rule(".*"),)


def changed(adaptation, **fields):
    """Changes of a stage."""
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    return {"adaptation": adaptation, **fields}


# The connector alone with averaged weights; the decoder by LoRA at twice the resolution; all of it,
# from merged kernels.
STAGES = (
    Stage("align", changed(ALIGN, train__steps=4, train__ema=0.5, checkpoint__every=2)),
    Stage("tune", changed(LORA, train__steps=5, model__encoder__image_size=16)),
    Stage("full", changed(FULL, train__steps=3, train__lr=1e-3, model__encoder__image_size=16)),
)


def plain(config):
    """The config as a file of configs/ and the command line make it."""
    return configs.resolve(configs.schema.plain(config))


CONFIG = plain(
    tiny.config(
        stages=STAGES,
        warmup_steps=1,
        checkpoint=Checkpoint(every=3),
        eval=Eval(every=0, splits=("validation",), text_only_steps=0),
        tracking=Tracking(tensorboard=False),
        parallel=Parallel(data=1),
    )
)


class Evaluator:
    """Held-out figures that cost nothing; `end` is called when a run is scored."""

    end = staticmethod(lambda config: None)

    def __init__(self, config, workdir):
        self.config, self.workdir = config, workdir

    def __call__(self, step, flat):
        return {"eval/x": float(step)}

    def final(self, flat, text_only):
        self.end(self.config)


STEPS, make_step = {}, steps.make_step


def compiled(config, plan, mesh):
    """The step of a stage, compiled once."""
    kind = repr((config.model, config.adaptation, config.train))
    if kind not in STEPS:
        STEPS[kind] = make_step(config, plan, mesh)
    return STEPS[kind]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs over tiny batches, whose steps are compiled once."""
    put, make = monkeypatch.setattr, meshes.make
    put(meshes, "make", lambda parallel, *_: make(parallel, jax.devices()[:1]))
    side = lambda config: config.model.encoder.image_size  # noqa: E731
    put(pipeline, "train_stream", lambda config: tiny.Stream(side=side(config)))
    put(heldout, "eval_examples", lambda *_, **__: [])
    put(steps, "make_step", compiled)
    put(evaluator, "Evaluator", Evaluator)
    put(report, "write", lambda workdir: (workdir / "report.html").write_text("scores"))
    put(report, "table", lambda scores: "")


def lines(workdir):
    """metrics.jsonl without wall-clock figures."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "time"} for line in found]


def same(a, b):
    """Whether two runs ended with the same parameters, states and lines."""
    mine, theirs = (checkpoints.load_params(folder)[1] for folder in (a, b))
    equal = jax.tree.map(np.array_equal, mine, theirs)
    return all(jax.tree.leaves(equal)) and lines(a) == lines(b)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "model"
    folder(path, tiny.MODEL, np.float32)
    return path


def continued(published, count=3):
    """The config, or its first stages, starting from a published folder."""
    return dataclasses.replace(CONFIG, init=(Init(str(published)),), stages=STAGES[:count])


@pytest.fixture(scope="module")
def walked(tmp_path_factory, published):
    """A run in stages that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("walked") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        quick.__wrapped__(monkeypatch)
        main.run(continued(published), workdir)
    return workdir


FOLDERS = "1-align", "2-tune", "3-full"


def alone(name, init, **fields):
    """A run of one stage as a file of configs/ would state it."""
    return dataclasses.replace(CONFIG, name=name, stages=(), init=(Init(str(init)),), **fields)


def with_train(**fields):
    return dataclasses.replace(CONFIG.train, **fields)


def test_stages_are_the_runs_that_people_would_start_one_by_one(walked, published, tmp_path):
    larger = dataclasses.replace(tiny.MODEL.encoder, image_size=16)
    model = dataclasses.replace(tiny.MODEL, encoder=larger)
    runs = (
        alone(
            "tiny-align",
            published,
            adaptation=ALIGN,
            train=with_train(steps=4, ema=0.5),
            checkpoint=Checkpoint(every=2),
        ),
        alone(
            "tiny-tune",
            tmp_path / "1-align",
            adaptation=LORA,
            train=with_train(steps=5),
            model=model,
        ),
        alone(
            "tiny-full",
            tmp_path / "2-tune",
            adaptation=FULL,
            train=with_train(steps=3, lr=1e-3),
            model=model,
        ),
    )
    for name, config in zip(FOLDERS, runs, strict=True):
        main.run(config, tmp_path / name)
        assert same(tmp_path / name, walked / name), name
        mine, theirs = (
            json.loads((parent / name / "config.json").read_text()) for parent in (tmp_path, walked)
        )
        assert mine.pop("init") and theirs.pop("init")
        assert mine == theirs


def test_each_stage_goes_on_where_the_last_one_ended(walked, published):
    for before, after, path in (
        ("1-align", "2-tune", "connector/queries"),
        ("2-tune", "3-full", "decoder/embedding"),
    ):
        old, new = (checkpoints.load_params(walked / x)[1] for x in (before, after))
        assert not np.array_equal(old[path], new[path])  # trains in the later one
    tuned, began = checkpoints.load_params(walked / "2-tune")[1], start(walked)
    whole = adapters.merged(tuned)
    assert began.keys() == whole.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, began[path])
    assert not np.array_equal(
        whole["decoder/stack/blocks/attention/query/kernel"],
        tuned["decoder/stack/blocks/attention/query/kernel"],
    )


def start(walked):
    """What the last stage starts from."""
    config = stages.of(CONFIG, walked)[-1].config
    return states.create(config, adaptation.of(config), meshes.make(config.parallel)).evaluated()


SLOW = [(0, 0), (0, 2), (1, 2), (1, "scores")]


@pytest.mark.parametrize(
    ("stage", "batch"),
    [
        (0, 3),
        (0, "scores"),
        (1, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_a_walk_that_was_killed_anywhere_ends_like_the_unbroken_one(
    walked, published, tmp_path, monkeypatch, stage, batch
):
    name = f"tiny-{STAGES[stage].name}"

    def stream(config):
        due = config.name == name and batch != "scores"
        return tiny.Stream(batch if due else -1, side=config.model.encoder.image_size)

    def scored(config):
        if config.name == name and batch == "scores":
            raise RuntimeError("killed")

    config = continued(published, 2)
    with monkeypatch.context() as patch:
        # The stream that fails is not the one that the check before the first stage opens.
        patch.setattr(preflight, "check", lambda *_: None)
        patch.setattr(pipeline, "train_stream", stream)
        patch.setattr(Evaluator, "end", staticmethod(scored))
        with pytest.raises(RuntimeError, match="killed"):
            main.run(config, tmp_path)
    assert [run.ended for run in stages.of(config, tmp_path)] == [i < stage for i in range(2)]
    trained = []
    with monkeypatch.context() as patch:
        train = loop.train
        note = lambda config, *rest: trained.append(config.name) or train(config, *rest)  # noqa: E731
        patch.setattr(loop, "train", note)
        main.run(config, tmp_path)
    assert trained == [f"tiny-{s.name}" for s in STAGES[stage:2]]
    assert all(same(tmp_path / each, walked / each) for each in FOLDERS[:2])


@pytest.mark.parametrize("during", ["training", "scores"])
def test_a_signal_ends_the_walk_with_exit_code_75(walked, published, tmp_path, monkeypatch, during):
    def stop(config):
        if config.name == "tiny-align":
            os.kill(os.getpid(), signal.SIGTERM)

    class Stream(tiny.Stream):
        def __next__(self):
            if self.next == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    config = continued(published, 2)
    with monkeypatch.context() as patch:
        if during == "scores":
            patch.setattr(Evaluator, "end", staticmethod(stop))
            message = "stopped after 1-align"
        else:
            patch.setattr(pipeline, "train_stream", lambda config: Stream())
            message = "stopped after step 3"
        with pytest.raises(Interrupted, match=message) as stopped:
            main.run(config, tmp_path)
    assert stopped.value.exit_code == 75
    assert not (tmp_path / "2-tune").exists()
    main.run(config, tmp_path)
    assert all(same(tmp_path / each, walked / each) for each in FOLDERS[:2])


def test_a_walk_that_has_ended_is_left_as_it_is(walked, published, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in walked.rglob("*.json*")}
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("trained again"))
    main.run(continued(published), walked)
    assert {path: path.read_bytes() for path in walked.rglob("*.json*")} == before
    assert "stage 3-full has ended" in capsys.readouterr().out


def test_a_folder_of_stages_stands_for_the_last_that_has_ended(walked, tmp_path):
    whole = tmp_path / "run"
    shutil.copytree(walked, whole)
    config, _ = checkpoints.load_params(whole)
    assert config.name == "tiny-full" and config.stages == ()
    (whole / "3-full" / "report.html").unlink()
    assert checkpoints.load_params(whole)[0].name == "tiny-tune"
    (whole / "2-tune" / "report.html").unlink()
    (whole / "1-align" / "report.html").unlink()
    with pytest.raises(StorageError, match=r"none has ended.*1-align"):
        checkpoints.load_params(whole)


def test_what_cannot_be_trained_is_refused_before_the_first_stage(published, tmp_path, monkeypatch):
    def refused(message, *last):
        config = dataclasses.replace(continued(published), stages=(*STAGES[:2], *last))
        with pytest.raises(ConfigError, match=message):
            main.run(config, tmp_path)
        assert not any(tmp_path.iterdir())

    def rule(*_, **__):
        return (configs.schema.plain(Rule(*_, **__)), {"pattern": ".*", "mode": "frozen"})

    refused(
        "stage 3-x: config.adaptation.*matches no parameter",
        Stage("x", {"adaptation": rule("head/.*")}),
    )
    refused(
        "stage 3-x: .*has .* for decoder/.*presets are not", Stage("x", {"model.decoder.mlp": 20})
    )
    refused("stage 3-x: config.train.warmup_steps", Stage("x", {"train.steps": 0}))
    monkeypatch.setattr(devices, "memory", lambda _: 800 * 1024)
    refused("stage 2-tune: tiny-tune needs .* bytes")


def test_a_bottleneck_which_cannot_be_merged_is_for_the_last_stage_alone(published, tmp_path):
    rules = [
        {"pattern": "decoder/stack/.*", "mode": "bottleneck", "rank": 2},
        {"pattern": ".*", "mode": "frozen"},
    ]
    adapted = Stage("adapt", {"adaptation": rules, "train.steps": 2})
    config = plain(dataclasses.replace(continued(published), stages=(adapted, STAGES[0])))
    with pytest.raises(ConfigError, match=r"stage 1-adapt: .*bottleneck"):
        main.run(config, tmp_path)
    assert not any(tmp_path.iterdir())
    preflight.check(stages.of(dataclasses.replace(config, stages=config.stages[::-1]), tmp_path))


def test_folders_are_not_shared_and_earlier_stages_not_swapped(walked, published, tmp_path):
    config = continued(published)
    with pytest.raises(ConfigError, match="holds a run in stages, align, tune, full"):
        main.run(alone("tiny", published), walked)
    with pytest.raises(ConfigError, match="holds a run without stages"):
        main.run(config, walked / "1-align")
    whole = tmp_path / "run"
    shutil.copytree(walked, whole)
    other = dataclasses.replace(config, seed=4)
    with pytest.raises(ConfigError, match="seed was 0 and is 4"):
        main.run(other, whole)
    shutil.rmtree(whole / "1-align")
    with pytest.raises(ConfigError, match="2-tune began from another 1-align"):
        main.run(config, whole)


def test_a_branch_is_of_the_last_stage(walked, published, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(main, "run_stage", lambda *given: seen.append(given))
    main.run(continued(published), tmp_path / "half", branch=(walked, 2))
    ((config, workdir, _, branch),) = seen
    assert config == stages.of(continued(published), walked)[-1].config
    assert (workdir, branch) == (tmp_path / "half", (walked / "3-full", 2))


def test_parts_that_the_last_model_lacks_come_from_elsewhere_or_are_drawn(tmp_path):
    """As BLIP-2 takes its decoder in the second stage."""
    more = {"model.extra_encoders": [tiny.MODEL.encoder]}
    first, second = (Stage("one", {}), Stage("two", configs.schema.plain(more)))
    config = dataclasses.replace(CONFIG, stages=(first, second))
    assert stages.of(config, tmp_path)[1].config.init == tuple(
        Init(str(tmp_path / "1-one"), part) for part in ("connector", "decoder", "encoder")
    )
    named = dict(second.changes) | {"init": [{"folder": "models/llm", "part": "decoder"}]}
    config = dataclasses.replace(config, stages=(first, Stage("two", named)))
    assert [init.part for init in stages.of(config, tmp_path)[1].config.init] == [
        *("connector", "encoder"),
        "decoder",
    ]
