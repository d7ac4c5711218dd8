"""Runs in stages: each stage is a run in a folder of its own that starts from the last one's.

`workdir/config.json` lists the stages, `workdir/1-NAME`, `workdir/2-NAME` and so on are the folders
of plain runs. A stage has ended once it has a report, the last thing that a run writes.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_jax import config as configs
from vlm_jax.config import Config, Init, Model
from vlm_jax.errors import ConfigError, StorageError
from vlm_jax.models import params

CONFIG, CHECKPOINTS, REPORT = "config.json", "checkpoints", "report.html"


@dataclasses.dataclass(frozen=True)
class Run:
    """A stage as a run.

    Attributes:
      folder: its own.
      config: its config, `init` included: what `main` would be given for it alone.
    """

    folder: Path
    config: Config

    @property
    def ended(self) -> bool:
        """Whether it was trained and scored."""
        return (self.folder / REPORT).exists()

    @property
    def begun(self) -> bool:
        """Whether it has a checkpoint."""
        folder = self.folder / CHECKPOINTS
        return folder.is_dir() and any(folder.iterdir())


def of(config: Config, workdir: Path) -> tuple[Run, ...]:
    """The stages of a config as runs below `workdir`, each but the first with the last as `init`.

    Raises:
      ConfigError: a stage's values contradict each other, or its model has nothing of the last's.
    """
    runs: list[Run] = []
    folders = _folders(workdir, [stage.name for stage in config.stages])
    for folder, stage in zip(folders, configs.walked(config), strict=True):
        if runs:
            inherited = tuple(_inherited(runs[-1], stage))
            if not inherited:
                raise ConfigError(f"{stage.name} has no part of {runs[-1].config.name}'s model")
            stage = dataclasses.replace(stage, init=inherited + stage.init)
        runs.append(Run(folder, stage))
    return tuple(runs)


def _folders(workdir: Path, names: list[str]) -> list[Path]:
    return [workdir / f"{number}-{name}" for number, name in enumerate(names, 1)]


def _inherited(last: Run, config: Config) -> Iterator[Init]:
    """The whole of the last stage, or where models differ the parts that both have.

    What the stage takes from elsewhere is left out.
    """
    named = {init.part for init in config.init}
    own, theirs = _parts(config.model), _parts(last.config.model)
    shared = [part for part in own if part in theirs and part not in named]
    if shared == own:
        yield Init(str(last.folder))
        return
    for part in shared:
        yield Init(str(last.folder), part)


def _parts(model: Model) -> list[str]:
    """What `Init.part` can name: the first names of parameters' paths."""
    found = {}
    for path in params.abstract(model):
        first, second, *_ = path.split("/")
        found[f"{first}/{second}" if first == "extra_encoders" else first] = None
    return list(found)


def latest(workdir: Path) -> Path:
    """The folder to read a model from: of a run in stages the last that has ended, else its own.

    Raises:
      StorageError: none of the stages has ended.
    """
    folders = _folders(workdir, _listed(workdir))
    ended = [folder for folder in folders if (folder / REPORT).exists()]
    if folders and not ended:
        raise StorageError(
            f"{workdir} is a run in stages of which none has ended; expected one that has: give "
            f"its --workdir to the training command again, or name a stage, {folders[0]}"
        )
    return ended[-1] if ended else workdir


def _listed(workdir: Path) -> list[str]:
    """The names of the stages of what `workdir` holds; none where it is another run or nothing."""
    try:
        stages = json.loads((workdir / CONFIG).read_text())["stages"]
        return [stage["name"] for stage in stages]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_folder(config: Config, workdir: Path) -> None:
    """Raises ConfigError where a run would share `workdir` with one of another structure."""
    alone = Run(workdir, config)
    if config.stages and alone.begun:
        raise ConfigError(f"{workdir} holds a run without stages; give this one another --workdir")
    if not config.stages and _listed(workdir):
        raise ConfigError(
            f"{workdir} holds a run in stages, {', '.join(_listed(workdir))}; give this one "
            "another --workdir"
        )


def check_order(runs: Sequence[Run]) -> None:
    """Raises ConfigError where a stage began and the one before it would be trained anew."""
    for before, run in itertools.pairwise(runs):
        if run.begun and not before.begun:
            raise ConfigError(
                f"{run.folder} began from another {before.folder.name} than the one that is to be "
                "trained now; move it away, or give this run a --workdir of its own"
            )
