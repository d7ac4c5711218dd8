"""The report's drawings: loss curves, a sheet of pictures with captions, connector attention."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

RIGHT, WRONG, INK, PALE = "#15803d", "#b91c1c", "#1f2937", "#9ca3af"
# Training is grey; splits take these in the order of the config, kinds the rest of the circle.
COLOURS = ("#0d9488", "#2563eb", "#ea580c", "#7c3aed", "#db2777", "#ca8a04", "#0891b2", "#4b5563")
STYLE = {
    "axes.edgecolor": "#d1d5db",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#eef0f3",
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
}
PEAK_QUERIES = 5  # columns of the attention figure

Line = tuple[Sequence[int], Sequence[float]]
Row = Mapping[str, Any]


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    figure.savefig(path, dpi=130, bbox_inches="tight")


def grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches and its axes [rows, columns].

    Without pyplot: that would choose a backend for the whole process, a notebook's included.
    """
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


@matplotlib.rc_context(STYLE)
def curves(
    train: Line,
    losses: Mapping[str, Line],
    gaps: Mapping[str, Line],
    kinds: Mapping[str, Line],
    text_only: Mapping[str, float],
    titles: tuple[str, str],
) -> Figure:
    """Losses and the seeing gap over the optimizer's steps.

    Args:
      train: the training loss, over all kinds.
      losses, gaps: held-out loss and seeing gap by split.
      kinds: held-out loss by kind, on one split.
      text_only: loss of the model without images by split.
      titles: what `losses` and `kinds` are about.
    """
    panels = 2 + (len(kinds) > 1)
    figure, (axes,) = grid(1, panels, (5.2 * panels, 3.9))
    colours = dict(zip(losses, COLOURS, strict=False))
    axes[0].plot(*train, color=PALE, alpha=0.35, linewidth=1)
    axes[0].plot(train[0], smooth(train[1]), color="#6b7280", label="training, all kinds")
    for split, line in losses.items():
        axes[0].plot(*line, color=colours[split], marker="o", markersize=3, label=spoken(split))
        if split in text_only:
            axes[0].axhline(text_only[split], color=colours[split], linestyle=":", linewidth=1.2)
    if text_only:
        axes[0].plot([], [], color=PALE, linestyle=":", label="the same without images")
    _finish(axes[0], f"Loss, {titles[0]}", "nats per answer token")
    for split, line in gaps.items():
        axes[1].plot(*line, color=colours[split], marker="o", markersize=3, label=spoken(split))
    axes[1].axhline(0, color=PALE, linewidth=1)
    _finish(axes[1], "Seeing gap, " + titles[0], "nats: wrong image − right image")
    if len(kinds) > 1:
        for (kind, line), colour in zip(kinds.items(), itertools.cycle(COLOURS)):
            axes[2].plot(*line, color=colour, marker="o", markersize=3, label=spoken(kind))
        _finish(axes[2], f"Loss by kind, {titles[1]}", "nats per answer token")
    return figure


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8.5)


def smooth(values: Sequence[float]) -> Float[np.ndarray, " N"]:
    """An exponential mean over about a thirtieth of the curve, without the lag of its start."""
    decay = np.exp(-30 / max(len(values), 31))
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return np.array(smoothed)


@matplotlib.rc_context(STYLE)
def sheet(groups: Mapping[str, Sequence[Row]], folder: Path, columns: int = 8) -> Figure:
    """Pictures with the model's words under them: green is right, red is wrong, with the truth.

    Args:
      groups: samples by title; a sample has "images", "answer", "reference" and "right".
      folder: where the samples' image paths start.
      columns: pictures per line.
    """
    lines = [
        (title if start == 0 else "", rows[start : start + columns])
        for title, rows in groups.items()
        for start in range(0, len(rows), columns)
    ]
    count = max(len(lines), 1)
    figure, axes = grid(count, columns, (1.75 * columns, 2.35 * count))
    for line, (title, rows) in zip(axes, lines, strict=False):
        for axis in line:
            axis.axis("off")
        line[0].set_title(title, loc="left", fontsize=12, pad=14)
        for axis, row in zip(line, rows, strict=False):
            _picture(axis, row, folder)
    return figure


