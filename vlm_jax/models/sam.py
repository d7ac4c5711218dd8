"""The image encoder of Segment Anything: layers that see windows, and some that see everything.

n counts images, or windows of images; h and w are rows and columns of patches.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.batch import Images
from vlm_jax.models.convnet import Conv
from vlm_jax.models.layers import Attention, Features, LayerNorm, Linear, Mlp, Stack, attend
from vlm_jax.models.stems import gather, normalised
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.sam import Sam


class Block(nnx.Module):
    """Self-attention and feed-forward part; `grid` is what its relative positions are made for."""

    def __init__(self, sam: Sam, grid: tuple[int, int], rngs: nnx.Rngs):
        width, heads = sam.width, sam.heads
        sizes = (width, heads, heads, width // heads)
        self.norm1 = LayerNorm(width, sam.norm_eps)
        self.attention = Attention(*sizes, bias=sam.qkv_bias, out_bias=True, rngs=rngs)
        self.norm2 = LayerNorm(width, sam.norm_eps)
        self.mlp = Mlp(width, sam.mlp, sam.activation, gated=False, bias=True, rngs=rngs)
        tables = [
            nnx.Param(0.02 * jax.random.normal(rngs(), (2 * side - 1, width // heads)))
            for side in grid
        ]
        self.relative_rows, self.relative_columns = tables if sam.relative else (None, None)

    def __call__(self, x: Float[Array, "n h w D"], window: int) -> Float[Array, "n h w D"]:
        y = self.norm1(x)
        if window:
            grid = y.shape[1:3]
            y = from_windows(self.attend(to_windows(y, window)), grid)
        else:
            y = self.attend(y)
        x = x + y
        return constrain(x + self.mlp(self.norm2(x)), "batch", None, None, None)

    def attend(self, x: Float[Array, "n h w D"]) -> Float[Array, "n h w D"]:
        """All of a grid's patches look at each other."""
        n, rows, columns, width = x.shape
        x = x.reshape(n, rows * columns, width)
        query, key, value = self.attention.project(x, x)
        bias = self.bias(query, (rows, columns)) if self.relative_rows is not None else None
        return self.attention.out(attend(query, key, value, bias=bias)).reshape(
            n, rows, columns, width
        )

    def bias(
        self, query: Float[Array, "n T H K"], grid: tuple[int, int]
    ) -> Float[Array, "n H T T"]:
        """What queries say to distances in rows, and to distances in columns."""
        (n, tokens, heads, size), (rows, columns) = query.shape, grid
        query = query.reshape(n, rows, columns, heads, size)
        of_rows = distances(self.relative_rows[...], rows).astype(query.dtype)
        of_columns = distances(self.relative_columns[...], columns).astype(query.dtype)
        by_row = jnp.einsum("nijhk,irk->nhijr", query, of_rows)
        by_column = jnp.einsum("nijhk,jck->nhijc", query, of_columns)
        bias = by_row[..., :, None] + by_column[..., None, :]
        return bias.reshape(n, heads, tokens, tokens)


def distances(table: Float[Array, "S K"], side: int) -> Float[Array, "side side K"]:
    """A vector per pair of places on a line; a table for another length is interpolated."""
    shape = (2 * side - 1, table.shape[1])
    if table.shape != shape:
        table = jax.image.resize(table, shape, "linear", antialias=False)
    places = jnp.arange(side)
    return table[places[:, None] - places[None] + side - 1]


