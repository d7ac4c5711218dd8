"""Features as grids: resized, pooled, joined, and with tokens where rows end.

n counts images, R and C are rows and columns, E channels. Grids are static: every image of an
encoder gives the same one.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlm_jax.models.layers import Features
from vlm_jax.models.stems import gather
from vlm_jax.presets.connectors import Connector, Grid, feature_grid


def bilinear(places: int, found: int) -> Float[np.ndarray, "places found"]:
    """Weights that resize `found` samples to `places` linearly, pixel centres as in photographs.

    Each place mixes its two nearest samples, however many lie between (no antialiasing): torch's
    `interpolate` with `align_corners=False`, which Cambrian and Eagle resize features by.
    """
    centre = np.maximum((np.arange(places) + 0.5) * found / places - 0.5, 0)
    low = np.minimum(centre.astype(int), found - 1)
    high = np.minimum(low + 1, found - 1)
    share = (centre - low)[:, None]
    return ((1 - share) * np.eye(found)[low] + share * np.eye(found)[high]).astype(np.float32)


def averaging(places: int, found: int) -> Float[np.ndarray, "places found"]:
    """Weights that average `found` samples to `places` bins, which overlap where they do not
    divide (torch's adaptive pooling)."""
    weights = np.zeros((places, found), np.float32)
    for i in range(places):
        start, end = i * found // places, -(-(i + 1) * found // places)
        weights[i, start:end] = 1 / (end - start)
    return weights


def regrid(x: Float[Array, "n P E"], grid: Grid, target: Grid, weights) -> Float[Array, "n _P E"]:
    """Features of a grid brought to another by `bilinear` or `averaging`, in float32."""
    if grid == target:
        return x
    rows, columns = weights(target[0], grid[0]), weights(target[1], grid[1])
    y = x.reshape(x.shape[0], *grid, x.shape[-1]).astype(jnp.float32)
    y = jnp.einsum("rh,cw,nhwe->nrce", rows, columns, y)
    return y.reshape(x.shape[0], -1, x.shape[-1]).astype(x.dtype)


def joined(connector: Connector, encoders: tuple, seen: tuple[Features, ...]) -> Features:
    """The features of all encoders on one grid, side by side in their channels, then pooled.

    A mask survives where no feature moves; else all features are taken to be there.
    """
    target = connector.merged_grid(encoders)
    resized = [
        _resized(features.x, feature_grid(encoder), target)
        for encoder, features in zip(encoders, seen, strict=True)
    ]
    x = resized[0] if len(resized) == 1 else jnp.concatenate(resized, axis=-1)
    n = len(x)
    if connector.pool == "shuffle":
        x = gather(x.reshape(n, *target, -1), connector.factor)
        x = x.reshape(n, -1, x.shape[-1])
    elif connector.pool == "adjacent":
        x = x.reshape(n, x.shape[1] // connector.factor, -1)
    elif connector.pool == "average":
        x = regrid(x, target, connector.grid, averaging)
    kept = len(seen) == 1 and connector.pool == "none" and resized[0] is seen[0].x
    return Features(x, seen[0].mask if kept else None)


def _resized(x: Float[Array, "n P E"], grid: Grid | None, target: Grid | None):
    return x if grid is None or target is None else regrid(x, grid, target, bilinear)


def with_newlines(
    x: Float[Array, "n Q D"], newline: Float[Array, " D"], rows: int = 0
) -> Float[Array, "n _Q D"]:
    """Puts a token behind each of so many rows, or with `rows=0` behind all."""
    n, _, width = x.shape
    x = x.reshape(n, rows or 1, -1, width)
    newline = jnp.broadcast_to(newline.astype(x.dtype), (*x.shape[:2], 1, width))
    return jnp.concatenate([x, newline], axis=2).reshape(n, -1, width)
