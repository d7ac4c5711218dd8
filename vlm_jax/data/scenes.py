"""Scenes: several small pictures on one transparent canvas, for counting and for relations.

Everything is 8-bit premultiplied RGBA (Pillow's "RGBa") until a scene is encoded, so shrinking
and blending leave no fringes. The canvas stays transparent: like single pictures, scenes get
their background where images are decoded.
"""

import dataclasses
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CANVAS = 64  # pixels; the size of the embedded single pictures
COUNT_CELLS = 3  # counting places pictures in the cells of a 3x3 grid
COUNT_SIZE = 20
PAIR_SIZE = 30

# relation: (axis of the top-left corner, whether the first thing has the smaller coordinate)
RELATIONS = {
    "left of": (1, True),
    "right of": (1, False),
    "above": (0, True),
    "below": (0, False),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclasses.dataclass(frozen=True)
class Box:
    """Where a picture lies on the canvas: pixels, top-left corner and side."""

    top: int
    left: int
    size: int


def holds(relation: str, one: Box, other: Box) -> bool:
    """Whether `one` lies wholly to that side of `other`."""
    axis, smaller = RELATIONS[relation]
    low, high = (one, other) if smaller else (other, one)
    return (low.top, low.left)[axis] + low.size <= (high.top, high.left)[axis]


def count_boxes(count: int, rng: np.random.Generator) -> list[Box]:
    """`count` boxes in different cells of the grid, shifted at random inside them."""
    cell = CANVAS // COUNT_CELLS
    cells = rng.permutation(COUNT_CELLS**2)[:count]
    shifts = rng.integers(0, cell - COUNT_SIZE + 1, (count, 2))
    return [
        Box(
            int(c) // COUNT_CELLS * cell + int(dy),
            int(c) % COUNT_CELLS * cell + int(dx),
            COUNT_SIZE,
        )
        for c, (dy, dx) in zip(cells, shifts, strict=True)
    ]


def pair_boxes(relation: str, rng: np.random.Generator) -> tuple[Box, Box]:
    """Two boxes of which the first stands in `relation` to the second; the other axis is free."""
    axis, smaller = RELATIONS[relation]
    slack = CANVAS - 2 * PAIR_SIZE
    near = int(rng.integers(0, slack + 1))
    far = int(rng.integers(near + PAIR_SIZE, CANVAS - PAIR_SIZE + 1))
    along = (near, far) if smaller else (far, near)
    across = rng.integers(0, CANVAS - PAIR_SIZE + 1, 2).tolist()
    boxes = [
        Box(a, b, PAIR_SIZE) if axis == 0 else Box(b, a, PAIR_SIZE)
        for a, b in zip(along, across, strict=True)
    ]
    return boxes[0], boxes[1]


def thumbnail(encoded: bytes, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """An encoded RGBA picture, shrunk, as premultiplied colour and alpha."""
    with Image.open(io.BytesIO(encoded)) as image:
        small = image.convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.HAMMING)
    return np.frombuffer(small.tobytes(), np.uint8).reshape(size, size, 4)


def over(
    top: UInt8[np.ndarray, "H W 4"], below: UInt8[np.ndarray, "H W 4"]
) -> UInt8[np.ndarray, "H W 4"]:
    """Porter-Duff "over" of premultiplied pictures."""
    hidden = 255 - top[..., 3:].astype(np.uint16)
    return top + ((below * hidden + 127) // 255).astype(np.uint8)


def compose(
    placed: list[tuple[UInt8[np.ndarray, "size size 4"], Box]],
) -> UInt8[np.ndarray, "64 64 4"]:
    """Premultiplied thumbnails, each in its box, on a transparent canvas."""
    canvas = np.zeros((CANVAS, CANVAS, 4), np.uint8)
    for picture, box in placed:
        window = np.s_[box.top : box.top + box.size, box.left : box.left + box.size]
        canvas[window] = over(picture, canvas[window])
    return canvas


def encode(canvas: UInt8[np.ndarray, "H W 4"]) -> bytes:
    """A premultiplied picture as a straight-alpha PNG, compressed fast rather than well."""
    height, width = canvas.shape[:2]
    image = Image.frombuffer("RGBa", (width, height), canvas.tobytes(), "raw", "RGBa", 0, 1)
    buffer = io.BytesIO()
    image.convert("RGBA").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
