"""NEFTune: noise on the decoder's embeddings of tokens while it trains (Jain et al. 2023)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Far from the small numbers that dropout's keys are split into.
OWN_KEY = 0x4E454654


def drawn(
    segments: Int[Array, "B T"], width: int, alpha: float, key: Array
) -> Float[Array, "B T E"]:
    """Noise of a packed batch; `key` is dropout's, of which this takes a part of its own."""
    key = jax.random.fold_in(key, OWN_KEY)
    draws = jax.random.uniform(key, (*segments.shape, width), minval=-1.0, maxval=1.0)
    return scaled(draws, segments, alpha)


def scaled(
    draws: Float[Array, "B T E"], segments: Int[Array, "B T"], alpha: float
) -> Float[Array, "B T E"]:
    """Draws from -1 to 1 times alpha / sqrt(L E), L being the length of a token's document.

    All positions of a document count, those of visual tokens too, which replace what stands there:
    as where transformers' hook on the embeddings is given that document alone. Padding gets none.
    """
    same = segments[:, :, None] == segments[:, None, :]
    length = jnp.sum(same, axis=-1, dtype=jnp.float32)
    size = alpha * jax.lax.rsqrt(length * draws.shape[-1])
    return draws * jnp.where(segments > 0, size, 0.0)[..., None]
