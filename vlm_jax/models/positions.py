"""What a decoder makes of positions: rotary angles, linear biases, how far a layer looks back."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.presets.decoders import Decoder


class View(NamedTuple):
    """What a layer knows of where its tokens stand.

    Attributes:
      mask: True where a query may look.
      sin, cos: of the rotary angles of queries, and of the keys made with them; or None.
      distance: of queries from keys, for linear biases; or None.
    """

    mask: Bool[Array, "B 1 T S"]
    sin: Float[Array, "B T 1 R"] | None
    cos: Float[Array, "B T 1 R"] | None
    distance: Float[Array, "B 1 T S"] | None


def view(
    decoder: Decoder,
    layer: str,
    mask: Bool[Array, "B 1 T S"],
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    together: Bool[Array, "B 1 T S"] | None = None,
) -> View:
    """What "global" or "local" layers of a decoder know.

    Args:
      decoder: its position fields are read.
      layer: "global" or "local".
      mask: where a query may look but for a window.
      positions: of the queries, counted within each document.
      key_positions: of all keys that `mask` speaks of.
      together: where query and key are of one block; None = nowhere, or the window holds there too.
    """
    back = positions[:, None, :, None] - key_positions[:, None, None, :]
    if layer == "local" and decoder.window:
        near = back < decoder.window
        mask = mask & (near if together is None else near | together)
    sin = cos = distance = None
    if decoder.position == "rotary":
        angles = positions[..., None, None].astype(jnp.float32) * frequencies(decoder, layer)
        scale = decoder.rope_scale if _scaled(decoder, layer) else 1.0
        sin, cos = scale * jnp.sin(angles), scale * jnp.cos(angles)
    if decoder.position == "alibi":
        # Both ways alike within a block, as in MPT's prefix models.
        distance = jnp.abs(back).astype(jnp.float32)
    return View(mask, sin, cos, distance)


def frequencies(decoder: Decoder, layer: str) -> Float[np.ndarray, " R"]:
    """Rotary frequencies, radians per position; R is half of what is rotated of a head."""
    half = int(decoder.head_dim * decoder.rope_share) // 2
    scaled = _scaled(decoder, layer)
    theta = decoder.rope_theta if scaled else decoder.local_theta
    plain = theta ** (-np.arange(half, dtype=np.float32) / np.float32(half))
    if not scaled or decoder.rope_factor == 1:
        return plain
    slow = plain / np.float32(decoder.rope_factor)
    if not decoder.rope_original:
        return slow
    # Frequencies that turn often within the original context stay, those that hardly turn are
    # divided, and what lies between is blended.
    keep = np.clip(RAMPS[decoder.rope_ramp](decoder, plain), 0.0, 1.0)
    return (keep * plain + (1 - keep) * slow).astype(np.float32)


def _scaled(decoder: Decoder, layer: str) -> bool:
    return layer != "local" or not decoder.local_theta


def _by_turns(decoder: Decoder, plain: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """Llama 3.1's (its model card's code)."""
    turns = decoder.rope_original * plain / (2 * math.pi)
    return (turns - decoder.rope_low) / (decoder.rope_high - decoder.rope_low)


def _by_dimensions(decoder: Decoder, plain: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """YaRN's (Peng et al. 2023), whose ends are whole dimensions (the authors' code)."""
    half = len(plain)

    def where(turns: float) -> float:
        wavelength = decoder.rope_original / (2 * math.pi * turns)
        return half * math.log(wavelength) / math.log(decoder.rope_theta)

    fast = max(math.floor(where(decoder.rope_high)), 0)
    slow = min(math.ceil(where(decoder.rope_low)), 2 * half - 1)
    slow = slow if slow != fast else slow + 0.001  # as they do
    return 1 - (np.arange(half, dtype=np.float32) - fast) / (slow - fast)


# How much of a frequency stays, before it is clipped to 0 to 1; by `rope_ramp`.
RAMPS = {"turns": _by_turns, "dimensions": _by_dimensions}


def slopes(heads: int, largest: float = 8.0) -> Float[np.ndarray, " H"]:
    """ALiBi's slopes (Press et al. 2022), in MPT's order where heads are no power of two."""
    count = 2 ** math.ceil(math.log2(heads))
    powers = 2.0 ** (-largest / count * np.arange(1, count + 1))
    if count != heads:
        powers = np.concatenate([powers[1::2], powers[::2]])[:heads]
    return powers.astype(np.float32)
