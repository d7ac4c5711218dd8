"""Prefixes: keys and values before those of an attention, which all tokens look at.

As Li and Liang (2021) tune them: they are learned themselves, or made of shorter vectors by a
network that all layers share. Their leaves stand beside the kernel of the attention's keys: below a
stack with the layers as first axis, but for what the layers share. R is how many there are, G
key/value heads, K head dimension, S width of the network, L layers.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

KEYS, VALUES = "prefix_keys", "prefix_values"
EMBEDDING, INNER, INNER_BIAS, OUTER, OUTER_BIAS = (
    f"prefix_{x}" for x in ("embedding", "inner", "inner_bias", "outer", "outer_bias")
)
OWN = (KEYS, VALUES)
SHARED = (EMBEDDING, INNER, INNER_BIAS)  # by all layers
MADE = (*SHARED, OUTER, OUTER_BIAS)
BIASES = (INNER_BIAS, OUTER_BIAS)
LEAVES = OWN + MADE


def shapes(length: int, hidden: int, heads: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The leaves of a prefix of one layer by name.

    Args:
      length: R.
      hidden: S; 0 = without the network.
      heads: (G, K).
    """
    if not hidden:
        return dict.fromkeys(OWN, (length, *heads))
    width = math.prod(heads)
    return {
        EMBEDDING: (length, width),
        INNER: (width, hidden),
        INNER_BIAS: (hidden,),
        OUTER: (hidden, 2, *heads),
        OUTER_BIAS: (2, *heads),
    }


def drawn(leaves: Mapping[str, jax.ShapeDtypeStruct], key: Array) -> dict[str, Array]:
    """Leaves as `peft` draws them: normal, of deviation 1; those of the network as torch does."""
    bounds = {}
    if OUTER in leaves:
        width, hidden = leaves[INNER].shape
        inner, outer = 1 / math.sqrt(width), 1 / math.sqrt(hidden)
        bounds = {INNER: inner, INNER_BIAS: inner, OUTER: outer, OUTER_BIAS: outer}
    found = {}
    for (name, leaf), own in zip(leaves.items(), jax.random.split(key, len(leaves))):
        if name in bounds:
            bound = bounds[name]
            found[name] = jax.random.uniform(own, leaf.shape, minval=-bound, maxval=bound)
        else:
            found[name] = jax.random.normal(own, leaf.shape)
    return found


def keys_values(leaves: Mapping[str, Array]) -> tuple[Array, Array]:
    """Keys and values, [*L, R, G, K] each, of a prefix's leaves by name."""
    if KEYS in leaves:
        return leaves[KEYS], leaves[VALUES]
    embedding, inner, inner_bias, outer, outer_bias = (leaves[name] for name in MADE)
    hidden = jnp.tanh(embedding @ inner + inner_bias)
    both = jnp.einsum("rs,...sigk->...rigk", hidden, outer) + outer_bias[..., None, :, :, :]
    return both[..., 0, :, :], both[..., 1, :, :]


def length(flat: Mapping[str, Array], part: str) -> int:
    """How many keys and values the attentions of a part have before those of its tokens."""
    for path, leaf in flat.items():
        if path.startswith(f"{part}/") and path.endswith((f"/{KEYS}", f"/{EMBEDDING}")):
            return leaf.shape[-3] if path.endswith(KEYS) else len(leaf)
    return 0


class Prefix(nnx.Module):
    """A prefix inside its attention.

    Args:
      keys, values: [R, G, K], or of all layers of a stack.
    """

    def __init__(self, keys: Float[Array, "..."], values: Float[Array, "..."]):
        self.keys, self.values = nnx.Param(keys), nnx.Param(values)

    @property
    def length(self) -> int:
        """How many there are, R."""
        return self.keys.shape[-3]

    def __call__(
        self,
        key: Float[Array, "B S G K"],
        value: Float[Array, "B S G K"],
        mask: Bool[Array, "... S"] | None,
    ):
        """Keys, values and their mask with the prefix, which every query may look at."""
        if mask is not None:
            before = ((0, 0),) * (mask.ndim - 1) + ((self.length, 0),)
            mask = jnp.pad(mask, before, constant_values=True)
        return _before(self.keys[...], key), _before(self.values[...], value), mask


def _before(own: Float[Array, "R G K"], x: Float[Array, "B S G K"]) -> Float[Array, "B R+S G K"]:
    own = jnp.broadcast_to(own.astype(x.dtype), (len(x), *own.shape))
    return jnp.concatenate([own, x], axis=1)
