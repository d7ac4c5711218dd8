"""NF4 written down from the QLoRA paper (Dettmers et al. 2023), in numpy: sections 2 and 3."""

import numpy as np

# Appendix E.
LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
BLOCK = 64


def codes(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of levels [n, 64] and largest absolute values [n] of a weight [outputs, inputs]."""
    flat = weight.astype(np.float32).reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    scaled = blocks / np.where(largest > 0, largest, 1)[:, None]
    return np.abs(scaled[..., None] - LEVELS).argmin(axis=-1), largest


def held(weight: np.ndarray) -> np.ndarray:
    """What NF4 makes of a weight [outputs, inputs]."""
    which, largest = codes(weight)
    blocks = LEVELS[which] * largest[:, None]
    return blocks.reshape(-1)[: weight.size].reshape(weight.shape).astype(np.float32)
