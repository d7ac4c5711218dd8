"""Speeds, and what people see."""

import io

import pytest
from rich.console import Console

from vlm_jax.training import progress

LINE = {"step": 5, "loss": 1.25, "padding": 0.125, "tokens": 100, "images": 4}


def test_speeds_are_of_the_steps_since_the_last_reading():
    now = [0.0]
    meter = progress.Meter(steps=100, clock=lambda: now[0])
    now[0] = 50.0  # compiling
    meter.restart()
    for _ in range(5):
        meter.add(LINE)
    now[0] = 52.0
    first = meter.read(10)
    assert first == {"tokens_per_s": 250, "images_per_s": 10, "step_s": 0.4, "left_s": 36}
    for _ in range(5):
        meter.add(LINE)
    now[0] = 56.0
    second = meter.read(15)
    assert second["tokens_per_s"] == 125
    assert second["left_s"] == pytest.approx(85 * 6 / 10)
    assert meter.read(15) == {}


def shown(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with progress.Progress(100, console) as live:
        speeds = {"tokens_per_s": 1234.0, "images_per_s": 5.5, "left_s": 3723}
        live.step(LINE | {"time": speeds})
        live.evaluation(5, {"eval/validation/caption/loss": 2.5})
        live.step(LINE | {"step": 6, "time": {}})
    return out.getvalue()


def test_plain_lines_where_the_output_is_no_terminal():
    first, second, third = shown(terminal=False).splitlines()
    assert first == (
        "step 5/100  loss 1.2500  1,234 tokens/s  5.5 images/s  padding 12.5%  1:02:03 left"
    )
    assert second == "step 5  eval/validation/caption/loss 2.500"
    assert third.startswith("step 6/100") and "\x1b" not in first


def test_a_terminal_gets_one_live_line():
    text = shown(terminal=True)
    assert "\x1b[" in text and "step 5/100" in text and "eval/validation" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
