"""Layers that every tower is made of. Parameters are float32; inputs decide the dtype computed in.

Axes: D width, F feed-forward width, H heads, G key/value heads, K head dimension, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vlm_jax.models.quantised import Quantised
from vlm_jax.parallel.sharding import constrain

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
}


class Features(NamedTuple):
    """What an encoder makes of images.

    Attributes:
      x: features, row by row where they form a grid.
      mask: True where there is one; None where all of them are.
    """

    x: Float[Array, "n P E"]
    mask: Bool[Array, "n P"] | None = None


class Linear(nnx.Module):
    """A matrix product over the last `len(inputs)` axes, as `x @ kernel + bias`.

    `inputs` and `outputs` are shapes, so that a projection to heads is one layer. Kernels are drawn
    xavier-uniform (big_vision) over the flattened shapes.
    """

    def __init__(self, inputs: tuple, outputs: tuple, *, bias: bool, rngs: nnx.Rngs):
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        bound = math.sqrt(6 / (fan_in + fan_out))
        shape = (*inputs, *outputs)
        self.kernel = nnx.Param(jax.random.uniform(rngs(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.axes = len(inputs)
        self.adapter = self.after = None  # see `models.adapters`

    def __call__(self, x: Float[Array, "..."], dtype=None) -> Float[Array, "..."]:
        """The product in `dtype`, by default that of `x`; it is always accumulated in float32."""
        batch, outputs = x.shape[: x.ndim - self.axes], self.kernel.shape[self.axes :]
        # As matrices: XLA's CPU backend is an eighth slower on the same product of more axes.
        x = x.reshape(-1, math.prod(self.kernel.shape[: self.axes]))
        y = product(x, self.kernel, dtype)
        y = y if self.adapter is None else self.adapter(x, self.kernel, y)
        y = y.reshape(*batch, *outputs)
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return y if self.after is None else self.after(y)


def product(
    x: Float[Array, "n D"], kernel: Array | nnx.Param | Quantised, dtype=None
) -> Float[Array, "n F"]:
    """A product with a kernel as a matrix, in `dtype`, by default that of `x`."""
    if isinstance(kernel, Quantised):
        return kernel.product(x, dtype)
    matrix = kernel[...].astype(x.dtype).reshape(x.shape[-1], -1)
    return jnp.matmul(x, matrix, preferred_element_type=dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with, as a rule, scale and bias, computed in float32."""

    def __init__(self, width: int, eps: float, bias: bool = True, scale: bool = True):
        self.scale = nnx.Param(jnp.ones(width)) if scale else None
        self.bias = nnx.Param(jnp.zeros(width)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y if self.scale is None else y * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a scale, computed in float32.

    `stored_less` is what the stored scale is short of the one applied: 1 in Gemma.
    """

    def __init__(self, width: int, eps: float, stored_less: float = 0.0):
        self.scale = nnx.Param(jnp.ones(width) - stored_less)
        self.eps, self.stored_less = eps, stored_less

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        # In float32, or a scale stored in bfloat16 would lose what it is less one.
        scale = self.scale[...].astype(jnp.float32) + self.stored_less
        return (y * scale).astype(x.dtype)


# Norms by the name that presets give them; called with a width and an epsilon.
NORMS = {
    "rms": RMSNorm,
    "rms_plus_one": functools.partial(RMSNorm, stored_less=1.0),
    "layer": LayerNorm,
    "layer_unbiased": functools.partial(LayerNorm, bias=False),
    "layer_bare": functools.partial(LayerNorm, bias=False, scale=False),
}


class Mlp(nnx.Module):
    """The feed-forward part: `down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`.

    `out` is the width of the result, by default that of `x`. With `inner_eps`, a LayerNorm of that
    epsilon stands before `down` (NormFormer, EVA-02).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        *,
        gated: bool,
        bias: bool,
        rngs,
        out: int = 0,
        inner_eps: float = 0.0,
    ):
        self.gate = Linear((width,), (hidden,), bias=bias, rngs=rngs) if gated else None
        self.up = Linear((width,), (hidden,), bias=bias, rngs=rngs)
        self.norm = LayerNorm(hidden, inner_eps) if inner_eps else None
        self.down = Linear((hidden,), (out or width,), bias=bias, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "B ... D"]) -> Float[Array, "B ... _D"]:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        hidden = hidden if self.norm is None else self.norm(hidden)
        between = (None,) * (hidden.ndim - 2)
        return self.down(constrain(hidden, "batch", *between, "mlp"))


