"""The training loop: resume, step, log, evaluate, save."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array
from rich.console import Console

from vlm_jax.config import Config
from vlm_jax.data import pipeline
from vlm_jax.errors import Interrupted
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import adaptation, checkpoints, memory, metrics, progress
from vlm_jax.training import state as states
from vlm_jax.training import step as steps
from vlm_jax.training.adaptation import Plan
from vlm_jax.training.interrupt import Interrupt
from vlm_jax.training.state import State

Evaluator = Callable[[int, dict[str, Array]], Mapping[str, float]]

TABLE_WIDTH = 120  # where the output is no terminal


def train(
    config: Config, workdir: str | os.PathLike, evaluator: Evaluator, hint: str = ""
) -> State:
    """Trains to the last step; continues what `workdir` holds.

    Args:
      config: the run.
      workdir: its folder.
      evaluator: gives held-out figures for (step, parameters by path), every `eval.every` steps and
        at the end. It runs on the run's mesh and must not keep the arrays.
      hint: what to try instead, for the message that the run does not fit.

    Raises:
      ConfigError: the run does not fit its devices, or `workdir` holds another run.
      Interrupted: it was asked to stop; its state is saved.
    """
    mesh, plan = prepare(config, hint)
    step_function = steps.make_step(config, plan, mesh)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(pipeline.train_stream(config))
        interrupt = stack.enter_context(Interrupt())
        saved = stack.enter_context(checkpoints.Checkpoints(workdir, config))
        state = saved.restore(states.abstract(config, plan, mesh), stream)
        state = states.create(config, plan, mesh) if state is None else state
        start = int(state.step)
        checkpoints.write_config(workdir, config)
        if jax.process_index() == 0:
            groups = adaptation.groups(plan, config.train.lr, states.kept_bytes(state))
            adaptation.write(Path(workdir), groups)
        log = stack.enter_context(_Log(config, workdir, start))
        for step in range(start + 1, config.train.steps + 1):
            batch, info = next(stream)
            state, sums = step_function(state, steps.place(batch, mesh))
            if _simulated(mesh):
                jax.block_until_ready(sums)
            log.step(step, sums, info)
            stopping = interrupt.asked(step)
            if _due(step, config.eval.every, config.train.steps) and not stopping:
                log.settle()
                with jax.set_mesh(mesh):
                    log.evaluation(step, evaluator(step, state.evaluated()))
            if stopping or _due(step, config.checkpoint.every, config.train.steps):
                log.settle()
                saved.save(step, state, stream)
            if stopping and step < config.train.steps:
                raise Interrupted(f"stopped after step {step}; the same command continues it")
        log.repeats()
    return state


def prepare(config: Config, hint: str = "") -> tuple[Mesh, Plan]:
    """The mesh and the adaptation of a run, shown to people; nothing large is allocated.

    Raises:
      ConfigError: the config does not fit the model or the devices.
    """
    mesh = meshes.make(config.parallel)
    plan = adaptation.of(config)
    abstract = states.abstract(config, plan, mesh)
    parts = memory.check(config, plan, mesh, abstract, hint)
    if jax.process_index() == 0:
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        groups = adaptation.groups(plan, config.train.lr, states.kept_bytes(abstract))
        console.print(adaptation.table(groups))
        estimate = ", ".join(f"{name} {adaptation.readable(x)}" for name, x in parts.items())
        axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        console.print(f"mesh: {axes}; estimated per device: {estimate}", soft_wrap=True)
    return mesh, plan


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _simulated(mesh: Mesh) -> bool:
    """Several devices played by one CPU: steps in flight would wait for each other's threads."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


@dataclasses.dataclass
class _Pending:
    """A step that may still be running."""

    step: int
    sums: Mapping[str, Array]
    info: Any


class _Log:
    """Every step's line, written while the next step runs, so that the devices never wait."""

    def __init__(self, config: Config, workdir: str | os.PathLike, start: int):
        self._every = config.train.log_every
        self._steps = config.train.steps
        self._metrics = metrics.Metrics(Path(workdir), config, start)
        self._progress = progress.Progress(config.train.steps)
        self._meter = progress.Meter(config.train.steps)
        self._pending: _Pending | None = None
        self._epochs: Mapping[str, float] = {}
        self._warm = False

    def __enter__(self) -> "_Log":
        self._metrics.__enter__()
        self._progress.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._progress.__exit__()
        self._metrics.__exit__()

    def step(self, step: int, sums: Mapping[str, Array], info: Any) -> None:
        """Takes a step that was just started, and writes the one before it."""
        self._write()
        self._pending = _Pending(step, sums, info)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes held-out figures after the line of their step, which is settled."""
        self._metrics.write({"step": step, **figures})
        self._progress.evaluation(step, figures)
        self._meter.restart()

    def repeats(self) -> None:
        """Says which sources were read more than once."""
        often = [f"{name} {times:.1f} times" for name, times in self._epochs.items() if times > 1]
        if often:
            self._progress.say(f"read more than once: {', '.join(often)}")

    def settle(self) -> None:
        """Writes what is pending and puts it on the disk, before a checkpoint or a long wait."""
        self._write()
        self._metrics.sync()

    def _write(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        line = metrics.row(pending.step, jax.device_get(pending.sums), pending.info)
        self._meter.add(line)
        if not self._warm:  # the first step was compiled
            self._warm = True
            self._meter.restart()
        shown = _due(pending.step, self._every, self._steps)
        speeds = self._meter.read(pending.step) if shown else {}
        self._metrics.write(line | ({"time": speeds} if speeds else {}), show=shown)
        self._metrics.quarantine(pending.step, pending.info)
        self._epochs = pending.info.epochs
        if shown:
            self._progress.step(line | {"time": speeds})
