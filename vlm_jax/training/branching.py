"""Branches: a run that starts from the state of another, the trunk, and decays in its own folder.

One trunk with a constant rate gives a whole axis of data sizes: every branch has the parameters of
a run of its length (Hu et al. 2024, MiniCPM; Hägele et al. 2024).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config as configs
from vlm_jax.config import Config, Train
from vlm_jax.errors import ConfigError
from vlm_jax.training import checkpoints, schedules
from vlm_jax.training.checkpoints import Stream
from vlm_jax.training.state import State

FILE = "branch.json"

# What a branch may change: when it ends, and how its rate falls until then.
OWN = (
    *("train.steps", "train.schedule"),
    *("train.decay_steps", "train.decay_shape", "train.end_lr"),
)


@dataclasses.dataclass(frozen=True)
class Branch:
    """Where a run branches off: the trunk's folder and a step of which it has a checkpoint."""

    trunk: Path
    step: int


def ended(config: Config, branch: Branch) -> Config:
    """The config of the branch: it decays from `branch.step` on and then ends.

    Raises:
      ConfigError: the config has no decay.
    """
    if config.train.decay_steps < 1:
        raise ConfigError(
            f"config.train.decay_steps is {config.train.decay_steps}; expected the length of the "
            'decay that starts at the branch, with the schedule "wsd" or "rsqrt"'
        )
    steps = branch.step + config.train.decay_steps
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def check(branch: Branch, workdir: Path) -> None:
    """Raises ConfigError where `workdir` holds a run that is not this branch."""
    path, folder = workdir / FILE, workdir / checkpoints.FOLDER
    there = json.loads(path.read_text()) if path.exists() else None
    if there is None and not (folder.is_dir() and any(folder.iterdir())):
        return
    if there != _note(branch):
        holds = f"a branch of {there['trunk']} at {there['step']}" if there else "another run"
        raise ConfigError(
            f"{workdir} holds {holds}, not a branch of {branch.trunk} at {branch.step}; give this "
            "one a --workdir of its own"
        )


def start(branch: Branch, config: Config, workdir: Path, abstract: State, stream: Stream) -> State:
    """The trunk's state on the devices of `abstract`; `stream` is set to where its data stood.

    `workdir` keeps a note of where it comes from.

    Raises:
      ConfigError: the trunk is of a config that differs in more than its end, or its rate was
        another one before the branch.
      StorageError: there is no such checkpoint, or it cannot be read.
    """
    restored, trunk = checkpoints.load_state(branch.trunk, branch.step, abstract, stream)
    checkpoints.refuse_other_config(trunk, config, branch.trunk, OWN)
    _refuse_other_rates(configs.resolve(trunk).train, config.train, branch)
    if jax.process_index() == 0:
        (workdir / FILE).write_text(json.dumps(_note(branch)) + "\n")
    return restored


def _note(branch: Branch) -> dict[str, Any]:
    return {"trunk": str(branch.trunk), "step": branch.step}


def _refuse_other_rates(old: Train, new: Train, branch: Branch) -> None:
    steps = np.arange(branch.step)
    before, now = (_rates(train, steps) for train in (old, new))
    other = np.flatnonzero(~np.isclose(before, now, rtol=1e-6, atol=0))
    if other.size:
        step = other[0]
        raise ConfigError(
            f"the trunk's learning rate at step {step} was {before[step]:.3e}, the branch's would "
            f"have been {now[step]:.3e}: step {branch.step} of {branch.trunk} is not in a stable "
            'phase of "constant", "wsd" or "rsqrt"; branch earlier'
        )


def _rates(train: Train, steps: np.ndarray) -> np.ndarray:
    rate = schedules.make(train)
    return np.asarray(jax.vmap(lambda step: jnp.asarray(rate(step)))(steps))