class Attention(nnx.Module):
    """Multi-head attention with grouped key/value heads; queries and context may differ.

    `bias` is that of queries, keys and values; `key_bias`, `value_bias` and `out_bias` are those of
    keys, values and the output, by default the same. `context` is the width of the context, by
    default that of the queries.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        key_bias: bool | None = None,
        value_bias: bool | None = None,
        out_bias: bool | None = None,
        context: int = 0,
        rngs,
    ):
        biases = (key_bias, value_bias, out_bias)
        key_bias, value_bias, out_bias = (bias if b is None else b for b in biases)
        self.query = Linear((width,), (heads, head_dim), bias=bias, rngs=rngs)
        context = context or width
        self.key = Linear((context,), (kv_heads, head_dim), bias=key_bias, rngs=rngs)
        self.value = Linear((context,), (kv_heads, head_dim), bias=value_bias, rngs=rngs)
        self.out = Linear((heads, head_dim), (width,), bias=out_bias, rngs=rngs)
        self.prefix = None  # see `models.adapters`

    def project(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G K"]]:
        """Queries of `x`, keys and values of `context`."""
        return self.queries(x), *self.keys_values(context)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        """Queries alone."""
        return constrain(self.query(x), "batch", None, "heads", None)

    def keys_values(
        self, context: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G K"]]:
        """Keys and values alone."""
        key = constrain(self.key(context), "batch", None, "kv_heads", None)
        value = constrain(self.value(context), "batch", None, "kv_heads", None)
        return key, value

    def __call__(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S D"], mask=None
    ) -> Float[Array, "B T D"]:
        return self.out(attend(*self.project(x, context), mask, prefix=self.prefix))


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "B 1 T S"] | None = None,
    *,
    scale: float | None = None,
    bias: Float[Array, "B H T S"] | None = None,
    cap: float = 0.0,
    prefix: Callable | None = None,
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention, softmax in float32.

    Args:
      query, key, value: grouped heads are shared by H / G queries in a row.
      mask: True where a query may look.
      scale: factor on scores; by default one over the root of K.
      bias: added to scaled scores.
      cap: c of c * tanh(score / c); 0 = none.
      prefix: puts keys and values before the others, which all queries see (`prefixes.Prefix`).
    """
    if prefix is not None:
        key, value, mask = prefix(key, value, mask)
    if not cap:
        return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale)
    scores = _scores(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * jnp.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights, _repeated(value, query.shape[2]))


def _scores(query, key, scale: float) -> Float[Array, "B H T S"]:
    key = _repeated(key, query.shape[2])
    return scale * jnp.einsum("bthk,bshk->bhts", query, key, preferred_element_type=jnp.float32)


def _repeated(x: Float[Array, "B S G K"], heads: int) -> Float[Array, "B S H K"]:
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def attention_weights(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    mask: Bool[Array, "B 1 #T S"] | None = None,
) -> Float[Array, "B H T S"]:
    """The weights of plain attention, for looking at."""
    scores = _scores(query, key, query.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1)


def rotate(
    x: Float[Array, "B T H K"], sin: Float[Array, "B T 1 R"], cos: Float[Array, "B T 1 R"]
) -> Float[Array, "B T H K"]:
    """Rotary position embedding, halves rotated against each other (the Hugging Face layout).

    The first 2 R of a head's numbers are rotated, the others pass.
    """
    half = sin.shape[-1]
    first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(r.astype(x.dtype) for r in rotated), x[..., 2 * half :]], axis=-1)


def drop(
    x: Float[Array, "..."], rate: float | Float[Array, ""], key: Array | None, per_row: bool = False
) -> Float[Array, "..."]:
    """Dropout of elements, or of whole rows (stochastic depth); the identity without a key."""
    if key is None or (isinstance(rate, float) and rate == 0.0):
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1) if per_row else x.shape
    keep = jnp.float32(1.0 - rate)  # bfloat16 has no 0.9: the expectation would be off
    return jnp.where(jax.random.bernoulli(key, keep, shape), x / keep, 0).astype(x.dtype)


# A loop costs a tenth of a step on CPUs; unrolling a few layers costs no time to compile.
UNROLLED_LAYERS = 8


class Stack(nnx.Module):
    """Equal blocks whose parameters are stacked on a first axis and run by one scan."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], layers: int, *, remat: bool, rngs):
        self.blocks = nnx.vmap(make)(rngs.split(layers))
        self.layers = layers
        self.remat = remat

    @property
    def first(self) -> nnx.Module:
        """The blocks as one, for what they have in common."""
        return self.blocks

    def __call__(self, apply: Callable, carry, per_layer=None, key: Array | None = None):
        """Runs `apply(block, carry, inputs, key) -> (carry, output)` over the layers.

        Args:
          apply: one block's step; the key is None in evaluation.
          carry: what flows from block to block.
          per_layer: a pytree whose leaves have the layers as first axis.
          key: dropout's, split over the layers.
        """
        keys = None if key is None else jax.random.split(key, self.layers)
        unroll = not self.remat and self.layers <= UNROLLED_LAYERS
        inputs = (self.blocks, per_layer, keys)
        return jax.lax.scan(self.step(apply), carry, inputs, unroll=unroll)

    def step(self, apply: Callable) -> Callable:
        """The body of a scan over (block, inputs, key) of each layer."""

        def step(carry, inputs):
            block, rest, key = inputs
            return apply(block, carry, rest, key)

        # prevent_cse is only needed outside scan (jax.checkpoint's documentation).
        return jax.checkpoint(step, prevent_cse=False) if self.remat else step

    def apart(self) -> "Layers":
        """The same blocks, each with parameters of its own."""
        return Layers([_layer(self.blocks, i) for i in range(self.layers)])


def _layer(stacked, i: int):
    """Of a pytree whose leaves have the layers as first axis, layer i."""
    return jax.tree.map(lambda leaf: leaf[i], stacked)


class Layers(nnx.Module):
    """The blocks of a stack one by one, run like it, for evaluation only.

    A scan cuts each layer's parameters out of the stack whenever it runs. XLA's CPU backend copies
    them, which is most of the time of a step that reads one token.
    """

    def __init__(self, blocks: list[nnx.Module]):
        self.blocks = nnx.List(blocks)

    @property
    def first(self) -> nnx.Module:
        """See `Stack`."""
        return self.blocks[0]

    def __call__(self, apply: Callable, carry, per_layer=None, key: None = None):
        """See `Stack`."""
        outputs = []
        for i, block in enumerate(self.blocks):
            carry, output = apply(block, carry, _layer(per_layer, i), None)
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
