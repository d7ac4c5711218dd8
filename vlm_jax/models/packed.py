"""Rows of patches of several images, and what keeps each image to itself.

In a packed row the images' patches stand one after another, behind the class tokens and registers
of all slots. Norms, projections and feed-forward parts work on the row as it is; attention looks
within an image, and features leave as a slot per image. B counts rows, N image slots, T tokens of
a row, t tokens of a slot.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.batch import Images
from vlm_jax.models.layers import attend
from vlm_jax.parallel.sharding import constrain


class Rows(NamedTuple):
    """Whose tokens stand where.

    Attributes:
      owner: which image of its row a token is of, -1 = padding.
      place: which token of its image it is.
      tokens: where in the row each token of an image stands.
      there: True where there is one.
    """

    owner: Int[Array, "B T"]
    place: Int[Array, "B T"]
    tokens: Int[Array, "B N t"]
    there: Bool[Array, "B N t"]


def rows(images: Images, before: int, room: int) -> Rows:
    """Rows of packed images.

    Args:
      images: with `starts`.
      before: class tokens and registers of each image.
      room: patches that an image may have.
    """
    count, slots = images.grids.prod(-1), images.grids.shape[1]
    owner, starts = images.patch_images, images.starts
    first = jnp.take_along_axis(starts, jnp.maximum(owner, 0), axis=1)
    own = jnp.arange(owner.shape[1]) - first + before
    ahead = jnp.broadcast_to(jnp.arange(slots * before), (len(owner), slots * before))
    patches = starts[..., None] + jnp.arange(room) + slots * before
    prefixes = jnp.broadcast_to(
        jnp.arange(slots * before).reshape(slots, before), (*count.shape, before)
    )
    there = jnp.arange(room) < count[..., None]
    return Rows(
        owner=jnp.concatenate([ahead // max(before, 1), owner], axis=1),
        place=jnp.concatenate([ahead % max(before, 1), own], axis=1),
        tokens=jnp.concatenate([prefixes, jnp.where(there, patches, 0)], axis=2),
        there=jnp.pad(there, ((0, 0), (0, 0), (before, 0)), constant_values=True),
    )


def apart(x: Float[Array, "B T ..."], rows: Rows) -> Float[Array, "n t ..."]:
    """Each image's tokens on their own, zeros where there are none; n = B * N."""
    batch, slots, room = rows.tokens.shape
    found = _taken(x, rows.tokens.reshape(batch, slots * room))
    found = found.reshape(batch * slots, room, *x.shape[2:])
    there = rows.there.reshape(batch * slots, room, *(1,) * (x.ndim - 2))
    found = jnp.where(there, found, 0)
    return constrain(found, "batch", *(None,) * (found.ndim - 1))


def together(y: Float[Array, "n t ..."], rows: Rows) -> Float[Array, "B T ..."]:
    """The inverse of `apart`; zeros on padding."""
    batch, slots, room = rows.tokens.shape
    y = y.reshape(batch, slots * room, *y.shape[2:])
    at = jnp.where(rows.owner < 0, 0, rows.owner * room + rows.place)
    there = (rows.owner >= 0).reshape(*at.shape, *(1,) * (y.ndim - 2))
    return constrain(jnp.where(there, _taken(y, at), 0), "batch", *(None,) * (y.ndim - 1))


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    rows: Rows,
    scale: float | None = None,
    prefix: Callable | None = None,
) -> Float[Array, "B T H K"]:
    """Attention within each image, in the way that scores fewer pairs of tokens.

    Which of the two that is, shapes decide; they give the same.
    """
    slots, room = rows.tokens.shape[1:]
    fewer = by_slots if slots * room**2 < rows.owner.shape[1] ** 2 else over_rows
    return fewer(query, key, value, rows, scale, prefix)


def over_rows(
    query, key, value, rows: Rows, scale: float | None, prefix: Callable | None = None
) -> Float[Array, "B T H K"]:
    """All pairs of a row, those of two images masked out."""
    mask = rows.owner[:, None, :, None] == rows.owner[:, None, None, :]
    return attend(query, key, value, mask, scale=scale, prefix=prefix)


def by_slots(
    query, key, value, rows: Rows, scale: float | None, prefix: Callable | None = None
) -> Float[Array, "B T H K"]:
    """All pairs of each slot's room."""
    mask = rows.there.reshape(-1, 1, 1, rows.there.shape[-1])
    parts = (apart(x, rows) for x in (query, key, value))
    return together(attend(*parts, mask, scale=scale, prefix=prefix), rows)


def of_tokens(x: Float[Array, "B N D"], rows: Rows) -> Float[Array, "B T D"]:
    """What holds for each image, for each of its tokens."""
    return _taken(x, jnp.maximum(rows.owner, 0))


def _taken(x: Float[Array, "B T ..."], at: Int[Array, "B S"]) -> Float[Array, "B S ..."]:
    index = at.reshape(*at.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)