def _picture(axes: Axes, row: Row, folder: Path) -> None:
    if row["images"]:
        axes.imshow(Image.open(folder / row["images"][0]).convert("RGB"), interpolation="nearest")
    place = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 8}
    answer, lines = _wrapped(row["answer"] or "(nothing)")
    axes.text(0.5, -0.03, answer, color=RIGHT if row["right"] else WRONG, weight="bold", **place)
    if not row["right"]:
        truth, _ = _wrapped(row["reference"])
        axes.text(0.5, -0.03 - 0.11 * lines, truth, color="#6b7280", **place)


def _wrapped(text: str, width: int = 19, most: int = 2) -> tuple[str, int]:
    """A text on at most `most` lines, and how many it takes."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    lines = textwrap.wrap(printable, width, max_lines=most, placeholder=" …") or [""]
    # A dollar would start mathematics.
    return "\n".join(lines).replace("$", r"\$"), len(lines)


@matplotlib.rc_context(STYLE)
def attention(rows: Sequence[Row], folder: Path) -> Figure:
    """Each picture, where its visual tokens look on average, and the most pointed ones of them.

    Args:
      rows: samples with "image", "answer", "right", "grid" (rows and columns of patches) and
        "maps" [Q, P].
      folder: where the image paths start.
    """
    columns = 2 + min(PEAK_QUERIES, max(len(row["maps"]) for row in rows))
    figure, axes = grid(len(rows), columns, (1.75 * columns, 1.98 * len(rows)))
    for line, row in zip(axes, rows, strict=True):
        picture = np.asarray(Image.open(folder / row["image"]).convert("RGB"))
        maps = np.array(row["maps"]).reshape(-1, *row["grid"])
        chosen = pointed(maps, PEAK_QUERIES)
        panels = [None, maps.mean(axis=0), *maps[chosen]]
        for axis, panel in zip(line, panels, strict=False):
            axis.imshow(picture if panel is None else spotlight(picture, panel))
        for axis in line:
            axis.axis("off")
        title, _ = _wrapped(row["answer"] or "(nothing)", 24, 1)
        line[0].set_title(title, loc="center", fontsize=8.5, color=RIGHT if row["right"] else WRONG)
        line[1].set_title("all tokens", loc="center", fontsize=8.5, weight="normal")
        for axis, query in zip(line[2:], chosen, strict=False):
            axis.set_title(f"token {query}", loc="center", fontsize=8.5, weight="normal")
    return figure


def pointed(maps: Float[np.ndarray, "Q h w"], count: int) -> list[int]:
    """Queries with the least spread attention, passing over those that look where one does."""
    flat = maps.reshape(len(maps), -1) / (maps.sum(axis=(1, 2))[:, None] + 1e-12)
    entropy = -(flat * np.log(flat + 1e-12)).sum(axis=1)
    order = [int(query) for query in np.argsort(entropy)]
    chosen: list[int] = []
    for query in order:
        overlaps = [np.minimum(flat[query], flat[other]).sum() for other in chosen]
        if all(overlap < 0.5 for overlap in overlaps):
            chosen.append(query)
    # Where all look alike, the most pointed ones serve.
    return [*chosen, *(query for query in order if query not in chosen)][:count]


def spotlight(
    picture: np.ndarray, weights: Float[np.ndarray, "h w"], tint: tuple = (30, 27, 75)
) -> np.ndarray:
    """The picture in full light where weights are largest, darkened towards `tint` elsewhere."""
    height, width = picture.shape[:2]
    weights = (weights - weights.min()) / (np.ptp(weights) + 1e-12)
    light = Image.fromarray(weights.astype(np.float32))
    light = np.asarray(light.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    light = (0.15 + 0.85 * light)[..., None]
    return (picture * light + np.array(tint) * (1 - light)).astype(np.uint8)


def spoken(name: str) -> str:
    """A split or kind as people read it."""
    return name.replace("_", " ")
