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
from vlm_jax.data.pipeline import TrainStream
from vlm_jax.errors import Interrupted
from vlm_jax.parallel import devices
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import (
    adaptation,
    branching,
    checkpoints,
    features,
    memory,
    metrics,
    progress,
)
from vlm_jax.training import state as states
from vlm_jax.training import step as steps
from vlm_jax.training.adaptation import Plan
from vlm_jax.training.branching import Branch
from vlm_jax.training.interrupt import Interrupt
from vlm_jax.training.rollback import Rollback, Row
from vlm_jax.training.state import State

Evaluator = Callable[[int, dict[str, Array]], Mapping[str, float]]

TABLE_WIDTH = 120  # where the output is no terminal


def train(
    config: Config,
    workdir: str | os.PathLike,
    evaluator: Evaluator,
    hint: str = "",
    branch: Branch | None = None,
) -> State:
    """Trains to the last step; continues what `workdir` holds.

    Args:
      config: the run.
      workdir: its folder.
      evaluator: gives held-out figures for (step, parameters by path), every `eval.every` steps and
        at the end. It runs on the run's mesh and must not keep the arrays.
      hint: what to try instead, for the message that the run does not fit.
      branch: which other run a new one starts from; see `branching.start`.

    Raises:
      ConfigError: the run does not fit its devices, `workdir` holds another run, or `branch` is of
        another one.
      Interrupted: it was asked to stop; its state is saved.
    """
    mesh, plan = prepare(config, hint)
    if branch is not None:
        branching.check(branch, Path(workdir))
    abstract = states.abstract(config, plan, mesh)
    step_function = steps.make_step(config, plan, mesh)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(pipeline.train_stream(config))
        interrupt = stack.enter_context(Interrupt())
        saved = stack.enter_context(checkpoints.Checkpoints(workdir, config))

        def create() -> State:
            if branch is None:
                return states.create(config, plan, mesh)
            return branching.start(branch, config, Path(workdir), abstract, stream)

        state = saved.restore(abstract, stream)
        if state is None:
            state = create()
            if branch is not None:  # from here on the trunk is not needed
                saved.save(state.done, state, stream)
        checkpoints.write_config(workdir, config)
        if jax.process_index() == 0:
            groups = adaptation.groups(
                plan, config.train.lr, states.kept_bytes(state), states.own_bytes(state)
            )
            adaptation.write(Path(workdir), groups)
        run = _Run(config, Path(workdir), mesh, step_function, stream, interrupt, saved, evaluator)
        undo = Rollback(config, saved, stream, abstract, create)
        state, row = run.walk(state)
        while row is not None:
            state = None  # its memory is for the older one
            state = undo(row)
            state, row = run.walk(state, row)
    return state


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every step needs."""

    config: Config
    workdir: Path
    mesh: Mesh
    step_function: Callable
    stream: TrainStream
    interrupt: Interrupt
    saved: checkpoints.Checkpoints
    evaluator: Evaluator

    def walk(self, state: State, undone: Row | None = None) -> tuple[State, Row | None]:
        """Trains to the last step, or to a row of skipped ones that asks for a roll-back.

        Args:
          state: where the run stands; its buffers are taken over.
          undone: the row that it was rolled back for.
        """
        config, mesh, step = self.config, self.mesh, state.done
        seen = features.of(config, mesh)
        with _Log(config, self.workdir, state, undone) as log:
            while step < log.last:
                step += 1
                batch, info = next(self.stream)
                state, sums = self.step_function(
                    state, steps.place(seen(batch, state.frozen), mesh)
                )
                if _simulated(mesh):
                    jax.block_until_ready(sums)
                log.step(step, sums, info)
                stopping = self.interrupt.asked(step)
                if stopping or self._evaluates(step) or self._saves(step) or step >= log.last:
                    log.settle()
                if log.row is not None:
                    return state, log.row
                last = step >= log.last
                if (last or self._evaluates(step)) and not stopping:
                    with jax.set_mesh(mesh):
                        log.evaluation(step, self.evaluator(step, state.evaluated()))
                if last or stopping or self._saves(step):
                    log.settle()
                    self.saved.save(step, state, self.stream)
                if stopping and not last:
                    raise Interrupted(f"stopped after step {step}; the same command continues it")
            log.repeats()
        return state, None

    def _evaluates(self, step: int) -> bool:
        return _due(step, self.config.eval.every)

    def _saves(self, step: int) -> bool:
        config = self.config.checkpoint
        return _due(step, config.every) or step in config.milestones


def prepare(config: Config, hint: str = "") -> tuple[Mesh, Plan]:
    """The mesh and the adaptation of a run, shown to people; nothing large is allocated.

    Raises:
      ConfigError: the config does not fit the model or the devices.
    """
    mesh = meshes.make(config.parallel)
    plan = adaptation.of(config)
    features.check(config, plan)
    abstract = states.abstract(config, plan, mesh)
    parts = memory.check(config, plan, mesh, abstract, hint)
    if jax.process_index() == 0:
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        groups = adaptation.groups(
            plan, config.train.lr, states.kept_bytes(abstract), states.own_bytes(abstract)
        )
        console.print(adaptation.table(groups))
        estimate = ", ".join(f"{name} {adaptation.readable(x)}" for name, x in parts.items())
        axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        console.print(f"mesh: {axes}; estimated per device: {estimate}", soft_wrap=True)
    return mesh, plan


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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

    def __init__(self, config: Config, workdir: Path, state: State, undone: Row | None):
        self._config = config
        self._drawn = int(state.guard.drawn)
        self._metrics = metrics.Metrics(workdir, config, state.done, self._drawn)
        self._progress = progress.Progress(config.train.steps)
        self._meter = progress.Meter(config.train.steps)
        self._pending: _Pending | None = None
        self._epochs: Mapping[str, float] = {}
        self._warm = False
        self._skipped = int(state.guard.skipped)
        self.row: Row | None = None  # skips that ask for a roll-back
        if undone is not None:
            self._metrics.rolled_back(undone.step, self._drawn, state.done)
            self._progress.say(f"rolled back to step {state.done}, on with later data")

    def __enter__(self) -> "_Log":
        self._metrics.__enter__()
        self._progress.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._progress.__exit__()
        self._metrics.__exit__()

    @property
    def last(self) -> int:
        """The last step, as far as is known: skipped ones are made up for at the end."""
        return self._config.train.steps + self._skipped

    def step(self, step: int, sums: Mapping[str, Array], info: Any) -> None:
        """Takes a step that was just started, and writes the one before it."""
        self._drawn += 1
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
        sums = jax.device_get(pending.sums)
        line = metrics.row(pending.step, sums, pending.info)
        self._guard(line, sums, pending.info)
        self._meter.add(line)
        if not self._warm:  # the first step was compiled
            self._warm = True
            self._meter.restart()
        train = self._config.train
        shown = pending.step == train.steps or _due(pending.step, train.log_every)
        speeds = self._meter.read(pending.step) if shown else {}
        if speeds:
            speeds["peak_bytes"] = devices.peak()
        self._metrics.write(line | ({"time": speeds} if speeds else {}), show=shown)
        self._metrics.quarantine(pending.step, pending.info)
        self._epochs = pending.info.epochs
        if shown:
            self._progress.step(line | {"time": speeds})

    def _guard(self, line: Mapping[str, Any], sums: Mapping[str, Any], info: Any) -> None:
        """Lists a skipped step and notes whether it is one too many."""
        if "skipped" not in line:
            return
        self._skipped, batch = int(sums["skipped"]), int(sums["drawn"])
        self._metrics.skip(line, batch, info)
        self._progress.say(f"step {line['step']} skipped: {line['skipped']}")
        if self.row is None and int(sums["in_row"]) >= self._config.guard.patience:
            self.row = Row(line["step"], batch, self._drawn)
