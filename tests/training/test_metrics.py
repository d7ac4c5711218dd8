"""metrics.jsonl and its views."""

import json
import sys
import types

import pytest
import tiny

from vlm_jax.config import Tracking
from vlm_jax.data.packing import Info
from vlm_jax.errors import ConfigError
from vlm_jax.training import metrics

PLAIN = tiny.config(tracking=Tracking(tensorboard=False))
SUMS = {
    "nll": 30.0,
    "weight": 10.0,
    "correct": 4.0,
    "tokens": 75,
    "positions": 100,
    "images": 3,
    "loss": 3.5,
    "grad_norm": 2.0,
    "learning_rate": 0.1,
}


AUXILIARY = {
    "words_nll": 6.0,
    "words_images": 3,
    "contrastive_nll": 5.0,
    "contrastive_images": 2,
}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_made_of_means_over_what_is_real():
    rejects = {("emoji", "truncated"): 2, ("emoji", "missing"): 1}
    line = metrics.row(7, SUMS | AUXILIARY, Info((), rejects, epochs={"emoji:caption": 1.23456}))
    assert line == {
        "step": 7,
        "loss": 3.0,
        "objective": 3.5,
        "accuracy": 0.4,
        "grad_norm": 2.0,
        "learning_rate": 0.1,
        "supervised": 10.0,
        "tokens": 75,
        "images": 3,
        "padding": 0.25,
        "words_loss": 2.0,
        "contrastive_loss": 2.5,
        "rejects": {"emoji/missing": 1, "emoji/truncated": 2},
        "epochs": {"emoji:caption": 1.2346},
    }


def test_what_cannot_be_used_is_listed_once_whatever_was_killed(tmp_path):
    info = Info((), {("a", "empty"): 1}, rejected=(("a/train/3", "a", "empty"),))
    with metrics.Metrics(tmp_path, PLAIN, 0) as log:
        for step in (1, 2):
            log.quarantine(step, info)
    with metrics.Metrics(tmp_path, PLAIN, 1) as log:
        log.quarantine(2, info)
    listed = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in listed] == [
        {"step": step, "key": "a/train/3", "source": "a", "reason": "empty"} for step in (1, 2)
    ]


def test_patches_that_images_share_have_a_padding_of_their_own():
    sums = SUMS | {"patches": 30, "patch_room": 40}
    assert metrics.row(3, sums, Info((), {}))["patch_padding"] == 0.25


def test_lines_after_the_restored_step_and_torn_ones_are_dropped(tmp_path):
    with metrics.Metrics(tmp_path, PLAIN, 0) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": step / 3})
        log.write({"step": 3, "eval/x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with metrics.Metrics(tmp_path, PLAIN, 3) as log:
        log.write({"step": 4, "loss": 0.1})
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path)] == [
        (1, 1 / 3),
        (2, 2 / 3),
        (3, 1.0),
        (3, None),
        (4, 0.1),
    ]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with metrics.Metrics(tmp_path, PLAIN, 0) as log:
        log.write({"step": 1})
        assert lines(tmp_path) == [{"step": 1}]


def test_nested_numbers_get_a_path():
    line = {"step": 3, "loss": 1, "time": {"left_s": 2}, "rejects": {"a/b": 3}}
    assert metrics.scalars(line) == {"loss": 1.0, "time/left_s": 2.0, "rejects/a/b": 3.0}


def test_tensorboard_gets_the_lines_that_are_shown(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with metrics.Metrics(tmp_path, tiny.config(), 0) as log:
        log.write({"step": 5, "loss": 0.25})
        log.write({"step": 6, "loss": 0.5}, show=False)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events, at = file.read_bytes(), [], 0
    while at < len(data):  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        events.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += size + 16
    shown = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert shown == [(5, "loss", 0.25)]


def test_wandb_is_only_touched_when_asked_and_continues_its_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, scalars, step):
            calls.append((scalars, step))

        def finish(self):
            calls.append("finish")

    def init(**fields):
        calls.append((fields["project"], fields["id"], fields["resume"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with metrics.Metrics(tmp_path, PLAIN, 0) as log:
        log.write({"step": 1, "loss": 1.0})
    assert calls == []
    asked = tiny.config(tracking=Tracking(tensorboard=False, wandb="mine"))
    for step in (0, 1):
        with metrics.Metrics(tmp_path, asked, step) as log:
            log.write({"step": step + 1, "loss": 1.0})
    assert calls == [
        ("mine", None, "allow"),
        ({"loss": 1.0}, 1),
        "finish",
        ("mine", "abc", "allow"),
        ({"loss": 1.0}, 2),
        "finish",
    ]


def test_wandb_that_is_not_installed_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    asked = tiny.config(tracking=Tracking(wandb="mine"))
    with pytest.raises(ConfigError, match="wandb is not installed"):
        metrics.Metrics(tmp_path, asked, 0)
