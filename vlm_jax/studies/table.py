"""What the cells of a study came to, side by side."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax.evaluation.scores import Score, Scores
from vlm_jax.studies.cells import Cell
from vlm_jax.training.adaptation import readable

# Metrics of the table and how their figures are written.
METRICS = {
    "loss": ("nats per token", "{:.3f}", 1),
    "exact": ("exact match %", "{:.1f}", 100),
    "accuracy": ("accuracy %", "{:.1f}", 100),
    "cider": ("CIDEr", "{:.2f}", 1),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell's figures.

    Attributes:
      cell: its name.
      trained: parameters that train.
      images: pictures seen in training.
      images_per_s: median over the run's readings, without compiling.
      peak_bytes: largest memory, of a device, or of the process where that is a CPU.
      scores: of the model, all examples.
    """

    cell: str
    trained: int
    images: int
    images_per_s: float
    peak_bytes: int
    scores: tuple[Score, ...]


def rows(cells: Sequence[Cell]) -> list[Row]:
    """The figures of the cells that are done."""
    return [row(cell) for cell in cells if cell.done]


def row(cell: Cell) -> Row:
    """A cell's figures, read from its folder."""
    lines = [json.loads(line) for line in (cell.workdir / "metrics.jsonl").open()]
    steps = [line for line in lines if "images" in line]
    timed = [line["time"] for line in steps if "time" in line]
    groups = json.loads((cell.workdir / "adaptation.json").read_text())
    scores = Scores.from_json((cell.workdir / "scores.json").read_text())
    return Row(
        cell.name,
        trained=sum(group["trained"] for group in groups),
        images=sum(line["images"] for line in steps),
        images_per_s=statistics.median([time["images_per_s"] for time in timed] or [0.0]),
        peak_bytes=int(max([time["peak_bytes"] for time in timed] or [0])),
        scores=tuple(s for s in scores.rows if s.system == "model" and s.subset == "all"),
    )


def markdown(found: Sequence[Row]) -> str:
    """A table per split and kind, 95 % intervals in brackets."""
    places = dict.fromkeys((s.split, s.kind) for each in found for s in each.scores)
    return "\n".join(_place(found, *place) for place in places)


def _place(found: Sequence[Row], split: str, kind: str) -> str:
    def of(each: Row) -> dict[str, Score]:
        return {s.metric: s for s in each.scores if (s.split, s.kind) == (split, kind)}

    metrics = [m for m in METRICS if any(m in of(each) for each in found)]
    names = ["cell", "trained", *(METRICS[m][0] for m in metrics)]
    names += ["images seen", "images/s", "peak memory"]
    lines = [f"### {split}, {kind}", "", _line(names), _line(["---"] * len(names))]
    for each in found:
        figures = [_figure(of(each)[m], m) for m in metrics]
        measured = [f"{each.images_per_s:,.1f}", readable(each.peak_bytes)]
        lines.append(
            _line([each.cell, f"{each.trained:,}", *figures, f"{each.images:,}", *measured])
        )
    return "\n".join([*lines, ""])


def _figure(score: Score, metric: str) -> str:
    _, form, factor = METRICS[metric]
    value, low, high = (form.format(x * factor) for x in (score.value, score.low, score.high))
    return f"{value} ({low} to {high})"


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def write(workdir: Path, cells: Sequence[Cell]) -> str:
    """Writes table.md and table.json of the cells that are done; returns the former."""
    found = rows(cells)
    text = markdown(found)
    plain: list[dict[str, Any]] = [dataclasses.asdict(each) for each in found]
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "table.json").write_text(json.dumps(plain, indent=1) + "\n")
    (workdir / "table.md").write_text(text)
    return text
