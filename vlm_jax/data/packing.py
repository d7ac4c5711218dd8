"""Exact packing: whole documents share rows of static shape, and nothing is split or cut."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

from vlm_jax.batch import Batch, Images
from vlm_jax.config import Config
from vlm_jax.data import filling
from vlm_jax.data.documents import Document, Draft
from vlm_jax.data.images import View, Views, dtype, grid_of, normalised, patches_of, put_patches
from vlm_jax.presets.encoders import Encoder

VERSION = 1  # raise it when the same documents would be packed otherwise

Rejected = tuple[str, str, str]  # key, source and reason


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of a Batch: B rows of T tokens and N image slots with S tokens of text each.

    Attributes:
      visual_tokens: per image, Q.
      encoders: all that look at the images.
      pad: id on padding.
      patches: of a row, which its images share as the first encoder sees them; 0 = each slot has
        room of its own.
      dtype: of pixels: bytes, or floats that are normalised (`images.dtype`).
    """

    rows: int
    tokens: int
    images: int
    texts: int
    visual_tokens: int
    encoders: tuple[Encoder, ...]
    pad: int = 0
    patches: int = 0
    dtype: str = "uint8"

    @property
    def room(self) -> tuple[int, ...]:
        """Tokens and images of a row, and patches where they are shared."""
        return (self.tokens, self.images, *((self.patches,) if self.patches else ()))

    def needs(self, document: Document | Draft) -> tuple[int, ...]:
        """What a document takes of `room`."""
        needs = len(document), len(document.sizes)
        if not self.patches:
            return needs
        return *needs, patches_of(document.sizes, self.encoders[0].patch)


def shape_of(config: Config, pad: int, **changes: Any) -> Shape:
    """The shape of a config's training batches, or one that differs in `changes`."""
    shape = Shape(
        rows=config.data.rows,
        tokens=config.data.tokens,
        images=config.data.images_per_row if config.data.images else 0,
        texts=config.data.text_tokens,
        visual_tokens=config.model.visual_tokens,
        encoders=config.model.encoders,
        pad=pad,
        patches=config.data.patches_per_row if config.data.images else 0,
        dtype=dtype(config.data.augment),
    )
    return dataclasses.replace(shape, **changes)


@dataclasses.dataclass(frozen=True)
class Info:
    """What travels beside a Batch, for people and counts.

    Attributes:
      documents: `documents[row][segment - 1]` is (key, source).
      rejects: how many samples drawn for this batch could not be used, by (source, reason).
      rejected: those samples.
      truncated: how many documents of this batch lack their ends, by source.
      epochs: how many times the stream went through each source so far.
    """

    documents: tuple[tuple[tuple[str, str], ...], ...]
    rejects: Mapping[tuple[str, str], int]
    rejected: tuple[Rejected, ...] = ()
    truncated: Mapping[str, int] = dataclasses.field(default_factory=dict)
    epochs: Mapping[str, float] = dataclasses.field(default_factory=dict)


Pending = TypeVar("Pending")


def choose(
    pending: Sequence[Pending],
    size: Callable[[Pending], tuple[int, ...]],
    tokens: int,
    images: int,
    patches: int = 0,
) -> list[int]:
    """Which of the pending documents fill the next row: the oldest and the set that fits it best.

    Best is exact: no other set leaves fewer tokens free, and none of the same length fewer image
    slots. With a budget of patches it is the best of a bounded search (`filling.chosen`). The
    oldest always goes, so that no document waits for ever.

    Args:
      pending: in order of arrival; the first must fit.
      size: (tokens, images) of a document, or (tokens, images, patches).
      tokens, images, patches: what a row holds; without patches they are no budget.

    Returns:
      Positions in `pending`, ascending.
    """
    if not pending:
        return []
    if patches:
        return filling.chosen(list(map(size, pending)), (tokens, images, patches))
    (first_tokens, first_images), *sizes = [size(document) for document in pending]
    reach = _reachable(sizes, tokens - first_tokens, images - first_images)
    left, free = max((sums.bit_length() - 1, n) for n, sums in enumerate(reach[0]) if sums)
    chosen = [0]
    for i, (length, count) in enumerate(sizes, start=1):
        fits = length <= left and count <= free
        if fits and reach[i][free - count] >> (left - length) & 1:
            chosen.append(i)
            left, free = left - length, free - count
    return chosen


