"""A tiny model, config and batch for the training tests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.batch import Batch, Images
from vlm_jax.config import Config, Data, Model, Train
from vlm_jax.data.packing import Info
from vlm_jax.parallel import mesh as meshes
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.training import adaptation
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

ROWS, TOKENS, IMAGES, TEXT, VOCAB = 8, 24, 2, 5, 64
QUERIES, PATCH, SIDE = 4, 4, 8


class Stream:
    """A training stream whose batch k is `batch(k)`; a stand-in for `pipeline.TrainStream`.

    Args:
      stop_at: the batch that cannot be had, as if the process had died.
      bad: batches whose images are no numbers.
      without: batches that do not come.
      side: of the images.
    """

    def __init__(self, stop_at: int = -1, bad: tuple = (), without: tuple = (), side: int = SIDE):
        self.next, self.stop_at, self.bad, self.without = 0, stop_at, bad, without
        self.side = side

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __next__(self):
        if self.next == self.stop_at:
            raise RuntimeError("killed")
        self.next += 1
        while self.next in self.without:
            self.next += 1
        made = batch(self.next, side=self.side)
        if self.next in self.bad:
            made = poisoned(made)
        documents = (((f"emoji/train/{self.next}", "emoji"),),) if self.bad else ()
        return made, Info(documents, {("emoji", "truncated"): 2} if self.next == 2 else {})

    def get_state(self):
        return {"next": self.next, "nested": {"bad": [1, 2]}}

    def set_state(self, state):
        assert state["nested"] == {"bad": [1, 2]}
        self.next = state["next"]


MODEL = Model(
    encoder=Encoder(16, 2, 32, 2, patch=PATCH, image_size=SIDE, dtype="float32"),
    connector=Connector(
        "perceiver", queries=QUERIES, layers=1, heads=2, kv_heads=2, dtype="float32"
    ),
    decoder=Decoder(VOCAB, 16, 2, 32, 4, 2, 8, tied=True, dropout=0.1, dtype="float32"),
)


def config(model: Model = MODEL, data: dict | None = None, **fields) -> Config:
    """A config of the tiny model; fields of `train` by name, `data` as a dict of changes."""
    names = Train.__dataclass_fields__
    train = {name: fields.pop(name) for name in list(fields) if name in names}
    return Config(
        name="tiny",
        model=model,
        data=Data(
            {"none": 1.0},
            **{"rows": ROWS, "tokens": TOKENS, "images_per_row": IMAGES, "text_tokens": TEXT}
            | (data or {}),
        ),
        train=Train(**{"steps": 20, "warmup_steps": 3, "lr": 3e-3} | train),
        **fields,
    )


class Prepared(NamedTuple):
    """What a run is made of, compiled once for all tests that share a config."""

    mesh: Mesh
    plan: adaptation.Plan
    step: Callable
    create: Callable


def prepared(config: Config, devices: int = 1) -> Prepared:
    """The step of a config, and a function that gives its first state anew."""
    # Only what the compiled programs depend on; the loop's tests change the rest.
    data = dataclasses.replace(config.data, mixture={})
    train = dataclasses.replace(config.train, log_every=1)
    key = repr(
        (
            *(config.model, data, train, config.seed, config.adaptation, config.parallel),
            *(config.guard, devices),
        )
    )
    if key not in _PREPARED:
        mesh = meshes.make(config.parallel, jax.devices()[:devices])
        plan = adaptation.of(config)
        abstract = states.abstract(config, plan, mesh)

        @functools.cache
        def first() -> states.State:
            return jax.tree.map(np.asarray, _create(config, plan, mesh))

        def create() -> states.State:
            # Copies, since a step takes the buffers over.
            place = lambda leaf, like: jax.device_put(leaf.copy(), like.sharding)  # noqa: E731
            return jax.tree.map(place, first(), abstract)

        _PREPARED[key] = Prepared(mesh, plan, steps.make_step(config, plan, mesh), create)
    return _PREPARED[key]


_create = states.create  # kept, as tests of the loop put `Prepared.create` in its place
_PREPARED: dict[str, Prepared] = {}


def poisoned(batch: Batch) -> Batch:
    """The batch, with one pixel that is no number."""
    patches = batch.images.patches.copy()
    patches[0, 0, 0] = np.nan
    return batch._replace(images=batch.images._replace(patches=patches))


def batch(seed: int, rows: int = ROWS, side: int = SIDE) -> Batch:
    """Rows of two documents, each an image and then text, and padding; a last row of text alone."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, TOKENS), np.int32)
    positions, blocks = np.zeros_like(segments), np.zeros_like(segments)
    visual, image = np.full_like(segments, -1), np.full_like(segments, -1)
    weights = np.zeros(segments.shape, np.float32)
    grids = np.zeros((rows, IMAGES, 2), np.int32)
    for row in range(rows):
        start = 0
        for number in range(2):
            with_image = row < rows - 1
            end = start + QUERIES * with_image + int(rng.integers(3, 7))
            segments[row, start:end] = number + 1
            positions[row, start:end] = np.arange(end - start)
            answer = start + QUERIES * with_image + 1
            weights[row, answer:end] = 1.0
            if with_image:
                visual[row, start : start + QUERIES] = np.arange(QUERIES) + number * QUERIES
                image[row, start:end] = number
                grids[row, number] = side // PATCH
            start = end
    count = (side // PATCH) ** 2
    places = np.stack(np.divmod(np.arange(count), side // PATCH), -1)
    texts = rng.integers(1, 12, (rows, IMAGES, TEXT)) * (grids[..., :1] > 0)
    texts[..., 3:] = 0
    return Batch(
        tokens=rng.integers(1, VOCAB, segments.shape).astype(np.int32),
        segments=segments,
        positions=positions,
        loss_weights=weights,
        blocks=blocks,
        visual_index=visual,
        image_index=image,
        image_texts=texts.astype(np.int32),
        images=Images(
            grids=grids,
            patches=rng.normal(size=(rows, IMAGES * count, PATCH**2 * 3)).astype(np.float32),
            patch_positions=np.tile(places, (rows, IMAGES, 1)).astype(np.int32),
            patch_images=np.repeat(np.arange(IMAGES), count)[None].repeat(rows, 0).astype(np.int32),
        ),
    )
