"""How a picture stands in the sequence: which visual tokens of its images, in which stretches.

A picture may be several images of the batch (`data.resizing`), with text between them that the chat
template knows.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vlm_jax.config import Model
from vlm_jax.data import resizing
from vlm_jax.data.steps import Plan, Size
from vlm_jax.presets import anyres
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.resizing import Resize


class Stretch(NamedTuple):
    """Neighbouring positions of the sequence that belong to a picture.

    Attributes:
      visual: which visual token stands at each, counted from the first of the picture's first
        image; -1 = only a placeholder.
      image: which image of the picture each looks at.
      tile: row and column of the tile that this is, counted from 1; None = the whole picture.
      last: whether it is the last tile of its row.
      behind: whether it is the whole picture, behind its tiles.
    """

    visual: Int[np.ndarray, " n"]
    image: Int[np.ndarray, " n"]
    tile: tuple[int, int] | None = None
    last: bool = False
    behind: bool = False


class Layout(NamedTuple):
    """A picture in the sequence.

    Attributes:
      stretches: in reading order.
      images: of the batch that it is.
      visual_tokens: of each of them.
    """

    stretches: tuple[Stretch, ...]
    images: int
    visual_tokens: int


def whole(visual_tokens: int) -> Layout:
    """A picture that is one image, all of whose visual tokens stand in the sequence."""
    here = Stretch(np.arange(visual_tokens), np.zeros(visual_tokens, int))
    return Layout((here,), 1, visual_tokens)


def layout(plan: Plan, model: Model) -> Layout:
    """How a picture stands in the sequence.

    Args:
      plan: its views, of the model's first encoder.
      model: says how many visual tokens a view has, and whether they stand in the sequence.
    """
    count, per_image = len(plan.views), model.visual_tokens
    if joins_tiles(model):
        return Layout((_joined(plan, model),), count, per_image)
    marks = _marks(plan)
    stretches = []
    for n, (size, mark) in enumerate(zip(plan.sizes, marks, strict=True)):
        visual = n * per_image + _of_view(size, model) if model.visual_in_sequence else [-1]
        stretches.append(mark._replace(visual=np.asarray(visual), image=np.full(len(visual), n)))
    return Layout(tuple(stretches), count, per_image)


class Alike(NamedTuple):
    """All pictures, where how they stand in the sequence does not depend on their size.

    Attributes:
      layout: of each.
      sizes: of the images that each is, as the first encoder sees them.
    """

    layout: Layout
    sizes: tuple[Size, ...]


@functools.cache
def alike(model: Model) -> Alike | None:
    """How all pictures stand in the sequence; None = that depends on their size."""
    if not all(encoder.resize.fixed for encoder in model.encoders):
        return None
    plan = resizing.plan(model.encoder.size, model.encoder)
    return Alike(layout(plan, model), tuple(plan.sizes))


def joins_tiles(model: Model) -> bool:
    """Whether the visual tokens of tiles are put together, line by line (LLaVA-NeXT)."""
    tiled = model.encoder.resize.mode == "pinpoints" and model.visual_in_sequence
    return tiled and getattr(model.connector, "newline", "none") == "token"


def _joined(plan: Plan, model: Model) -> Stretch:
    grid, _, _ = model.connector.pooled(model.encoders)
    visual = anyres.visual_tokens(plan.size, plan.tiles, grid)
    return Stretch(visual, visual // model.visual_tokens)


_NOTHING = np.zeros(0, int)


def _marks(plan: Plan) -> list[Stretch]:
    """The place of each view, without its visual tokens."""
    rows, columns = plan.tiles
    tiles = [
        Stretch(_NOTHING, _NOTHING, (row, column), last=column == columns)
        for row in range(1, rows + 1)
        for column in range(1, columns + 1)
    ]
    of_all = Stretch(_NOTHING, _NOTHING, behind=plan.whole > 0)
    return [*tiles[: plan.whole], of_all, *tiles[plan.whole :]]


def _of_view(size: Size, model: Model) -> Int[np.ndarray, " n"]:
    """The visual tokens of a view that there are: of a smaller one, not those of padding."""
    encoder, connector, room = model.encoder, model.connector, model.visual_tokens
    if encoder.resize.mode not in Resize.NATIVE or not _one_per_feature(connector):
        return np.arange(room)
    features = encoder.keep_class + (size[0] // encoder.patch) * (size[1] // encoder.patch)
    newline = [room - 1] if connector.newline == "token" else []
    return np.concatenate([np.arange(features), newline]).astype(int)


def _one_per_feature(connector) -> bool:
    return isinstance(connector, Connector) and connector.kind in ("none", "linear", "mlp")