def _reachable(sizes: Sequence[tuple[int, int]], tokens: int, images: int) -> list[list[int]]:
    """Bit t of [i][n]: some of `sizes[i:]` have t tokens and n images together (subset sum)."""
    within = (1 << (tokens + 1)) - 1
    reach = [[1] + [0] * images]
    for length, count in reversed(sizes):
        without = reach[-1]
        taken = [0] * count + [sums << length & within for sums in without]
        reach.append([a | b for a, b in zip(without, taken, strict=False)])
    return reach[::-1]


class Place(NamedTuple):
    """Where a document stands in a batch: its row, its tokens there and the slots of its images."""

    row: int
    tokens: slice
    images: slice


def assemble(rows: Sequence[Sequence[Document]], shape: Shape) -> Batch:
    """Rows of documents as one Batch; missing rows are empty.

    Raises:
      ValueError: more rows than the shape has, or a row that does not fit.
    """
    batch, places = begun(rows, shape)
    for place, document in zip(places, itertools.chain(*rows), strict=True):
        show(batch, place, document.views, shape)
    return finished(batch)


def begun(rows: Sequence[Sequence[Document]], shape: Shape) -> tuple[Batch, list[Place]]:
    """A Batch of documents without their images, each of which `show` puts into its place.

    Raises:
      ValueError: more rows than the shape has, or a row that does not fit.
    """
    if len(rows) > shape.rows:
        raise ValueError(f"{len(rows)} rows for a batch of {shape.rows}")
    batch = _empty(shape)
    return batch, [place for n, row in enumerate(rows) for place in _fill(batch, n, row, shape)]


def show(batch: Batch, place: Place, views: Sequence[Views], shape: Shape) -> None:
    """Writes a document's images, as each encoder sees them, after those of the places before it.

    Raises:
      ValueError: they do not fit.
    """
    all_images = (batch.images, *batch.extra_images)
    for images, pictures, encoder in zip(all_images, views, shape.encoders, strict=True):
        for slot, view in enumerate(pictures, start=place.images.start):
            _place(images, place.row, slot, _of(shape.dtype, view, encoder), encoder)


def unlearn(batch: Batch, place: Place) -> None:
    """Leaves nothing to learn of a document."""
    batch.loss_weights[place.row, place.tokens] = 0
    batch.image_texts[place.row, place.images] = 0


def finished(batch: Batch) -> Batch:
    """The batch, when all images are in their places."""
    for images in (batch.images, *batch.extra_images):
        _clear(images)
    return batch


def names(rows: Sequence[Sequence[Document]]) -> tuple[tuple[tuple[str, str], ...], ...]:
    """`Info.documents` of these rows."""
    return tuple(tuple((d.key, d.source) for d in documents) for documents in rows)


def _empty(shape: Shape) -> Batch:
    whole = lambda fill: np.full((shape.rows, shape.tokens), fill, np.int32)  # noqa: E731
    images, *extra_images = (
        _no_images(shape, encoder, 0 if i else shape.patches)
        for i, encoder in enumerate(shape.encoders)
    )
    return Batch(
        tokens=whole(shape.pad),
        segments=whole(0),
        positions=whole(0),
        loss_weights=np.zeros((shape.rows, shape.tokens), np.float32),
        blocks=whole(0),
        visual_index=whole(-1),
        image_index=whole(-1),
        image_texts=np.zeros((shape.rows, shape.images, shape.texts), np.int32),
        images=images,
        extra_images=tuple(extra_images),
    )


