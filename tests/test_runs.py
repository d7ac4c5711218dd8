"""Whole runs through the doors, as processes: exit codes, and what a kill leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.training import checkpoints

ROOT = Path(__file__).parents[1]
LOCAL = [
    "--config=configs/vit_g.py:local",
    "--config.train.steps=24",
    "--config.eval.every=0",
    "--config.eval.final_examples=4",
    "--config.checkpoint.every=4",
    "--config.eval.kinds=('caption',)",
    "--config.eval.max_new_tokens=4",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vlm_jax.main", *arguments]


def start(*arguments: str, **pipes) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(command(*arguments), cwd=ROOT, env=environment, text=True, **pipes)


def finish(*arguments: str) -> tuple[int, str]:
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def lines(workdir: Path) -> list[dict]:
    """metrics.jsonl without wall-clock figures."""
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    import jax
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer((workdir / checkpoints.FOLDER).absolute()) as orbax:
        items = orbax.load_checkpointables(orbax.latest.step)
    flat, _ = jax.tree_util.tree_flatten_with_path(items)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def test_an_unknown_key_on_the_command_line_names_the_nearest_and_exits_78(tmp_path):
    code, output = finish(
        "--config=configs/tiny.py", f"--workdir={tmp_path}/run", "--config.train.stepz=3"
    )
    assert code == 78
    assert "unknown config key config.train.stepz; did you mean config.train.steps?" in output


def test_a_model_too_large_for_the_machine_exits_78_before_anything_is_made(tmp_path):
    began = time.monotonic()
    code, output = finish("--config=configs/vit_g.py", f"--workdir={tmp_path}/run")
    assert code == 78
    assert time.monotonic() - began < 60
    assert re.search(r"needs [\d,]+ bytes .* per device and each of the 1 devices", output)
    assert "--config=configs/vit_g.py:local" in output
    assert not (tmp_path / "run").exists()


def test_a_text_only_baseline_shorter_than_the_warm_up_still_trains():
    from configs import tiny
    from vlm_jax import config, main
    from vlm_jax.training import schedules

    settings = tiny.get_config()
    settings.eval.text_only_steps = settings.train.warmup_steps // 2
    baseline = main.text_only_config(config.resolve(settings))
    assert not baseline.data.images and baseline.eval.splits == ("validation",)
    assert schedules.make(baseline.train)(baseline.train.warmup_steps) == baseline.train.lr


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    code, output = finish(*LOCAL, f"--workdir={workdir}")
    assert code == 0, output
    return workdir


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_at_every_step(unbroken, tmp_path):
    code, output = finish(*LOCAL, f"--workdir={tmp_path}/again")
    assert code == 0, output
    assert lines(tmp_path / "again") == lines(unbroken)


@pytest.mark.slow
def test_a_run_killed_three_times_ends_bit_for_bit_like_the_unbroken_one(unbroken, tmp_path):
    workdir = tmp_path / "killed"
    rng = np.random.default_rng(time.time_ns())
    folder = workdir / checkpoints.FOLDER

    def saving() -> bool:
        return folder.is_dir() and any("tmp" in entry.name for entry in folder.iterdir())

    kills = [
        (f"after line {n}", lambda n=n: steps_done(workdir) >= n)
        for n in sorted(rng.integers(1, 20, 2).tolist())
    ]
    kills.insert(1, ("during a save", saving))
    for name, due in kills:
        process = start(*LOCAL, f"--workdir={workdir}")
        while not due() and process.poll() is None:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"{name}: the run ended before it was killed"
    code, output = finish(*LOCAL, f"--workdir={workdir}")
    assert code == 0, output
    assert lines(workdir) == lines(unbroken)
    theirs, ours = state(unbroken), state(workdir)
    assert theirs.keys() == ours.keys()
    for path, array in theirs.items():
        assert array.tobytes() == ours[path].tobytes(), path


@pytest.mark.slow
def test_a_trained_run_answers_through_generate_and_load(unbroken):
    import vlm_jax
    from vlm_jax.data.emoji import EmojiSource

    example = EmojiSource("unseen_style", "caption")[0]
    picture = unbroken / "picture.png"
    picture.write_bytes(example.images[0])
    answer = subprocess.run(
        [sys.executable, "-m", "vlm_jax.generate", f"--model={unbroken}", f"--image={picture}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == vlm_jax.load(unbroken).generate([picture], [""])[0]
    assert (unbroken / "report.html").stat().st_size > 100_000


# The connector alone; then LoRA over its averages, on pictures of 6 x 6 patches instead of 4 x 4.
STAGES = [
    "--config=configs/llava15.py:lora-stages-local",
    "--config.checkpoint.every=2",
    "--config.eval.every=0",
    "--config.eval.final_examples=2",
    "--config.eval.max_new_tokens=4",
    "--stage=align.train.steps=12",
    "--stage=align.train.ema=0.5",
    "--stage=tune.train.steps=8",
    "--stage=tune.eval.kinds=('caption',)",
    "--stage=tune.model.encoder.image_size=84",
]


@pytest.mark.slow
def test_stages_that_are_killed_and_stopped_end_bit_for_bit_like_those_that_are_not(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output = finish(*STAGES, f"--workdir={whole}")
    assert code == 0, output

    def until(due, number: int) -> int:
        process = start(
            *STAGES, f"--workdir={broken}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while not due() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        output, _ = process.communicate(timeout=600)
        assert process.returncode in (-signal.SIGKILL, 75), output
        return process.returncode

    first, second = broken / "1-align", broken / "2-tune"
    assert until(lambda: steps_done(first) >= 3, signal.SIGTERM) == 75
    until(lambda: (first / "report.html").exists(), signal.SIGKILL)
    until(lambda: steps_done(second) >= 3, signal.SIGKILL)
    code, output = finish(*STAGES, f"--workdir={broken}")
    assert code == 0 and "stage 1-align has ended" in output, output
    for name in ("1-align", "2-tune"):
        assert lines(broken / name) == lines(whole / name)
        theirs, ours = state(whole / name), state(broken / name)
        assert theirs.keys() == ours.keys()
        for path, array in theirs.items():
            assert array.tobytes() == ours[path].tobytes(), path
    code, output = finish(*STAGES, f"--workdir={whole}", "--config.data.template=plain")
    assert code == 78 and "--stage=align.data.template=..." in output
