"""The cells of a study, run one after the other, each as a run of `vlm_jax.main` in its own folder.

A cell has a process of its own, so that its peak memory is its own and what goes wrong in one is
not the end of the others.
"""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_jax import config as configs
from vlm_jax import schema
from vlm_jax.config import Config
from vlm_jax.errors import ConfigError, Interrupted, VlmError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      name: its word as a variant of the study's config file.
      config: the run.
      workdir: its folder.
    """

    name: str
    config: Config
    workdir: Path

    @property
    def done(self) -> bool:
        """Whether the folder holds the scores of this very config."""
        written, scored = self.workdir / "config.json", self.workdir / "scores.json"
        if not (written.exists() and scored.exists()):
            return False
        same = json.loads(written.read_text()) == json.loads(json.dumps(schema.plain(self.config)))
        return same and json.loads(scored.read_text())["step"] == self.config.train.steps


def of(study: Mapping, workdir: Path, only: Sequence[str] = ()) -> list[Cell]:
    """The cells of a config file.

    Args:
      study: what the file defines; `CELLS` names its cells, `get_config` makes each.
      workdir: the study's folder.
      only: the cells that are wanted; all of them by default.

    Raises:
      ConfigError: it is no study, or has no such cell.
    """
    if "CELLS" not in study:
        raise ConfigError("the config file has no CELLS; expected a study, as in configs/studies/")
    known = list(study["CELLS"])
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(f"the study has no cell {unknown[0]!r}; it has: {', '.join(known)}")
    return [
        Cell(name, configs.resolve(study["get_config"](name)), workdir / name)
        for name in known
        if not only or name in only
    ]


def run(file: str, cells: Sequence[Cell]) -> None:
    """Runs the cells that are not done; a cell that was cut off goes on where it stood.

    Raises:
      Interrupted: it was asked to stop.
      VlmError: cells failed; the others were run.
    """
    failed = {}
    for cell in cells:
        if cell.done:
            continue
        print(f"cell {cell.name}: {cell.workdir}", flush=True)
        command = (
            "-m",
            "vlm_jax.main",
            f"--config={file}:{cell.name}",
            f"--workdir={cell.workdir}",
        )
        code = _call((sys.executable, *command))
        if code == Interrupted.exit_code:
            raise Interrupted(f"stopped in cell {cell.name}; the same command continues it")
        if code:
            failed[cell.name] = code
    if failed:
        listed = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        raise _Failed(f"cells failed: {listed}; what they printed stands above", failed)


class _Failed(VlmError):
    """Cells ended with codes of their own; the first one's is passed on."""

    def __init__(self, message: str, codes: Mapping[str, int]):
        super().__init__(message)
        self.exit_code = next(iter(codes.values()))


def _call(command: Sequence[str]) -> int:
    """The exit code of a process that is told whatever signal asks this one to stop.

    It is Interrupted's then, however the process ended: a second signal kills it as it saves.
    """
    asked = []

    def tell(number: int, _) -> None:
        asked.append(number)
        process.send_signal(number)

    # A session of its own: else Ctrl-C reaches it from the terminal too, and a second one kills.
    with subprocess.Popen(command, start_new_session=True) as process:
        before = {number: signal.signal(number, tell) for number in SIGNALS}
        try:
            code = process.wait()
            return Interrupted.exit_code if asked else code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
