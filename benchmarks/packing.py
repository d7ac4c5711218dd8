"""What packing leaves empty on a mixture like LLaVA-665K, beside batches of one document per row.

    python -m benchmarks.packing

Documents are lengths and image counts alone: of each part of the mixture as many as there are
(Liu et al. 2024, table 7), with text lengths drawn log-normally about the median below; an image
is 576 visual tokens. The medians are our estimate from a few conversations of each kind, not
counted on the data. Unpacked rows are padded to the longest of their batch of 16.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np

from vlm_jax.data import packing

VISUAL_TOKENS = 576


class Part(NamedTuple):
    """A part of the mixture: thousands of documents, images of each, text tokens."""

    thousands: int
    images: int
    median: float
    spread: float


MIXTURE = {
    "LLaVA": Part(158, 1, 330, 0.45),
    "ShareGPT": Part(40, 0, 1300, 0.6),
    "VQAv2": Part(83, 1, 150, 0.5),
    "GQA": Part(72, 1, 190, 0.5),
    "OKVQA": Part(9, 1, 90, 0.4),
    "OCRVQA": Part(80, 1, 150, 0.2),
    "A-OKVQA": Part(66, 1, 110, 0.3),
    "TextCaps": Part(22, 1, 90, 0.15),
    "RefCOCO": Part(48, 1, 220, 0.5),
    "Visual Genome": Part(86, 1, 260, 0.5),
}
BUDGETS = ((4352, 5), (4480, 5), (8704, 10))  # tokens and images of a row

Size = tuple[int, int]


def drawn(count: int, tokens: int) -> list[Size]:
    """Documents of the mixture, none longer than a row: (tokens, images)."""
    rng = np.random.default_rng(0)
    parts = list(MIXTURE.values())
    shares = np.array([part.thousands for part in parts], float)
    found = []
    for i in rng.choice(len(parts), size=count, p=shares / shares.sum()):
        part = parts[i]
        visual = part.images * VISUAL_TOKENS
        text = rng.lognormal(np.log(part.median), part.spread)
        found.append((visual + int(np.clip(text, 20, tokens - visual)), part.images))
    return found


def packed(
    documents: list[Size], tokens: int, images: int, pool: int
) -> tuple[float, float, float]:
    """Shares of tokens and of image slots that stay empty, and milliseconds of packing a row."""
    arriving, pending = iter(documents), []
    filled, seen, rows, spent = 0, 0, 0, 0.0
    while True:
        while len(pending) < pool and (document := next(arriving, None)) is not None:
            pending.append(document)
        if len(pending) < pool:  # the last rows would say how the stream ends, not how it runs
            return 1 - filled / (rows * tokens), 1 - seen / (rows * images), 1e3 * spent / rows
        start = time.perf_counter()
        chosen = packing.choose(pending, lambda size: size, tokens, images)
        spent += time.perf_counter() - start
        filled += sum(pending[i][0] for i in chosen)
        seen += sum(pending[i][1] for i in chosen)
        rows += 1
        for i in reversed(chosen):
            del pending[i]


def unpacked(documents: list[Size], batch: int = 16) -> float:
    """The share of tokens that is padding where every document has a row."""
    lengths = np.array([length for length, _ in documents])
    lengths = lengths[: len(lengths) // batch * batch].reshape(-1, batch)
    return 1 - lengths.sum() / (lengths.max(axis=1).sum() * batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--pool", type=int, default=64, help="documents that wait")
    options = parser.parse_args()
    print("tokens  images  empty tokens %  empty slots %  ms a row  useful tokens, ratio")
    for tokens, images in BUDGETS:
        documents = drawn(options.documents, tokens)
        empty, slots, spent = packed(documents, tokens, images, options.pool)
        ratio = (1 - empty) / (1 - unpacked(documents))
        print(
            f"{tokens:6}  {images:6}  {100 * empty:14.1f}  {100 * slots:13.1f}  {spent:8.2f}  "
            f"{ratio:20.2f}"
        )


if __name__ == "__main__":
    main()
