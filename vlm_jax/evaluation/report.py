"""What a run learned, to look at: report.html, its PNGs, and the score table of the terminal.

Everything is read from the run's folder (metrics.jsonl, config.json, scores.json, samples/), so a
report can be written again at any time and for any run.
"""

import base64
import collections
import dataclasses
import io
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import rich.box
import rich.console
import rich.table

from vlm_jax.errors import StorageError
from vlm_jax.evaluation import figures
from vlm_jax.evaluation.scores import MODEL, Score, Scores

Row = dict[str, Any]

# Baseline columns; of several systems that share a beginning the strongest one is shown.
COLUMNS = (
    ("text only", "without images"),
    ("majority", "majority answer"),
    ("pixels all", "nearest pixels"),
    ("pixels other", "nearest, other styles"),
)
METRICS = {  # title, unit, factor, decimals, whether more is better
    "exact": ("exact match", " %", 100, 1, True),
    "accuracy": ("accuracy", " %", 100, 1, True),
    "cider": ("CIDEr", "", 1, 2, True),
    "loss": ("loss", "", 1, 2, False),
    "gap": ("seeing gap", "", 1, 2, True),
}
ANSWERS = ("exact", "accuracy")  # shares of right answers
SHEET = 24  # pictures of each split on the sheet
QUESTIONS = 8  # samples of each other kind
VALIDATION = "validation"  # serves choices, so it is not what a report shows first


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure of the table: the value, its interval, and how the model compares with it.

    Attributes:
      value, interval: as text; empty where there is no such score.
      verdict: "better" or "worse" where the paired interval of the model's gain excludes 0, else
        "even"; empty for the model itself.
      gain: the model's gain with its interval, as text.
    """

    value: str = ""
    interval: str = ""
    verdict: str = ""
    gain: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: what was measured on what, the model's cell, the baselines' cells."""

    kind: str
    split: str
    metric: str
    subset: str
    count: int
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """The metric as people read it."""
        title, unit, *_ = METRICS[self.metric]
        return title + unit if self.subset == "all" else f"{title}{unit}, {self.subset}"


class Summary(NamedTuple):
    """Lines about the same examples: right answers, loss, and seeing gap (None without images)."""

    right: Line
    loss: Line
    gap: Line | None


MARKS = {"better": "▲", "worse": "▼", "even": "≈", "": ""}
MARK_STYLES = {"better": "green", "worse": "red", "even": "yellow", "": ""}


def write(workdir: str | Path) -> Path:
    """Writes report.html, curves.png, sheet.png and attention.png into a run's folder.

    Returns:
      The path of report.html.

    Raises:
      StorageError: the run has no scores.json yet.
    """
    workdir = Path(workdir)
    if not (workdir / "scores.json").exists():
        raise StorageError(
            f"{workdir} has no scores.json; expected the folder of a run that ended: give its "
            "--workdir to the training command again, which finishes it"
        )
    scores = Scores.from_json((workdir / "scores.json").read_text())
    shown = draw(workdir, scores, read_jsonl(workdir / "metrics.jsonl"))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm_jax.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"spoken": figures.spoken, "data_uri": lambda p: data_uri(workdir / p)}
    page = environment.get_template("report.html").render(
        scores=scores,
        config=read_config(workdir),
        tiles=tiles(scores),
        summaries=summaries(scores),
        lines=lines(scores),
        columns=[title for _, title in COLUMNS],
        marks=MARKS,
        figures=shown,
        captions=caption_groups(workdir, scores),
        questions=question_groups(workdir, scores),
    )
    path = workdir / "report.html"
    path.write_text(page)
    return path


def draw(workdir: Path, scores: Scores, metrics: Sequence[Row]) -> list[str]:
    """Draws the PNGs that there is something to draw for; returns their names."""
    names = []

    def put(name: str, figure: figures.Figure) -> None:
        figures.save(figure, workdir / name)
        names.append(name)

    if any("loss" in row for row in metrics):
        put("curves.png", curves(scores, metrics))
    groups = caption_groups(workdir, scores)
    if groups:
        titled = {figures.spoken(split): rows for split, rows in groups.items()}
        put("sheet.png", figures.sheet(titled, workdir))
    attended = workdir / "samples" / "attention.json"
    rows = json.loads(attended.read_text()) if attended.exists() else []
    rows = [row for row in rows if row["split"] in _shown_splits(scores)]
    if rows:
        put("attention.png", figures.attention(rows, workdir))
    return names


