"""metrics.jsonl, the truth about a run, and the views of it that were asked for."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from vlm_jax.config import Config
from vlm_jax.data.packing import Info
from vlm_jax.errors import ConfigError
from vlm_jax.schema import plain
from vlm_jax.training import guard

FILE = "metrics.jsonl"
QUARANTINE = "quarantine.jsonl"
SKIPPED = "skipped.jsonl"

# Losses that are means of their own, and what they are means over.
COUNTED = {
    "words": "images",
    "contrastive": "images",
    "pairs": "images",
    "matching": "pairs",
    "told": "tokens",
}

Row = dict[str, Any]


def row(step: int, sums: Mapping[str, Any], info: Info) -> Row:
    """A step's line, from the sums of `objectives.losses` on the host.

    `loss` is nats per supervised token; `objective` is what was minimised (with label smoothing and
    the auxiliary losses); `z`, with z-loss, the mean squared log of the normaliser. A skipped step
    says why, and lacks what is no number.
    """
    weight = max(float(sums["weight"]), 1.0)
    line = {
        "step": step,
        "loss": float(sums["nll"]) / weight,
        "objective": float(sums["loss"]),
        "accuracy": float(sums["correct"]) / weight,
        "grad_norm": float(sums["grad_norm"]),
        "learning_rate": float(sums["learning_rate"]),
        "supervised": float(sums["weight"]),
        "tokens": int(sums["tokens"]),
        "images": int(sums["images"]),
        "padding": 1.0 - int(sums["tokens"]) / int(sums["positions"]),
    }
    if "patches" in sums:
        line["patch_padding"] = 1.0 - int(sums["patches"]) / int(sums["patch_room"])
    if "z" in sums:
        line["z"] = float(sums["z"]) / weight
    for name, counted in COUNTED.items():
        if f"{name}_nll" in sums:
            count = max(float(sums[f"{name}_{counted}"]), 1.0)
            line[f"{name}_loss"] = float(sums[f"{name}_nll"]) / count
        if f"{name}_correct" in sums:
            line[f"{name}_accuracy"] = float(sums[f"{name}_correct"]) / count
    if verdict := int(sums.get("verdict", guard.GOOD)):
        line = {k: v for k, v in line.items() if math.isfinite(v)}
        line["skipped"] = guard.REASONS[verdict]
    if info.rejects:
        rejects = sorted(info.rejects.items())
        line["rejects"] = {f"{source}/{reason}": count for (source, reason), count in rejects}
    if info.truncated:
        line["truncated"] = dict(sorted(info.truncated.items()))
    if info.epochs:
        line["epochs"] = {source: round(epochs, 4) for source, epochs in info.epochs.items()}
    return line


def quarantined(step: int, info: Info) -> list[Row]:
    """A line for every sample drawn for a step that could not be used."""
    return [
        {"step": step, "key": key, "source": source, "reason": reason}
        for key, source, reason in info.rejected
    ]


class Journal:
    """A file of JSON lines, each of some step, that reads like that of an unbroken run.

    Args:
      path: of the file.
      step: where the run stands; lines that a killed process wrote of later steps are dropped.
      by: the field that says how far a line is.
    """

    def __init__(self, path: Path, step: int, by: str = "step"):
        _drop_after(path, step, by)
        self._file = path.open("a")

    def write(self, line: Row) -> None:
        """Appends a line."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Puts all lines on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class View(Protocol):
    """Another place where metrics are shown."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Appends lines to metrics.jsonl and shows them in the views; only the first host does.

    Every host lists the samples that it could not use and the batches that the guard skipped: in
    quarantine.jsonl and skipped.jsonl, or in files of the same kind with its number.

    Args:
      workdir: the run's folder.
      config: the run; `tracking` names the views.
      step: where the run stands.
      drawn: how many batches it drew, which roll-backs do not turn back; None = `step`.
    """

    def __init__(
        self, workdir: str | os.PathLike, config: Config, step: int, drawn: int | None = None
    ):
        workdir, host = Path(workdir), jax.process_index()
        self._file, self._views = None, []
        self._bad = Journal(workdir / _of_host(QUARANTINE, host), step)
        drawn = step if drawn is None else drawn
        self._skipped = Journal(workdir / _of_host(SKIPPED, host), drawn, by="batch")
        if host == 0:
            self._file = Journal(workdir / FILE, step)
            self._views = _views(workdir, config, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        for open_ in (self._bad, self._skipped, *filter(None, [self._file]), *self._views):
            open_.close()

    def write(self, line: Row, show: bool = True) -> None:
        """Appends a line; `show` also sends it to the views."""
        if self._file is None:
            return
        self._file.write(line)
        if show:
            for view in self._views:
                view.write(line["step"], scalars(line))

    def quarantine(self, step: int, info: Info) -> None:
        """Lists what could not be used for a step."""
        for line in quarantined(step, info):
            self._bad.write(line)

    def skip(self, line: Row, batch: int, info: Info) -> None:
        """Lists the documents of a batch that was skipped, so that they can be looked at."""
        wanted = ("step", "skipped", "loss", "objective", "grad_norm")
        figures = {name: line[name] for name in wanted if name in line}
        documents = [list(document) for row in info.documents for document in row]
        self._skipped.write({"batch": batch, **figures, "documents": documents})

    def rolled_back(self, step: int, batch: int, to: int) -> None:
        """Lists a roll-back from `step`, after so many batches, to an earlier step."""
        self._skipped.write({"batch": batch, "step": step, "rolled_back_to": to})

    def sync(self) -> None:
        """Puts all lines on the disk, so that none is older than the checkpoint that follows."""
        self._bad.sync()
        self._skipped.sync()
        if self._file is not None:
            self._file.sync()


def _of_host(name: str, host: int) -> str:
    path = Path(name)
    return f"{path.stem}-{host}{path.suffix}" if host else name


def scalars(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line by name, nested ones as "outer/inner", without the step."""
    found = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif name != "step" and not isinstance(value, str):
            found[f"{prefix}{name}"] = float(value)
    return found


def _drop_after(path: Path, step: int, by: str) -> None:
    """Keeps the whole lines up to `step`; the file is replaced in one piece."""
    if not path.exists():
        return
    whole = path.with_suffix(".tmp")
    with path.open() as old, whole.open("w") as new:
        for line in old:
            if line.endswith("\n") and json.loads(line)[by] <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    whole.replace(path)


class TensorBoard:
    """Event files in workdir/tensorboard."""

    def __init__(self, workdir: Path, config: Config, step: int):
        import tensorboardX

        # What was logged after the step we continue from is hidden.
        folder, purge = str(workdir / "tensorboard"), step + 1 if step else None
        self._writer = tensorboardX.SummaryWriter(folder, purge_step=purge)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; its id is kept in the workdir, so that it is continued."""

    def __init__(self, workdir: Path, config: Config, step: int):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"config.tracking.wandb is {config.tracking.wandb!r}, but wandb is not installed; "
                'install the extra "tracking", or leave it ""'
            ) from error

        kept = workdir / "wandb_id"
        self._run = wandb.init(
            project=config.tracking.wandb,
            name=config.name,
            id=kept.read_text() if kept.exists() else None,
            resume="allow",
            dir=str(workdir),
            config=plain(config),
        )
        kept.write_text(self._run.id)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def _views(workdir: Path, config: Config, step: int) -> list[View]:
    """The views that were asked for."""
    asked = {TensorBoard: config.tracking.tensorboard, WandB: config.tracking.wandb}
    return [view(workdir, config, step) for view, wanted in asked.items() if wanted]
