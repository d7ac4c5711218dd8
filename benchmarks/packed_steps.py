"""Training steps of a small model on packed and on unpacked batches of one mixture.

    python -m benchmarks.packed_steps

Everything is divided by SCALE: lengths, visual tokens and patches of `benchmarks.packing`'s
documents, so that attention between all pairs of a row has the share of a decoder's operations that
causal attention has in a 7B model at full length (a sixth of its matrices'). Attention is written
out, not a fused kernel, and takes more of the time than that. All steps run in one process on one
core, in turns; a step's time is the median of the process's CPU clock over the repeats, without
compilation. Useful tokens are those that are no padding. Three ways to lay out the same documents:

unpacked: a row each, batches of 16 padded to the longest text and the largest picture in each; of
    many such batches those at even quantiles of their padding are run;
slots: packed rows in which every image has room for the most patches;
shared: packed rows whose images share patches.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.packing import MOST, VISUAL_TOKENS, Drawn, drawn
from vlm_jax.batch import Batch
from vlm_jax.config import Config, Data, Model, Parallel, Train
from vlm_jax.data import packing
from vlm_jax.data.documents import Document
from vlm_jax.data.images import grid_of
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder

SCALE = 32
TOKENS, IMAGES, PATCHES = 8704 // SCALE, 11, 8000 // SCALE
QUERIES, PATCH, VOCAB = VISUAL_TOKENS // SCALE, 8, 1024
BATCHES, ROWS, POOL, UNPACKED = 4, 4, 64, 16

PLAIN = {"dtype": "float32", "remat": False}
TOWER = {"patch": PATCH, "image_size": 56, "max_patches": MOST // SCALE}
MODEL = Model(
    Encoder(128, 3, 512, 2, position_resize="bucket", **TOWER, **PLAIN),
    Connector("perceiver", queries=QUERIES, layers=1, width=128, heads=2, kv_heads=2, **PLAIN),
    Decoder(VOCAB, 256, 4, 688, 4, 4, 64, tied=True, **PLAIN),
)


def config(rows: int, tokens: int, images: int, patches: int = 0, most: int = 0) -> Config:
    """A run of the model on batches of this shape; `most` patches an image, 0 = the model's own."""
    encoder = MODEL.encoder if not most else dataclasses.replace(MODEL.encoder, max_patches=most)
    data = Data(
        {"none": 1.0}, rows=rows, tokens=tokens, images_per_row=images, patches_per_row=patches
    )
    model = dataclasses.replace(MODEL, encoder=encoder)
    return Config("packing", model, data, train=Train(warmup_steps=1), parallel=Parallel(1))


def document(size: Drawn, rng: np.random.Generator) -> Document:
    """Random words, and a random picture before them, of a drawn document's size over SCALE."""
    visual = size.images * QUERIES
    text = max(2, round((size.tokens - size.images * VISUAL_TOKENS) / SCALE))
    length = min(visual + text, TOKENS)
    rows, columns = (max(1, round(side / SCALE**0.5)) for side in size.grid)
    while rows * columns > MOST // SCALE:
        rows, columns = rows - (rows >= columns), columns - (columns > rows)
    shape = (size.images, rows * PATCH, columns * PATCH, 3)
    return Document(
        key="",
        source="",
        tokens=rng.integers(1, VOCAB, length).astype(np.int32),
        loss_weights=(np.arange(length) >= visual).astype(np.float32),
        blocks=np.zeros(length, np.int32),
        visual_index=np.where(np.arange(length) < visual, np.arange(length), -1),
        image_index=np.full(length, size.images - 1),
        pixels=rng.integers(0, 256, shape, np.uint8),
        texts=np.zeros((size.images, 16), np.int32),
    )


class Run(NamedTuple):
    """A step to be timed, and the useful tokens of its batch."""

    step: Callable[[], None]
    useful: int


