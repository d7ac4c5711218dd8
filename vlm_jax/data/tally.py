"""Counts over training batches: what each source gives, what is padding, how long documents are."""

import collections
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_jax.batch import Batch, Images
from vlm_jax.data.packing import Info

# Of sources, in the order in which they come.
COLOURS = ("#2563eb", "#ea580c", "#7c3aed", "#0d9488", "#db2777", "#ca8a04", "#0891b2", "#4b5563")
STYLE = {
    "axes.edgecolor": "#d1d5db",
    "axes.labelcolor": "#1f2937",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 10,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
}
BINS = 40  # of lengths


class Span(NamedTuple):
    """A document where it stands in a batch.

    Attributes:
      row, segment: where.
      key, source: of its Example.
      places: its positions in the row.
      slots: its images' slots of the row.
    """

    row: int
    segment: int
    key: str
    source: str
    places: Int[np.ndarray, " L"]
    slots: tuple[int, ...]


def spans(batch: Batch, info: Info, row: int, visual_tokens: int) -> list[Span]:
    """The documents of a row, in order.

    Args:
      batch, info: as a stream gives them.
      row: which.
      visual_tokens: of an image, Q.
    """
    found = []
    for segment, (key, source) in enumerate(info.documents[row], start=1):
        places = np.flatnonzero(batch.segments[row] == segment)
        seen = batch.visual_index[row, places] // visual_tokens  # -1 stays below 0
        slots = {*batch.image_index[row, places].tolist(), *seen.tolist()}
        slots = tuple(sorted(n for n in slots if n >= 0))
        found.append(Span(row, segment, key, source, places, slots))
    return found


class Tally:
    """What some batches hold together.

    Attributes:
      sources: by source, how many "documents", those that teach nothing ("unlearned"), "images",
        "tokens", of which "visual" and "supervised", and the sum of their loss weights ("weight").
      rejects: by (source, reason).
      weights: tokens by loss weight, padding left out.
      room, used: of "rows", "tokens", "image slots" and the patches of encoders that take them.
      lengths, images: of every document, by source.
    """

    def __init__(self, visual_tokens: int):
        self._visual_tokens = visual_tokens
        self.batches = 0
        self.sources = collections.defaultdict(collections.Counter)
        self.rejects = collections.Counter()
        self.weights = collections.Counter()
        self.room, self.used = collections.Counter(), collections.Counter()
        self.lengths = collections.defaultdict(list)
        self.images = collections.defaultdict(list)

    def add(self, batch: Batch, info: Info) -> None:
        """Counts one more batch."""
        self.batches += 1
        self.rejects.update(info.rejects)
        there = batch.segments > 0
        self.weights.update(batch.loss_weights[there].tolist())
        self._count("rows", there.any(axis=1))
        self._count("tokens", there)
        self._count("image slots", (batch.images.grids > 0).all(axis=-1))
        for n, images in enumerate((batch.images, *batch.extra_images), start=1):
            self._count_patches(images, f" of encoder {n}" if batch.extra_images else "")
        for row in range(len(info.documents)):
            for span in spans(batch, info, row, self._visual_tokens):
                self._count_document(batch, span)

    def _count(self, name: str, used: np.ndarray) -> None:
        self.room[name] += used.size
        self.used[name] += int(used.sum())

    def _count_patches(self, images: Images, whose: str) -> None:
        if images.patches is not None:
            self._count("patches" + whose, images.patch_images >= 0)

    def _count_document(self, batch: Batch, span: Span) -> None:
        weights = batch.loss_weights[span.row, span.places]
        visual = batch.visual_index[span.row, span.places] >= 0
        self.sources[span.source].update(
            documents=1,
            unlearned=int(not weights.any()),
            images=len(span.slots),
            tokens=len(span.places),
            visual=int(visual.sum()),
            supervised=int((weights > 0).sum()),
            weight=float(weights.sum()),
        )
        self.lengths[span.source].append(len(span.places))
        self.images[span.source].append(len(span.slots))

    def padding(self, name: str) -> float:
        """Which share of the room is left empty; 0 where there is no room."""
        return 1 - self.used[name] / self.room[name] if self.room[name] else 0.0

    def total(self, name: str) -> float:
        """Of all sources."""
        return sum(counts[name] for counts in self.sources.values())

    def colour(self, source: str) -> str:
        """Of a source on the page."""
        return COLOURS[list(self.sources).index(source) % len(COLOURS)]

    @matplotlib.rc_context(STYLE)
    def histograms(self) -> bytes:
        """Tokens and images of a document by source, as PNG."""
        # Without pyplot: that would choose a backend for the whole process.
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        lengths, images = figure.subplots(1, 2)
        longest = max((n for found in self.lengths.values() for n in found), default=1)
        most = max((n for found in self.images.values() for n in found), default=0)
        edges = np.unique(np.linspace(0, longest + 1, BINS + 1).round())
        self._histogram(lengths, list(self.lengths.values()), edges, "Tokens of a document")
        edges = np.arange(most + 2) - 0.5
        self._histogram(images, list(self.images.values()), edges, "Images of a document")
        images.xaxis.get_major_locator().set_params(integer=True)
        file = io.BytesIO()
        figure.savefig(file, dpi=110)
        return file.getvalue()

    def _histogram(self, axes: Axes, found: Sequence[list[int]], edges: np.ndarray, title: str):
        colours = [self.colour(source) for source in self.sources]
        axes.hist(found, edges, stacked=True, color=colours)
        axes.set_title(title)
        axes.set_ylabel("documents")
        axes.yaxis.get_major_locator().set_params(integer=True)
