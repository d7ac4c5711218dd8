"""Image slots of a batch on their own, and digests of what stands in them.

Whoever sees a picture again under parameters that did not change knows it by its digest.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from vlm_jax.batch import Images


def apart(images: Images, encoder) -> Images:
    """Every image slot as a row of its own.

    Args:
      images: of a batch, without shared patches: slots own equal shares of a row's.
      encoder: the preset of what looks at them.
    """
    split = images._replace(grids=flat(images.grids)[:, None])
    if images.pixels is not None:
        return split._replace(pixels=flat(images.pixels)[:, None])
    patches = encoder.patches
    return split._replace(
        patches=images.patches.reshape(-1, patches, images.patches.shape[-1]),
        patch_positions=images.patch_positions.reshape(-1, patches, 2),
        patch_images=np.minimum(images.patch_images.reshape(-1, patches), 0),
    )


def flat(x: np.ndarray) -> np.ndarray:
    """Rows and slots as one axis."""
    return x.reshape(-1, *x.shape[2:])


def digest(every: Iterable[Images], slot: int, texts: np.ndarray | None = None) -> bytes:
    """Of a slot's pixels as all encoders see them, and of what is asked about it.

    Args:
      every: of each encoder, `apart`.
      slot: which.
      texts: of every slot, if the digest depends on them.
    """
    found = hashlib.blake2b(digest_size=16)
    for images in every:
        # Native aspect ratios: another grid may have the same numbers.
        found.update(np.ascontiguousarray(images.grids[slot]))
        seen = images.patches if images.pixels is None else images.pixels
        found.update(np.ascontiguousarray(seen[slot]))
    if texts is not None:
        found.update(np.ascontiguousarray(texts[slot]))
    return found.digest()