def packed_batches(documents: list[Document], shared: int) -> Iterator[tuple[Config, Batch]]:
    """Packed batches, each row filled from a full pool."""
    made = config(ROWS, TOKENS, IMAGES, shared)
    shape = packing.shape_of(made, pad=0)
    arriving, pending = iter(documents), []
    for _ in range(BATCHES):
        rows = []
        for _ in range(ROWS):
            pending += itertools.islice(arriving, POOL - len(pending))
            chosen = packing.choose(pending, shape.needs, *shape.room)
            rows.append([pending[i] for i in chosen])
            pending = [one for i, one in enumerate(pending) if i not in chosen]
        yield made, packing.assemble(rows, shape)


def unpacked_batches(documents: list[Document]) -> Iterator[tuple[Config, Batch]]:
    """Batches of a document a row."""
    starts = range(0, len(documents) - UNPACKED + 1, UNPACKED)
    parts = [documents[start : start + UNPACKED] for start in starts]
    parts.sort(key=lambda part: sum(map(len, part)) / max(map(len, part)))
    for i in range(BATCHES):
        part = parts[(2 * i + 1) * len(parts) // (2 * BATCHES)]
        grids = [grid_of(pixels, PATCH) for one in part for pixels in one.pixels]
        most = max(rows * columns for rows, columns in grids)
        made = config(UNPACKED, max(map(len, part)), 1, most=most)
        yield made, packing.assemble([[one] for one in part], packing.shape_of(made, pad=0))


def runs(batches: list[tuple[Config, Batch]]) -> list[Run]:
    """Their steps, compiled; one state goes through the steps of one config."""
    import jax

    from vlm_jax.models import params
    from vlm_jax.parallel import mesh as meshes
    from vlm_jax.training import adaptation
    from vlm_jax.training import state as states
    from vlm_jax.training import step as steps

    @functools.cache
    def started(made: str):
        """The step of a config and a list that holds its state."""
        made = configs[made]
        mesh = meshes.make(made.parallel, jax.devices()[:1])
        plan = adaptation.plan(params.abstract(made.model), made.adaptation)
        return mesh, steps.make_step(made, plan, mesh), [states.create(made, plan, mesh)]

    def timed(made: Config, batch: Batch) -> Run:
        mesh, step, held = started(repr(made))
        placed = steps.place(batch, mesh)

        def run() -> None:
            held[0], metrics = step(held[0], placed)
            jax.block_until_ready((held[0], metrics))

        run()
        return Run(run, int((batch.segments > 0).sum()))

    configs = {repr(made): made for made, _ in batches}
    return [timed(made, batch) for made, batch in batches]


def measured(ways: dict[str, list[Run]], repeats: int) -> dict[str, float]:
    """Useful tokens a second of each way, in turns."""
    spent = {(name, i): [] for name, each in ways.items() for i in range(len(each))}
    for _ in range(repeats):
        for (name, i), times in spent.items():
            start = time.process_time()
            ways[name][i].step()
            times.append(time.process_time() - start)
    seconds = {key: statistics.median(times) for key, times in spent.items()}
    return {
        name: sum(run.useful for run in each) / sum(seconds[name, i] for i in range(len(each)))
        for name, each in ways.items()
    }


def report(repeats: int) -> None:
    """Measures and prints."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(2)
    documents = [document(size, rng) for size in drawn(400, SCALE * TOKENS)]
    ways = {
        "unpacked": list(unpacked_batches(documents)),
        "slots": list(packed_batches(documents, shared=0)),
        "shared": list(packed_batches(documents, shared=PATCHES)),
    }
    for name, batches in ways.items():
        patches, tokens = (
            np.concatenate([empty(batch).ravel() for _, batch in batches]).mean() * 100
            for empty in (lambda b: b.images.patch_images < 0, lambda b: b.segments == 0)
        )
        print(f"{name:8}  {tokens:5.1f} % of tokens and {patches:5.1f} % of patches empty")
    speeds = measured({name: runs(batches) for name, batches in ways.items()}, repeats)
    for name, speed in speeds.items():
        ratio = speed / speeds["unpacked"]
        print(f"{name:8}  {speed:7.0f} useful tokens a second of one core, ratio {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    report(parser.parse_args().repeats)


if __name__ == "__main__":
    main()
