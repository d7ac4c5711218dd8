"""Where patches stand in the grid of their image, and what a vision transformer makes of it.

Grids may be traced: images of a batch then have rows and columns of their own within one shape. m
is the number of images, or 1 where all have one grid; or of rows, where patches are packed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.batch import Images
from vlm_jax.presets.encoders import Encoder


class Places(NamedTuple):
    """Where patches stand.

    Attributes:
      at: row and column of each patch.
      grids: rows and columns of its image, at least 1; one for all patches of an image's own slot.
      mask: True where there is a patch; None where all of them are.
    """

    at: Int[Array, "m P 2"]
    grids: Int[Array, "m ... 2"]
    mask: Bool[Array, "n P"] | None


def places(images: Images, encoder: Encoder) -> Places:
    """Where the patches of a batch stand; all images alike unless `max_patches` is set."""
    if not encoder.max_patches:
        return all_places(encoder.grid)
    grids = jnp.maximum(images.grids, 1)
    if images.starts is not None:
        at, owner = images.patch_positions, images.patch_images
        mask = owner >= 0
        grids = jnp.take_along_axis(grids, jnp.maximum(owner, 0)[..., None], axis=1)
    else:
        grids = grids.reshape(-1, 1, 2)
        at = images.patch_positions.reshape(len(grids), encoder.patches, 2)
        mask = images.patch_images.reshape(len(grids), encoder.patches) >= 0
    # What padding holds must not reach past a table: it would come back as NaN.
    return Places(jnp.clip(at, 0, grids - 1), grids, mask)


def all_places(grid: tuple[int, int]) -> Places:
    """The places of a full grid, line by line."""
    at = np.indices(grid, dtype=np.int32).reshape(2, -1).T
    return Places(jnp.asarray(at[None]), jnp.asarray(grid)[None, None], None)


def resized(table: Float[Array, "R C D"], seen: Places, method: str) -> Float[Array, "m P D"]:
    """A table of learned positions at the places of other grids.

    Args:
      table: what was learned, on a grid of its own.
      seen: places and grids to read it at.
      method: a preset's `position_resize`.
    """
    rows, columns, width = table.shape
    if method == "bucket":
        row, column = (
            bucket(seen.at[..., i], seen.grids[..., i], size)
            for i, size in enumerate((rows, columns))
        )
        return table[row, column]
    row, column = (
        weights(seen.at[..., i], seen.grids[..., i], size, method)
        for i, size in enumerate((rows, columns))
    )
    both = (row[..., :, None] * column[..., None, :]).reshape(*row.shape[:2], rows * columns)
    return jnp.matmul(
        both, table.reshape(rows * columns, width), precision=jax.lax.Precision.HIGHEST
    )


def bucket(place: Int[Array, "m P"], count: Int[Array, "m ..."], size: int) -> Int[Array, "m P"]:
    """Which of `size` equal parts of an image the `place`-th of `count` patches begins in.

    Computed as Idefics2 does (transformers), to the last bit: 70 patches over a table of 70 lie on
    the borders of the parts, so that another rounding would move them.
    """
    share = place.astype(jnp.float32) * (1.0 / count.astype(jnp.float32))
    share = jnp.minimum(share, jnp.float32(1 - 1e-6))
    borders = ((1 + np.arange(size - 1)) * (1 / size)).astype(np.float32)
    return (share[..., None] >= borders).sum(-1)


def weights(
    place: Int[Array, "m P"], count: Int[Array, "m ..."], size: int, method: str
) -> Float[Array, "m P S"]:
    """How much of each of `size` entries the `place`-th of `count` patches takes, along one axis.

    As torch.nn.functional.interpolate with align_corners=False. Antialiasing widens the filter
    where there are fewer patches than entries; its cubic is that of PIL (a = -0.5), the other
    that of OpenCV (a = -0.75), which repeats the border.
    """
    step = size / count.astype(jnp.float32)
    centre = (place.astype(jnp.float32) + 0.5) * step
    entries = jnp.arange(size)
    if method == "bicubic":
        first = jnp.floor(centre - 0.5)
        total = jnp.zeros((*centre.shape, size))
        for tap in (-1, 0, 1, 2):
            entry = jnp.clip(first + tap, 0, size - 1)
            weight = cubic(first + tap + 0.5 - centre, a=-0.75)
            total += jnp.where(entries == entry[..., None], weight[..., None], 0.0)
        return total
    distance = (entries + 0.5 - centre[..., None]) / jnp.maximum(step, 1.0)[..., None]
    if method == "bicubic_antialias":
        total = cubic(distance, a=-0.5)
    else:
        total = jnp.maximum(1.0 - jnp.abs(distance), 0.0)
    return total / total.sum(-1, keepdims=True)


def cubic(x: Float[Array, "..."], a: float) -> Float[Array, "..."]:
    """Keys's cubic convolution kernel (1981)."""
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))


def angles(
    seen: Places, reference: tuple[int, int], head_dim: int, theta: float = 10_000.0
) -> Float[Array, "m P 1 R"]:
    """Rotary angles of a head's pairs: half of them turn with the row, half with the column.

    Args:
      seen: places, and grids that are stretched to `reference` (EVA-02).
      reference: rows and columns.
      head_dim: a multiple of 4.
      theta: of the slowest.
    """
    share = seen.at / seen.grids * jnp.asarray(reference, jnp.float32)
    quarter = head_dim // 4
    frequencies = theta ** (-jnp.arange(quarter) / quarter)
    turned = share[..., None] * frequencies
    return turned.reshape(*seen.at.shape[:2], 1, 2 * quarter)


def rotate_pairs(
    x: Float[Array, "n P H K"], angle: Float[Array, "m P 1 R"]
) -> Float[Array, "n P H K"]:
    """Turns adjacent numbers of a head against each other, in float32."""
    first, second = (x[..., i::2].astype(jnp.float32) for i in (0, 1))
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)


def sincos2d(
    grid: tuple[int, int], width: int, temperature: float = 10_000.0
) -> Float[Array, "P D"]:
    """Fixed positions of a grid: sines and cosines of column, then row (MoCo-v3).

    Raises:
      ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sincos2d positions need a width that is a multiple of 4, not {width}")
    rows, columns = jnp.mgrid[: grid[0], : grid[1]]
    frequencies = temperature ** (-jnp.arange(width // 4) / (width // 4 - 1))
    x = columns.reshape(-1, 1) * frequencies
    y = rows.reshape(-1, 1) * frequencies
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)
