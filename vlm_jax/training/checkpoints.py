"""Checkpoints of a run: state, data position and config, saved together and asynchronously.

A checkpoint is one folder of `workdir/checkpoints`, put in place by a rename when it is complete.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from vlm_jax import config as configs
from vlm_jax import schema
from vlm_jax.config import Config
from vlm_jax.errors import ConfigError, StorageError
from vlm_jax.training import stages
from vlm_jax.training.stages import CHECKPOINTS as FOLDER
from vlm_jax.training.stages import CONFIG
from vlm_jax.training.state import State

UNREADABLE = "unreadable"

# What may differ between a run and its continuation: nothing here changes what is learned, but for
# the rounding of sums that another mesh brings.
FREE = (
    "name",
    "parallel",
    "checkpoint",
    "eval",
    "train.log_every",
    "tracking",
    "data.threads",
    "data.workers",
    "data.bad_samples",
)


class Stream(Protocol):
    """The data, as far as a checkpoint is concerned; the state is JSON."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run; a context manager, so that a save in progress ends well.

    Args:
      workdir: the run's folder, which every host can reach.
      config: the run.
    """

    def __init__(self, workdir: str | os.PathLike, config: Config):
        self._workdir, self._config = Path(workdir).resolve(), config
        self._newest: int | None = None
        self._orbax = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with _storage(f"finishing a checkpoint in {self._workdir}"):
            self._orbax.close()

    def save(self, step: int, state: State, stream: Stream) -> None:
        """Saves without waiting for the disk; the buffers of `state` may be reused at once.

        Raises:
          StorageError: this save could not be started, or the one before it failed.
        """
        if step == self._newest:
            return
        with _storage(f"saving step {step} in {self._workdir}"):
            self._orbax.save_checkpointables_async(
                step,
                _items(state),
                force=True,
                overwrite=True,
                custom_metadata={"config": as_json(self._config), "data": stream.get_state()},
            )
        self._newest = step

    def restore(self, abstract: State, stream: Stream, newest: int | None = None) -> State | None:
        """The state of the newest good checkpoint on the devices of `abstract`, or None.

        `stream` is set to where that checkpoint's data stood. Checkpoints that cannot be read are
        moved to `workdir/unreadable` once an older one has been restored. With `newest`, those
        after that step are passed over, but for the oldest of all.

        Raises:
          ConfigError: the checkpoint is of another config; names what differs.
          StorageError: there are checkpoints and none can be read.
        """
        broken = []
        for step in self._steps(newest):
            try:
                metadata = _metadata(self._orbax, step)
                restored = self._orbax.load_checkpointables(step, _items(abstract))
            except Exception as error:  # Orbax and TensorStore raise many kinds for a bad file
                broken.append(step)
                print(f"checkpoint {step} cannot be read: {error}", file=sys.stderr)
                continue
            refuse_other_config(metadata["config"], self._config, self._workdir)
            stream.set_state(metadata["data"])
            self._put_aside(broken)
            self._newest = step
            return _state(restored, abstract)
        if broken:
            raise StorageError(
                f"none of the checkpoints {broken} in {self._workdir / FOLDER} can be read; "
                "restore them from a copy, or start in another workdir"
            )
        return None

    def forget(self, after: int) -> None:
        """Deletes the checkpoints of later steps, which a roll-back undid."""
        with _storage(f"deleting checkpoints of {self._workdir}"):
            for step in self._steps():
                if step > after:
                    self._orbax.delete(step)

    def _steps(self, newest: int | None = None) -> list[int]:
        """Those that are saved, the newest first."""
        with _storage(f"finishing a checkpoint in {self._workdir}"):
            self._orbax.wait()
        steps = sorted((saved.step for saved in self._orbax.checkpoints), reverse=True)
        if newest is None:
            return steps
        return [step for step in steps if step <= newest] or steps[-1:]

    def _open(self) -> ocp.training.Checkpointer:
        with _storage(f"opening the checkpoints of {self._workdir}"):
            (self._workdir / FOLDER).mkdir(parents=True, exist_ok=True)
            return ocp.training.Checkpointer(
                epath.Path(self._workdir / FOLDER),
                preservation_policy=_kept(self._config),
                cleanup_tmp_directories=True,  # what a killed process left half-written
            )

    def _put_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self._orbax.close()
        if jax.process_index() == 0:
            for step in steps:
                target = self._workdir / UNREADABLE / str(step)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                (self._workdir / FOLDER / str(step)).rename(target)
        multihost_utils.sync_global_devices("checkpoints put aside")
        self._orbax = self._open()


def _kept(config: Config) -> ocp.training.preservation_policies.PreservationPolicy:
    policies = ocp.training.preservation_policies
    latest = policies.LatestN(max(config.checkpoint.keep, 1))
    milestones = policies.CustomSteps(list(config.checkpoint.milestones))
    return policies.AnyPreservationPolicy([latest, milestones])


def write_config(workdir: str | os.PathLike, config: Config) -> None:
    """Writes `config.json`, in one piece."""
    path = Path(workdir) / CONFIG
    with _storage(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(as_json(config), indent=2) + "\n")
        whole.replace(path)


def load_params(
    workdir: str | os.PathLike,
    step: int | None = None,
    places: Mapping[str, jax.sharding.Sharding] | None = None,
) -> tuple[Config, dict[str, Array]]:
    """The config of a run and its parameters to evaluate by path.

    Args:
      workdir: a run's folder; of one in stages, the last that has ended is read.
      step: which checkpoint; None = the newest.
      places: of the parameters wanted, by path; None = all of them, on this host's first device.

    Raises:
      StorageError: there is no such checkpoint, or it cannot be read.
    """
    here = SingleDeviceSharding(jax.local_devices()[0])
    with _opened(workdir, step) as (orbax, step):
        with _storage(f"reading step {step} of {workdir}"):
            parts = _evaluated(orbax, step)
            wanted = {
                name: {
                    path: jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=here if places is None else places[path]
                    )
                    for path, leaf in part.items()
                    if places is None or path in places
                }
                for name, part in parts.items()
            }
            wanted = {name: part for name, part in wanted.items() if part}
            config = configs.resolve(_metadata(orbax, step)["config"])
            context = ocp.Context()
            context.pytree.loading.partial_load = True
            with context:
                loaded = orbax.load_checkpointables(step, wanted) if wanted else {}
    return config, {path: leaf for part in loaded.values() for path, leaf in part.items()}


def param_shapes(
    workdir: str | os.PathLike, step: int | None = None
) -> tuple[Config, dict[str, jax.ShapeDtypeStruct]]:
    """What `load_params` would give, as shapes and dtypes.

    Raises:
      StorageError: there is no such checkpoint, or it cannot be read.
    """
    with _opened(workdir, step) as (orbax, step):
        with _storage(f"reading step {step} of {workdir}"):
            parts = _evaluated(orbax, step)
            config = configs.resolve(_metadata(orbax, step)["config"])
    return config, {path: leaf for part in parts.values() for path, leaf in part.items()}


def _evaluated(
    orbax: ocp.training.Checkpointer, step: int
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The parts of a checkpoint that `State.evaluated` is made of."""
    stored = orbax.checkpointables_metadata(step).metadata
    learned = "ema" if "ema" in stored else "trainable"
    return {
        name: {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in stored[name].items()
        }
        for name in ("frozen", learned)
        if name in stored
    }


