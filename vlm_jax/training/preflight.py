"""Whether all stages of a run can be trained, asked before the first is.

Nothing large is allocated: what a stage starts from is known from the configs before it.
"""

import itertools
import json
from collections.abc import Mapping, Sequence

import jax

from vlm_jax.config import Config
from vlm_jax.data import heldout, pipeline
from vlm_jax.errors import ConfigError, VlmError
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import (
    adaptation,
    checkpoints,
    features,
    initial,
    memory,
    schedules,
    stages,
)
from vlm_jax.training import state as states
from vlm_jax.training import step as steps
from vlm_jax.training.initial import Source
from vlm_jax.training.stages import Run
from vlm_jax.training.state import State


def check(runs: Sequence[Run], hint: str = "") -> None:
    """Raises where a stage would be refused.

    Args:
      runs: the stages, in order.
      hint: what to try instead where the devices cannot hold one.

    Raises:
      ConfigError: a stage does not fit its devices, its data or the last stage, or its folder holds
        another run. Names the stage.
      VlmError: what its data says.
    """
    stages.check_order(runs)
    planned: dict[str, Source] = {}
    for run in runs:
        _refuse_other(run)
        if run.ended:
            continue
        try:
            state = _fitting(run, hint, planned)
            if run is not runs[-1]:
                planned[str(run.folder)] = _left(run, state)
        except VlmError as error:
            raise type(error)(f"stage {run.folder.name}: {error}") from error


def _refuse_other(run: Run) -> None:
    path = run.folder / checkpoints.CONFIG
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    checkpoints.refuse_other_config(saved, run.config, run.folder)


def _fitting(run: Run, hint: str, planned: Mapping[str, Source]) -> State:
    """A stage's state, abstract, once all about it was looked at."""
    config = run.config
    schedules.make(config.train)
    mesh, plan = meshes.make(config.parallel), adaptation.of(config)
    steps.check_rows(config, mesh)
    features.check(config, plan)
    state = states.abstract(config, plan, mesh, planned)
    parts = memory.check(config, plan, mesh, state, hint)
    _open_data(config)
    if jax.process_index() == 0:
        size = adaptation.readable(sum(parts.values()))
        print(f"stage {run.folder.name}: {config.train.steps} steps, {size} per device")
    return state


def _left(run: Run, state: State) -> Source:
    """What a stage will leave to the next."""
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in state.evaluated().items()
    }
    return initial.of_run(run.config.model, leaves, _unread)


def _open_data(config: Config) -> None:
    with pipeline.train_stream(config):  # opens its corpora and its tokenizer, and reads nothing
        pass
    for split, kind in itertools.product(config.eval.splits, config.eval.kinds):
        heldout.eval_examples(config, split, kind, limit=1)


def _unread(places: initial.Places):
    raise AssertionError("a stage that was not trained yet has nothing to read")
