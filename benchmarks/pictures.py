"""Made-up pictures for the benchmarks."""

import io

import numpy as np
from PIL import Image


def photograph(seed: int, width: int, height: int, quality: int = 90) -> bytes:
    """A JPEG of noise of all scales, stronger the coarser, as in photographs."""
    rng, size = np.random.default_rng(seed), (width, height)
    pixels = np.full((height, width, 3), 128.0)
    for scale in (2, 8, 32, 128):
        noise = rng.integers(0, 256, (-(-height // scale), -(-width // scale), 3), np.uint8)
        smooth = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        pixels += (np.asarray(smooth) - 128.0) * (scale / 128) ** 0.5
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()