def load_state(
    workdir: str | os.PathLike, step: int, abstract: State, stream: Stream
) -> tuple[State, Mapping[str, Any]]:
    """The state of some run's checkpoint and its config as JSON; the run's folder is only read.

    Args:
      workdir: the run's folder.
      step: which checkpoint.
      abstract: shapes and places of the state.
      stream: set to where that checkpoint's data stood.

    Raises:
      StorageError: there is no such checkpoint, or it cannot be read.
    """
    with _opened(workdir, step) as (orbax, step):
        with _storage(f"reading step {step} of {workdir}"):
            metadata = _metadata(orbax, step)
            restored = orbax.load_checkpointables(step, _items(abstract))
    stream.set_state(metadata["data"])
    return _state(restored, abstract), metadata["config"]


@contextlib.contextmanager
def _opened(
    workdir: str | os.PathLike, step: int | None
) -> Iterator[tuple[ocp.training.Checkpointer, int]]:
    """The checkpoints of a run, which may be running, and the one that was asked for."""
    folder = stages.latest(Path(workdir).resolve()) / FOLDER
    if not folder.is_dir():
        raise StorageError(f"{workdir} is not a run's folder: it has no {FOLDER}/")
    with ocp.training.Checkpointer(epath.Path(folder)) as orbax:
        saved = [checkpoint.step for checkpoint in orbax.checkpoints]
        if not saved or step not in (None, *saved):
            raise StorageError(
                f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}; "
                f"it has {saved or 'none'}"
            )
        yield orbax, max(saved) if step is None else step


def refuse_other_config(
    saved: Mapping[str, Any], config: Config, workdir: Path, free: Sequence[str] = ()
) -> None:
    """Raises ConfigError where `config` would not continue the run that `saved` describes.

    Args:
      saved: its config as JSON.
      config: what is to continue it.
      workdir: its folder.
      free: further fields that may differ.
    """
    old = dict(_flat(as_json(configs.resolve(saved))))
    new = dict(_flat(as_json(config)))
    changed = [
        f"config.{key} was {old.get(key, 'absent')!r} and is {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _free(key, (*FREE, *free))
    ]
    if changed:
        raise ConfigError(
            f"{workdir} holds a run of another config: {'; '.join(changed)}. Continue it with the "
            "old values, or give this run a --workdir of its own"
        )


def _free(key: str, fields: Sequence[str]) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in fields)


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts; lists are values."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else key)


def as_json(config: Config) -> dict[str, Any]:
    """The config as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(schema.plain(config)))


def _items(state: State) -> dict[str, Any]:
    """The parts of a checkpoint; Orbax refuses empty ones."""
    rest = {"step": state.step, "key": state.key, "opt": state.opt, "guard": state.guard}
    parts = {"trainable": state.trainable, "frozen": state.frozen, "ema": state.ema}
    return {name: part for name, part in parts.items() if part} | {"optimizer": rest}


def _state(items: Mapping[str, Any], abstract: State) -> State:
    rest = items["optimizer"]
    return State(
        step=rest["step"],
        trainable=items["trainable"],
        frozen=items.get("frozen", {}),
        opt=rest["opt"],
        ema=None if abstract.ema is None else items["ema"],
        key=rest["key"],
        guard=rest["guard"],
    )


def _metadata(orbax: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
    """What was saved beside the arrays."""
    return orbax.checkpointables_metadata(step).custom_metadata


class _storage:
    """Turns whatever the storage raises into a StorageError that says what was being done."""

    def __init__(self, doing: str):
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, Exception) and not isinstance(error, (ConfigError, StorageError)):
            raise StorageError(f"{self._doing} failed: {error}") from error