def _no_images(shape: Shape, encoder: Encoder, shared: int) -> Images:
    slots = (shape.rows, shape.images)
    grids = np.zeros((*slots, 2), np.int32)
    if encoder.reads == "pixels":
        return Images(grids, pixels=np.empty((*slots, *encoder.size, 3), shape.dtype))
    patches = shared or shape.images * encoder.patches
    places = np.zeros((shape.rows, patches, 2), np.int32)
    if not encoder.max_patches:
        # Every slot owns the same patches in every row; empty ones keep image -1.
        places[:] = np.tile(_positions(encoder.grid), (shape.images, 1))
    return Images(
        grids,
        patches=np.empty((shape.rows, patches, encoder.patch**2 * 3), shape.dtype),
        patch_positions=places,
        patch_images=np.full((shape.rows, patches), -1, np.int32),
        starts=np.zeros(slots, np.int32) if shared else None,
    )


def _fill(batch: Batch, row: int, documents: Sequence[Document], shape: Shape) -> list[Place]:
    """Writes the words of documents one after another into a row, in place."""
    token = image = 0
    places = []
    for segment, document in enumerate(documents, start=1):
        end, last_image = token + len(document), image + len(document.texts)
        if end > shape.tokens or last_image > shape.images:
            raise ValueError(
                f"row {row} needs {end} tokens and {last_image} images for {document.key}; it has "
                f"{shape.tokens} and {shape.images}"
            )
        here = (row, slice(token, end))
        batch.tokens[here] = document.tokens
        batch.segments[here] = segment
        batch.positions[here] = np.arange(len(document))
        batch.loss_weights[here] = document.loss_weights
        batch.blocks[here] = document.blocks
        batch.visual_index[here] = _shifted(document.visual_index, image * shape.visual_tokens)
        batch.image_index[here] = _shifted(document.image_index, image)
        batch.image_texts[row, image:last_image] = document.texts
        places.append(Place(row, here[1], slice(image, last_image)))
        token, image = end, last_image
    return places


@functools.lru_cache(maxsize=1024)
def _positions(grid: tuple[int, int]) -> Int[np.ndarray, "P 2"]:
    """Row and column of each patch, in reading order."""
    return np.indices(grid, np.int32).reshape(2, -1).T


def _clear(images: Images) -> None:
    """Zeros where no image is. The rest was written once: these are a batch's largest arrays."""
    if images.pixels is not None:
        images.pixels[images.grids[..., 0] == 0] = 0
    else:
        images.patches[images.patch_images < 0] = 0


def _shifted(index: np.ndarray, by: int) -> np.ndarray:
    return np.where(index >= 0, index + by, -1)


def _of(dtype: str, view: View, encoder: Encoder) -> View:
    if view.dtype == dtype:
        return view
    if view.dtype != np.uint8:
        raise ValueError(f"pixels of {view.dtype} for a batch of {dtype}: they are normalised")
    return normalised(view, encoder)


def _place(images: Images, row: int, slot: int, view: View, encoder: Encoder) -> None:
    if images.pixels is not None:
        images.grids[row, slot] = encoder.grid
        images.pixels[row, slot] = view
        return
    grid = grid_of(view, encoder.patch)
    start, count = slot * encoder.patches, math.prod(grid)
    if images.starts is not None:
        start = int(images.grids[row, :slot].prod(axis=-1).sum())
        images.starts[row, slot] = start
    if count > encoder.patches or start + count > images.patches.shape[1]:
        raise ValueError(
            f"image {slot} of row {row} has {count} patches from {start} on; an image may have "
            f"{encoder.patches} and the row has {images.patches.shape[1]}"
        )
    here = (row, slice(start, start + count))
    images.grids[row, slot] = grid
    put_patches(view, encoder.patch, images.patches[here])
    images.patch_images[here] = slot
    if encoder.max_patches:
        images.patch_positions[here] = _positions(grid)
