"""What a score is worth: answers that need no understanding of the picture.

The majority answer knows the training split's answers only. The raw-pixel neighbour repeats the
caption of the training picture that looks most alike. (The third baseline, a model trained without
images, is a second set of parameters that the evaluator is handed.)
"""

import collections
import itertools
from collections.abc import Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float, Int, UInt8

from vlm_jax.data import images
from vlm_jax.data.example import Example, Image
from vlm_jax.evaluation import questions, scores

SIDES = (16, 32)  # pixels


def majority(train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The most frequent answer of training to questions of the same form (`meta["form"]`).

    Where a question lists its options, the most frequent of those.
    """
    counts = collections.defaultdict(collections.Counter)
    for example in train:
        counts[example.meta.get("form")][scores.normalize(questions.reference(example))] += 1

    def answer(example: Example) -> str:
        seen = counts[example.meta.get("form")]
        options = [scores.normalize(str(o)) for o in example.meta.get("options", ())]
        # Ties go to the answer that sorts first, whatever the order of the examples.
        return min(options or seen, key=lambda option: (-seen[option], option), default="")

    return [answer(example) for example in examples]


class Neighbours:
    """Captions of the training pictures that look most alike, by raw pixels.

    Args:
      train: captioned training pictures.
    """

    def __init__(self, train: Sequence[Example]):
        self._captions = [questions.reference(example) for example in train]
        self._styles = [example.meta.get("style") for example in train]
        self._pictures = pictures(train, max(SIDES))

    def __call__(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """Captions for `examples`, for each side and pool of training pictures.

        The pools are all pictures and, where there are some, those of styles (`meta["style"]`) that
        `examples` do not show.

        Returns:
          {"pixels all, 16 px": captions, "pixels other styles, 16 px": captions, ...}
        """
        styles = {example.meta.get("style") for example in examples}
        other = np.array([style not in styles for style in self._styles])
        pools = {"all": np.ones_like(other)}
        if 0 < other.sum() < len(other):
            pools["other styles"] = other
        asked = pictures(examples, max(SIDES))
        found = {}
        for side, (name, pool) in itertools.product(SIDES, pools.items()):
            rows = nearest_rows(shrink(self._pictures[pool], side), shrink(asked, side))
            found[f"pixels {name}, {side} px"] = [
                self._captions[i] for i in np.flatnonzero(pool)[rows]
            ]
        return found


def nearest_rows(
    seen: Float[np.ndarray, "M D"], asked: Float[np.ndarray, "N D"]
) -> Int[np.ndarray, " N"]:
    """Row of `seen` with the largest cosine to each row of `asked`, less the mean of `seen`."""
    mean = seen.mean(axis=0)
    return np.argmax(_unit(asked - mean) @ _unit(seen - mean).T, axis=1)


def _unit(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8)


def pictures(examples: Sequence[Example], side: int) -> Float[np.ndarray, "N H W 3"]:
    """Every example's first image on white, as squares of `side` pixels, 0 to 255."""
    return np.stack([_square(example.images[0], side) for example in examples])


def shrink(squares: Float[np.ndarray, "N H W 3"], side: int) -> Float[np.ndarray, "N D"]:
    """Squares averaged down to `side` pixels and flattened."""
    count, height, width, _ = squares.shape
    blocks = squares.reshape(count, side, height // side, side, width // side, 3)
    return blocks.mean(axis=(2, 4)).reshape(count, -1)


def _square(image: Image, side: int) -> Float[np.ndarray, "H W 3"]:
    picture = PIL.Image.fromarray(on_white(image))
    return np.asarray(picture.resize((side, side), PIL.Image.Resampling.BOX), np.float32)


def on_white(image: Image) -> UInt8[np.ndarray, "h w 3"]:
    """An image with its transparent parts white."""
    rgba = images.decode(image).astype(np.uint16)
    alpha = rgba[..., 3:]
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
