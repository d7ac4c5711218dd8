"""What packing leaves empty on a mixture like LLaVA-665K, and what it gains in a training step.

    python -m benchmarks.packing
    python -m benchmarks.packing --no-steps

Documents are lengths, image counts and picture sizes alone: of each part of the mixture as many as
there are (Liu et al. 2024, table 7), with text lengths drawn log-normally about the median below;
an image is 576 visual tokens. Medians and sizes are our estimate from a few conversations of each
kind and from where its pictures come from (COCO, Visual Genome, book covers, Open Images), not
counted on the data. Pictures keep their size, in patches of 16 pixels, scaled down where they would
have more than 1,600: the long side is drawn from 80 to 100 % and the short one from 75 to 110 % of
what is stated, three in ten stand upright. Unpacked rows are padded to the longest of their batch
of 16. With lanes, as many packers each have a pool of their own and an equal share of documents.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np

from vlm_jax.data import packing

VISUAL_TOKENS, PATCH, MOST = 576, 16, 1600


class Part(NamedTuple):
    """A part of the mixture: thousands of documents, images of each, text tokens, picture sides."""

    thousands: int
    images: int
    median: float
    spread: float
    sides: tuple[int, int] = (640, 470)


MIXTURE = {
    "LLaVA": Part(158, 1, 330, 0.45),
    "ShareGPT": Part(40, 0, 1300, 0.6),
    "VQAv2": Part(83, 1, 150, 0.5),
    "GQA": Part(72, 1, 190, 0.5, (500, 375)),
    "OKVQA": Part(9, 1, 90, 0.4),
    "OCRVQA": Part(80, 1, 150, 0.2, (480, 340)),
    "A-OKVQA": Part(66, 1, 110, 0.3),
    "TextCaps": Part(22, 1, 90, 0.15, (1024, 768)),
    "RefCOCO": Part(48, 1, 220, 0.5),
    "Visual Genome": Part(86, 1, 260, 0.5, (500, 375)),
}
# Tokens, images and patches of a row; without patches each image has room of its own.
BUDGETS = ((4352, 5), (4480, 5), (8704, 10), (4352, 6, 4032), (8704, 11, 8000))


class Drawn(NamedTuple):
    """A document: tokens, images, and rows and columns of the patches of each."""

    tokens: int
    images: int
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        return self.images * self.grid[0] * self.grid[1]


def drawn(count: int, tokens: int) -> list[Drawn]:
    """Documents of the mixture, none longer than a row."""
    rng, sizes = np.random.default_rng(0), np.random.default_rng(1)
    parts = list(MIXTURE.values())
    shares = np.array([part.thousands for part in parts], float)
    found = []
    for i in rng.choice(len(parts), size=count, p=shares / shares.sum()):
        part = parts[i]
        visual = part.images * VISUAL_TOKENS
        text = rng.lognormal(np.log(part.median), part.spread)
        length = visual + int(np.clip(text, 20, tokens - visual))
        found.append(Drawn(length, part.images, _grid(part.sides, sizes)))
    return found


def _grid(sides: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Rows and columns of the patches of a picture."""
    long, short = sides[0] * rng.uniform(0.8, 1.0), sides[1] * rng.uniform(0.75, 1.1)
    upright = rng.random() < 0.3
    smaller = min(1.0, (MOST * PATCH**2 / (long * short)) ** 0.5)
    rows, columns = (int(smaller * side) // PATCH for side in (short, long))
    return (columns, rows) if upright else (rows, columns)


class Empty(NamedTuple):
    """Shares of tokens, slots and patches that stay empty, and CPU milliseconds of a row."""

    tokens: float
    slots: float
    patches: float
    spent: float


def packed(documents: list[Drawn], budget: tuple[int, ...], pool: int) -> Empty:
    """What one packer leaves empty, until its documents run out."""
    arriving, pending = iter(documents), []
    filled, rows, spent = np.zeros(3), 0, 0.0
    needs = lambda d: (d.tokens, d.images, d.patches)[: len(budget)]  # noqa: E731
    while True:
        while len(pending) < pool and (document := next(arriving, None)) is not None:
            pending.append(document)
        if len(pending) < pool:  # the last rows would say how the stream ends, not how it runs
            room = rows * np.array([*budget, budget[1] * MOST][:3])
            return Empty(*(1 - filled / room), 1e3 * spent / rows)
        start = time.process_time()
        chosen = packing.choose(pending, needs, *budget)
        spent += time.process_time() - start
        filled += np.sum([(*pending[i][:2], pending[i].patches) for i in chosen], axis=0)
        rows += 1
        for i in reversed(chosen):
            del pending[i]


def in_lanes(documents: list[Drawn], budget: tuple[int, ...], pool: int, lanes: int) -> Empty:
    """The mean over packers that each get every so-manieth document."""
    found = [packed(documents[lane::lanes], budget, pool) for lane in range(lanes)]
    return Empty(*np.mean(found, axis=0))


def unpacked(documents: list[Drawn], batch: int = 16) -> float:
    """The share of tokens that is padding where every document has a row."""
    lengths = np.array([document.tokens for document in documents])
    lengths = lengths[: len(lengths) // batch * batch].reshape(-1, batch)
    return 1 - lengths.sum() / (lengths.max(axis=1).sum() * batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--pool", type=int, default=64, help="documents that wait")
    parser.add_argument("--lanes", type=int, default=8, help="packers with a pool of their own")
    parser.add_argument("--repeats", type=int, default=5, help="times that each step is measured")
    parser.add_argument("--no-steps", action="store_true", help="padding alone")
    options = parser.parse_args()
    print("tokens  images  patches  lanes  empty tokens %  slots %  patches %  ms a row  positions")
    for budget in BUDGETS:
        documents = drawn(options.documents, budget[0])
        for lanes in sorted({1, options.lanes}):
            empty = in_lanes(documents, budget, options.pool, lanes)
            ratio = (1 - empty.tokens) / (1 - unpacked(documents))
            tokens, images, patches = (*budget, 0)[:3]
            shares = [100 * share for share in empty[:3]]
            print(
                f"{tokens:6}  {images:6}  {patches or 'slots':>7}  {lanes:5}  {shares[0]:14.1f}  "
                f"{shares[1]:7.1f}  {shares[2]:9.1f}  {empty.spent:8.2f}  {ratio:9.2f}"
            )
    print("positions: useful tokens a position, as a ratio to unpacked rows")
    if not options.no_steps:
        from benchmarks import packed_steps

        packed_steps.report(options.repeats)


if __name__ == "__main__":
    main()
