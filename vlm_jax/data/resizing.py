"""Resize modes: from a picture of any size to the views of it that an encoder sees.

A mode is a function from the picture's size to a `Plan`: for every view, the steps that make it. So
how many views there will be, and of which sizes, is known from a header. The plans follow the
published image processors in order, filter and rounding; `tests/data/test_resizing.py` compares.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from vlm_jax.data.steps import LARGE, Framed, Plan, Scale, Size, Steps, Window
from vlm_jax.presets.anyres import best_resolution
from vlm_jax.presets.resizing import Resize


def plan(size: Size, encoder: Any) -> Plan:
    """The views of a picture of this size.

    Args:
      size: height and width in pixels, as the picture is seen upright.
      encoder: the preset; its `resize`, size, mean, and where it has them patch and `max_patches`
        are read.
    """
    how = encoder.resize
    made = _MODES[how.mode](size, how.size(encoder), how, encoder)._replace(size=size)
    if how.side:
        seen = Window(0, 0, *encoder.size)
        made = made._replace(views=tuple((*steps, seen) for steps in made.views))
    return made


def _squash(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    return Plan(((Scale(*view, how.filter),),))


def _crop(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    """The middle is rounded as transformers' processors do."""
    scaled = _shorter_to(size, how.shortest or min(view))
    top, left = ((there - here) // 2 for there, here in zip(scaled, view, strict=True))
    if math.prod(scaled) > LARGE:
        return Plan(((_cut(size, scaled, (top, left), view, how.filter),),))
    return Plan(((Scale(*scaled, how.filter), Window(top, left, *view)),))


def _cut(size: Size, scaled: Size, corner: tuple[int, int], cut: Size, filter: str) -> Scale:
    """Scales to `scaled` only what of it is then cut out.

    Pillow may take rows and columns in another order then, which shows in noise.
    """
    (height, width), (top, left) = size, corner
    down, across = height / scaled[0], width / scaled[1]
    part = (left * across, top * down, (left + cut[1]) * across, (top + cut[0]) * down)
    return Scale(*cut, filter, tuple(map(min, part, (width, height, width, height))))


def _shorter_to(size: Size, length: int) -> Size:
    (height, width), longer = size, int(length * max(size) / min(size))
    return (longer, length) if height > width else (length, longer)


def _pad(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    side = max(size)
    corner = (side - size[0]) // 2, (side - size[1]) // 2
    return Plan(((Framed(*view, how.filter, (side, side), corner, _mean(encoder)),),))


def _mean(encoder: Any) -> tuple[int, int, int]:
    """The mean colour, its fractions cut off as LLaVA does."""
    red, green, blue = (int(255 * channel) for channel in encoder.mean)
    return red, green, blue


def _letterbox(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    """As LetterboxPad and what timm does after it (prismatic's base_vision.py)."""
    side = max(size)
    border = ((side - size[0]) // 2, (side - size[1]) // 2)
    frame = (size[0] + 2 * border[0], size[1] + 2 * border[1])
    scaled = _shorter_to(frame, min(view))
    # Half a pixel is rounded to the even side (torchvision's center_crop).
    middle = (round((a - b) / 2) for a, b in zip(scaled, view, strict=True))
    framed = Framed(*scaled, how.filter, frame, border, _mean(encoder))
    return Plan(((framed, Window(*middle, *view)),))


def _patches(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    """Bisects for the largest scale; that it stops at 1e-5 is part of the published result."""
    patch, room = encoder.patch, encoder.max_patches

    def grid(scale: float) -> Size:
        rows, columns = (max(1, math.ceil(side * scale / patch)) for side in size)
        return rows, columns

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(grid(middle)) <= room else (low, middle)
    rows, columns = grid(low)
    return Plan(((Scale(rows * patch, columns * patch, how.filter),),))


def _whole_patches(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    patch, room = encoder.patch, encoder.max_patches
    height, width = size
    scale = math.sqrt(room * (patch / height) * (patch / width))
    rows, columns = (min(max(int(scale * side / patch), 1), room) for side in size)
    return Plan(((Scale(rows * patch, columns * patch, how.filter),),))


def _bounds(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    return Plan((_within(size, view, how, encoder),))


def _within(size: Size, view: Size, how: Resize, encoder: Any) -> Steps:
    """Between the bounds; what is left of the last whole patch is cut off, as the model does."""
    longest = how.longest or max(view)
    shortest = how.shortest or min(view)
    size = _longer_to(size, longest) if max(size) > longest else size
    height, width = (max(side, shortest) for side in size)
    patch = encoder.patch
    whole = Window(0, 0, height // patch * patch, width // patch * patch)
    scaled = Scale(height, width, how.filter)
    return (scaled,) if whole[2:4] == scaled[:2] else (scaled, whole)


def _longer_to(size: Size, length: int) -> Size:
    """The ratio comes first, because its rounding is the published one."""
    height, width = size
    ratio = width / height
    if width >= height:
        return int(length / ratio), length
    return length, int(length * ratio)


def _quarters(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    """Of a picture of one pixel a side, no quarter is left empty."""
    height, width = size
    rows = _halves(height)
    columns = _halves(width)
    parts = [Window(top, left, h, w) for (top, h), (left, w) in itertools.product(rows, columns)]
    quarters = [(part, *_within(part[2:4], view, how, encoder)) for part in parts]
    return Plan((*quarters, _within(size, view, how, encoder)), (2, 2), whole=4)


def _halves(length: int) -> Sequence[tuple[int, int]]:
    """Start and length of both halves."""
    half = length // 2
    return (0, max(half, 1)), (half, length - half)


def _pinpoints(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    target = best_resolution(size, how.pinpoints)
    fitted = Scale(*_fitted(size, target), how.filter)
    top, left = (-((there - here) // 2) for there, here in zip(target, fitted[:2], strict=True))
    tiles, cut = _tiles(target, view)
    framed = (fitted, Window(top, left, *target))
    whole = (Scale(*view, how.filter),)
    return Plan((whole, *((*framed, tile) for tile in cut)), tiles)


def _fitted(size: Size, target: Size) -> Size:
    (height, width), (rows, columns) = size, target
    across, down = columns / width, rows / height
    if across < down:
        return min(math.ceil(height * across), rows), columns
    return rows, min(math.ceil(width * down), columns)


def _tiles(size: Size, tile: Size) -> tuple[Size, list[Window]]:
    """Rows and columns of tiles, and where each is."""
    (height, width), (h, w) = size, tile
    cut = [Window(top, left, h, w) for top in range(0, height, h) for left in range(0, width, w)]
    return (height // h, width // w), cut


def _grid(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    """Idefics3's, which resizes twice: to even sides, then to whole tiles."""
    side = view[0]
    height, width = _longer_to(size, how.longest or side)
    first = (height + height % 2, width) if width >= height else (height, width + width % 2)
    first = _below((max(first[0], 1), max(first[1], 1)), _LARGEST)
    scaled = Scale(*first, how.filter)
    multiple = lambda length: math.ceil(length / side) * side  # noqa: E731
    height, width = first
    ratio = width / height
    if width >= height:
        width = multiple(width)
        height = multiple(int(width / ratio))
    else:
        height = multiple(height)
        width = multiple(int(height * ratio))
    steps = (scaled, Scale(height, width, how.filter))
    tiles, cut = _tiles((height, width), view)
    if tiles == (1, 1):
        return Plan((steps,))
    whole = (*steps, Scale(*view, how.filter))
    return Plan((*((*steps, tile) for tile in cut), whole), tiles, whole=len(cut))


_LARGEST = 4096  # transformers' MAX_IMAGE_SIZE


def _below(size: Size, longest: int) -> Size:
    if max(size) <= longest:
        return size
    height, width = _longer_to(size, longest)
    return max(height, 1), max(width, 1)


def _whole_and_grid(size: Size, view: Size, how: Resize, encoder: Any) -> Plan:
    """As nanoVLM's custom_transforms.py, whose whole is made of the resized picture."""
    side, longest = view[0], how.longest or max(view)
    longer = longest if how.enlarge else min(longest, math.ceil(max(size) / side) * side)
    scale = longer / max(size)
    shorter = max(side, math.ceil(min(size) * scale / side) * side)
    target = (shorter, longer) if size[1] >= size[0] else (longer, shorter)
    scaled = Scale(*target, how.filter)
    tiles, cut = _tiles(target, view)
    if tiles == (1, 1):
        return Plan(((scaled,),))
    whole = (scaled, Scale(*view, "bilinear"))
    return Plan((whole, *((scaled, tile) for tile in cut)), tiles)


_MODES: dict[str, Callable[[Size, Size, Resize, Any], Plan]] = {
    "squash": _squash,
    "crop": _crop,
    "pad": _pad,
    "letterbox": _letterbox,
    "patches": _patches,
    "whole_patches": _whole_patches,
    "bounds": _bounds,
    "quarters": _quarters,
    "pinpoints": _pinpoints,
    "grid": _grid,
    "whole_and_grid": _whole_and_grid,
}