def curves(scores: Scores, metrics: Sequence[Row]) -> figures.Figure:
    """The loss curves of a run from its lines of metrics."""
    kind = scores.kinds[0]
    splits, first = scores.splits, scores.splits[0]

    def lines_of(names: Mapping[str, str]) -> dict[str, figures.Line]:
        found = {label: series(metrics, name) for label, name in names.items()}
        return {label: line for label, line in found.items() if line[0]}

    blind = {
        s.split: s.value
        for s in scores.rows
        if (s.kind, s.metric, s.system, s.subset) == (kind, "loss", "text only", "all")
    }
    # The objective may hold more (label smoothing, auxiliary losses); held-out losses are plain.
    plain = "nll" if any("nll" in row for row in metrics) else "loss"
    return figures.curves(
        series(metrics, plain),
        lines_of({split: f"eval/{split}/{kind}/loss" for split in splits}),
        lines_of({split: f"eval/{split}/{kind}/gap" for split in splits}),
        lines_of({kind: f"eval/{first}/{kind}/loss" for kind in scores.kinds}),
        blind,
        (figures.spoken(kind), figures.spoken(first)),
    )


def series(metrics: Iterable[Row], name: str) -> figures.Line:
    """Steps and values of one metric; a step logged twice (by a continued run) counts once."""
    values = {row["step"]: row[name] for row in metrics if name in row}
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def read_jsonl(path: Path) -> list[Row]:
    """The lines of a JSON-lines file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def read_config(workdir: Path) -> str:
    """The run's config.json, indented."""
    path = workdir / "config.json"
    return json.dumps(json.loads(path.read_text()), indent=2) if path.exists() else ""


