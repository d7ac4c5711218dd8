"""A tiny model with odd sizes, and batches laid out by hand from documents."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import patchify

from vlm_jax.batch import Batch, Images
from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder

VOCAB, SIDE, PATCH, QUERIES = 41, 8, 4, 3
STAGES = ((2, 6, 1),)
MODEL = Model(
    encoder=Encoder(12, 2, 20, 3, patch=PATCH, image_size=SIDE, dtype="float32", remat=False),
    connector=Connector(
        "perceiver", queries=QUERIES, layers=2, width=8, heads=4, kv_heads=2, dtype="float32"
    ),
    decoder=Decoder(VOCAB, 20, 3, 28, 6, 3, 4, tied=True, dtype="float32", remat=False),
)


# Fields of decoders whose layers know of positions in other ways than Llama's.
FAMILIES = {
    "windows, caps, two norms": {
        "norm": "rms_plus_one",
        "post_norms": True,
        "qk_norm": True,
        "query_scale": 3.0,
        "attention_cap": 2.0,
        "logit_cap": 5.0,
        "window": 4,
        "pattern": ("local", "global"),
        "local_theta": 20.0,
        "embed_root": True,
    },
    "linear biases": {"position": "alibi", "norm": "layer_unbiased", "gated": False},
    "learned positions": {
        "position": "learned",
        "positions": 66,
        "position_offset": 2,
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "gated": False,
        "activation": "relu",
    },
    "half rotated, parallel": {"norm": "layer", "rope_share": 0.5, "parallel": True},
}


def model(stem: str = "patch", connector: dict | None = None, **decoder) -> Model:
    """MODEL with another stem, other fields of its connector, or other fields of its decoder."""
    stages = STAGES if stem == "conv" else ()
    return Model(
        encoder=dataclasses.replace(MODEL.encoder, stem=stem, stem_stages=stages),
        connector=dataclasses.replace(MODEL.connector, **(connector or {})),
        decoder=dataclasses.replace(MODEL.decoder, **decoder),
    )


def change(model: Model, **fields) -> Model:
    """`model` with these fields in every tower that has them."""
    towers = {}
    for name in ("encoder", "connector", "decoder"):
        tower = getattr(model, name)
        known = {key: value for key, value in fields.items() if hasattr(tower, key)}
        towers[name] = dataclasses.replace(tower, **known)
    return Model(**towers)


def weights(model: Model, seed: int = 0) -> dict[str, jax.Array]:
    """Random parameters, biases and scales too, so that each does something."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in sorted(params.abstract(model).items()):
        noise = 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
        flat[path] = jnp.asarray(noise + path.endswith("/scale"))
    return flat


class Document(NamedTuple):
    """Tokens, which visual token stands where (-1 = none), images, and the prompt's length."""

    tokens: np.ndarray
    visual: np.ndarray
    pixels: list[np.ndarray]
    prompt: int


def document(rng: np.random.Generator, parts: tuple, queries: int = QUERIES, prompt: int = 0):
    """Text of so many tokens, or an image ("image"), in reading order."""
    tokens, visual, pixels = [], [], []
    for part in parts:
        if part == "image":
            visual += [len(pixels) * queries + q for q in range(queries)]
            tokens += [0] * queries
            pixels.append(rng.normal(size=(SIDE, SIDE, 3)).astype(np.float32))
        else:
            visual += [-1] * part
            tokens += rng.integers(1, VOCAB, part).tolist()
    return Document(np.array(tokens, int), np.array(visual, int), pixels, prompt)


def lay_out(
    model: Model,
    rows: list[list[Document]],
    tokens: int,
    slots: int,
    padding: int = 0,
    empty: float = 0.0,
) -> Batch:
    """Rows of documents one after the other.

    Args:
      model: read for its stem and its visual tokens per image.
      rows: documents of every row.
      tokens, slots: text positions and image slots of a row.
      padding: token where there is none.
      empty: what the pixels of an image slot without an image hold.
    """
    shape, queries = (len(rows), tokens), model.visual_tokens
    batch = {name: np.zeros(shape, np.int32) for name in ("segments", "positions", "blocks")}
    batch["tokens"] = np.full(shape, padding, np.int32)
    batch["visual_index"] = np.full(shape, -1, np.int32)
    batch["loss_weights"] = np.zeros(shape, np.float32)
    pixels = np.full((len(rows), slots, SIDE, SIDE, 3), empty, np.float32)
    grids = np.zeros((len(rows), slots, 2), np.int32)
    for row, documents in enumerate(rows):
        start = image = 0
        for number, document in enumerate(documents):
            length = len(document.tokens)
            here = row, slice(start, start + length)
            batch["tokens"][here] = document.tokens
            batch["segments"][here] = number + 1
            batch["positions"][here] = np.arange(length)
            batch["blocks"][here] = np.arange(length) < document.prompt
            moved = document.visual + image * queries
            batch["visual_index"][here] = np.where(document.visual < 0, -1, moved)
            batch["loss_weights"][here] = document.visual < 0
            for picture in document.pixels:
                pixels[row, image], grids[row, image] = picture, SIDE // PATCH
                image += 1
            start += length
    conv = model.encoder.stem == "conv"
    images = {"pixels": pixels} if conv else {"patches": _patches(pixels)}
    nowhere = np.full(shape, -1, np.int32)
    texts = np.zeros((len(rows), slots, 2), np.int32)
    batch = Batch(
        **batch, image_index=nowhere, image_texts=texts, images=Images(grids=grids, **images)
    )
    return jax.tree.map(jnp.asarray, batch)


def _patches(pixels: np.ndarray) -> np.ndarray:
    rows, slots = pixels.shape[:2]
    patches = patchify(pixels.reshape(rows * slots, SIDE, SIDE, 3), PATCH)
    return patches.reshape(rows, -1, patches.shape[-1])


@functools.lru_cache
def _forward(model: Model, visual: bool):
    def forward(flat, batch, dropout):
        vlm = params.build(model, flat)
        seen = vlm.visual(batch.images, dropout) if visual else None
        return vlm.unembed(vlm.hidden(batch, seen, dropout))

    return jax.jit(forward)


def logits(model: Model, flat: dict, batch: Batch, visual: bool = True, dropout=None) -> jax.Array:
    """Logits of a batch, [B, T, V]; `visual=False` does not run the encoder."""
    return _forward(model, visual)(flat, batch, dropout)