def to_windows(x: Float[Array, "n h w D"], side: int) -> Float[Array, "m side side D"]:
    """Windows of the grid, padded with zeros to a multiple of their side."""
    n, rows, columns, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -rows % side), (0, -columns % side), (0, 0)))
    x = x.reshape(n, x.shape[1] // side, side, x.shape[2] // side, side, width)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, width)


def from_windows(x: Float[Array, "m side side D"], grid: tuple[int, int]) -> Float[Array, "..."]:
    """The inverse of `to_windows`: a grid of [n, *grid, D]."""
    side, (rows, columns) = x.shape[1], (-(-length // x.shape[1]) for length in grid)
    x = x.reshape(-1, rows, columns, side, side, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(len(x), rows * side, columns * side, -1)
    return x[:, : grid[0], : grid[1]]


class Layers(nnx.Module):
    """All layers of one kind, stacked; `SamEncoder` runs them in the order of the preset."""

    def __init__(self, sam: Sam, grid: tuple[int, int], count: int, rngs: nnx.Rngs):
        make = lambda rngs: Block(sam, grid, rngs)  # noqa: E731
        self.stack = Stack(make, count, remat=sam.remat, rngs=rngs)


class Neck(nnx.Module):
    """Two convolutions, each with its LayerNorm, to fewer channels."""

    def __init__(self, sam: Sam, rngs: nnx.Rngs):
        self.project = Linear((sam.width,), (sam.out,), bias=False, rngs=rngs)
        self.norm1 = LayerNorm(sam.out, sam.neck_eps)
        self.conv = Conv(sam.out, sam.out, 3, rngs=rngs)
        self.norm2 = LayerNorm(sam.out, sam.neck_eps)

    def __call__(self, x: Float[Array, "n h w D"]) -> Float[Array, "n h w E"]:
        return self.norm2(self.conv(self.norm1(self.project(x))))


class SamEncoder(nnx.Module):
    """Pixels to the neck's features, one per patch."""

    def __init__(self, sam: Sam, rngs: nnx.Rngs):
        self.sam = sam
        self.embed = Linear((sam.patch**2 * 3,), (sam.width,), bias=True, rngs=rngs)
        noise = jax.random.normal(rngs(), (*sam.trained_grid, sam.width))
        self.position_grid = nnx.Param(noise / math.sqrt(sam.width)) if sam.absolute else None
        local, whole = sam.layers.count("local"), sam.layers.count("global")
        window = (sam.window, sam.window)
        self.local_layers = Layers(sam, window, local, rngs) if local else None
        self.global_layers = Layers(sam, sam.trained_grid, whole, rngs) if whole else None
        self.neck = Neck(sam, rngs)

    def __call__(self, images: Images, key: Array | None = None) -> Features:
        pixels = normalised(images.pixels.reshape(-1, *images.pixels.shape[2:]), self.sam)
        x = self.embed(gather(pixels, self.sam.patch))
        if self.position_grid is not None:
            x = x + self._positions().astype(x.dtype)
        x = self.neck(self._run(constrain(x, "batch", None, None, None)))
        return Features(x.reshape(len(x), self.sam.patches, self.sam.out))

    def _positions(self) -> Float[Array, "h w D"]:
        positions = self.position_grid[...]
        shape = (*self.sam.grid, self.sam.width)
        return (
            positions if positions.shape == shape else jax.image.resize(positions, shape, "cubic")
        )

    def _run(self, x: Float[Array, "n h w D"]) -> Float[Array, "n h w D"]:
        """The layers in their order: a scan over groups, in each a scan per run of one kind."""
        groups, pattern = period(self.sam.layers)
        both = {"local": self.local_layers, "global": self.global_layers}
        blocks = {
            kind: _grouped(layers.stack.blocks, groups)
            for kind, layers in both.items()
            if layers is not None
        }

        def group(x, blocks):
            done = dict.fromkeys(blocks, 0)
            for kind, run in itertools.groupby(pattern):
                start, done[kind] = done[kind], done[kind] + len(list(run))
                part = jax.tree.map(lambda leaf: leaf[start : done[kind]], blocks[kind])  # noqa: B023
                x, _ = jax.lax.scan(self._step(kind), x, part)
            return x, None

        return jax.lax.scan(group, x, blocks)[0]

    def _step(self, kind: str):
        window = self.sam.window if kind == "local" else 0
        step = lambda x, block: (block(x, window), None)  # noqa: E731
        return jax.checkpoint(step, prevent_cse=False) if self.sam.remat else step


def period(kinds: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """How often the shortest pattern that makes up the whole is repeated, and that pattern."""
    length = next(
        size
        for size in range(1, len(kinds) + 1)
        if len(kinds) % size == 0 and kinds[:size] * (len(kinds) // size) == kinds
    )
    return len(kinds) // length, kinds[:length]


def _grouped(blocks: nnx.Module, groups: int) -> nnx.Module:
    return jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), blocks)