def data_uri(path: Path) -> str:
    """A PNG as a URI that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def samples(workdir: Path, split: str, kind: str, most: int) -> list[Row]:
    """Samples of a split and kind whose pictures were kept: drawn by chance, not chosen."""
    rows = read_jsonl(workdir / "samples" / f"{split}-{kind}.jsonl")
    return [row for row in rows if row["images"]][:most]


def caption_groups(workdir: Path, scores: Scores) -> dict[str, list[Row]]:
    """Captioned pictures by split."""
    found = {s: samples(workdir, s, "caption", SHEET) for s in _shown_splits(scores)}
    return {split: rows for split, rows in found.items() if rows}


def question_groups(workdir: Path, scores: Scores) -> list[tuple[str, str, list[Row]]]:
    """Questions and answers of the other kinds: kind, split and samples."""
    shown = _shown_splits(scores)[:1]
    found = [
        (kind, split, samples(workdir, split, kind, QUESTIONS))
        for kind in scores.kinds
        for split in shown
        if kind != "caption"
    ]
    return [group for group in found if group[2]]


def _shown_splits(scores: Scores) -> list[str]:
    return [s for s in scores.splits if s != VALIDATION] or list(scores.splits)


def tiles(scores: Scores) -> list[tuple[str, str, list[str]]]:
    """The few figures to read first: title, value, what to compare it with."""
    split, kind = _shown_splits(scores)[0], scores.kinds[0]
    found = []
    for line in lines(scores):
        if (line.split, line.kind, line.subset) == (split, kind, "all"):
            title, unit, *_ = METRICS[line.metric]
            beside = [
                f"{name} {cell.value} {MARKS[cell.verdict]}"
                for (_, name), cell in zip(COLUMNS, line.cells[1:], strict=True)
                if cell.value
            ]
            hints = beside or ["wrong image − right image, nats"]
            found.append((f"{title}, {figures.spoken(split)}", line.cells[0].value + unit, hints))
    return found


def summaries(scores: Scores) -> list[Summary]:
    """One entry per kind and split; captions once more without flags."""
    shown = {(x.kind, x.split, x.metric, x.subset): x for x in lines(scores)}
    return [
        Summary(
            line,
            shown[line.kind, line.split, "loss", line.subset],
            shown.get((line.kind, line.split, "gap", line.subset)),
        )
        for line in shown.values()
        if line.metric in ANSWERS and (line.subset == "all" or line.kind == "caption")
    ]


def lines(scores: Scores) -> list[Line]:
    """The score table: by kind, split, metric and subset."""
    groups: dict[tuple, list[Score]] = collections.defaultdict(list)
    for score in scores.rows:
        groups[score.kind, score.split, score.metric, score.subset].append(score)
    splits = [*_shown_splits(scores), VALIDATION]
    metrics = list(METRICS)

    def order(item: tuple) -> tuple:
        kind, split, metric, subset = item
        place = (scores.kinds.index(kind), splits.index(split), metrics.index(metric))
        return (*place, subset != "all")

    return [_line(key, groups[key]) for key in sorted(groups, key=order)]


def _line(key: tuple[str, str, str, str], group: Sequence[Score]) -> Line:
    kind, split, metric, subset = key
    *_, more = METRICS[metric]
    best = max if more else min
    cells = []
    for beginning in (MODEL, *(beginning for beginning, _ in COLUMNS)):
        found = [score for score in group if score.system.startswith(beginning)]
        # Of two sides of pixels the stronger baseline is shown.
        cells.append(_cell(best(found, key=lambda score: score.value)) if found else Cell())
    return Line(kind, split, metric, subset, group[0].count, tuple(cells))


def _cell(score: Score) -> Cell:
    _, _, factor, decimals, more = METRICS[score.metric]

    def number(value: float, sign: str = "") -> str:
        return f"{factor * value:{sign}.{decimals}f}"

    interval = f"{number(score.low)}–{number(score.high)}"
    if score.gain is None:
        return Cell(number(score.value), interval)
    low, high = (score.gain_low, score.gain_high) if more else (-score.gain_high, -score.gain_low)
    verdict = "better" if low > 0 else "worse" if high < 0 else "even"
    gain, *ends = (number(g, "+") for g in (score.gain, score.gain_low, score.gain_high))
    return Cell(number(score.value), interval, verdict, f"{gain} ({ends[0]} to {ends[1]})")


def table(scores: Scores, width: int = 100) -> str:
    """The scores as text, in colour where the output is a terminal; report.html has all of them.

    A baseline is marked by how the model compares with it: ▲ better, ▼ worse, ≈ no difference that
    a paired 95 % interval could tell.
    """
    colours = sys.stdout.isatty()
    console = rich.console.Console(file=io.StringIO(), width=width, force_terminal=colours)
    found = summaries(scores)
    console.print(_answers(found))
    console.print(_nats([summary for summary in found if summary.right.subset == "all"]))
    console.print("The model is ▲ better than, ▼ worse than, ≈ not told apart from a baseline.")
    return console.file.getvalue()


def _answers(found: Sequence[Summary]) -> rich.table.Table:
    used = used_columns([summary.right for summary in found])
    titles = ("n", "model", *(textwrap.fill(COLUMNS[i][1], 9) for i in used))
    rows = [
        (right, str(right.count), _stated(right.cells[0]), *map(_marked, _baselines(right, used)))
        for right, _, _ in found
    ]
    return _grid("Right answers, % (95 % interval)", titles, rows)


def used_columns(found: Iterable[Line]) -> list[int]:
    """Which of COLUMNS have a figure in any of these lines."""
    found = list(found)
    return [i for i in range(len(COLUMNS)) if any(line.cells[i + 1].value for line in found)]


def _baselines(line: Line, used: Sequence[int]) -> list[Cell]:
    return [line.cells[i + 1] for i in used]


def _nats(found: Sequence[Summary]) -> rich.table.Table:
    rows = [
        (
            loss,
            _stated(loss.cells[0]),
            _marked(loss.cells[1]),
            _stated(gap.cells[0] if gap else Cell()),
        )
        for _, loss, gap in found
    ]
    titles = ("loss", "without\nimages", "seeing gap")
    return _grid("Nats per answer token (95 % interval)", titles, rows)


def _grid(title: str, titles: Sequence[str], rows: Iterable[tuple]) -> rich.table.Table:
    """A table of right-aligned cells; each row starts with the line that names it."""
    grid = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for name in ("kind", "split"):
        grid.add_column(name, no_wrap=True)
    for name in titles:
        grid.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for line, *cells in rows:
        kind = line.kind if line.kind != previous else ""
        split = line.split if line.subset == "all" else f"  {line.subset}"
        grid.add_row(figures.spoken(kind), figures.spoken(split), *cells)
        previous = line.kind
    return grid


def _stated(cell: Cell) -> str:
    return f"[bold]{cell.value}[/] ({cell.interval})" if cell.value else ""


def _marked(cell: Cell) -> str:
    style = MARK_STYLES[cell.verdict]
    return f"{cell.value} [{style}]{MARKS[cell.verdict]}[/]" if style else cell.value
