"""Exact packing through every room: source or hand-made examples, template, packer, model, loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import config as configs
from vlm_jax.data import documents, packing, sources
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.example import Example, ImageRef, Turn
from vlm_jax.models import params
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.training import objectives

MODEL = configs.Model(
    Encoder(24, 2, 40, 3, patch=16, image_size=64, dtype="float32", remat=False),
    Connector("perceiver", queries=5, layers=1, heads=2, kv_heads=1, dtype="float32"),
    Decoder(3072, 40, 2, 56, 4, 2, 10, tied=True, dtype="float32", remat=False),
)

CROSS = CrossAttention(24, heads=3, kv_heads=1, head_dim=6, every=1)


def config(attention: str = "causal", fusion: CrossAttention | None = None) -> configs.Config:
    data = configs.Data(
        {"emoji:caption": 1.0},
        rows=2,
        tokens=128,
        images_per_row=6,
        attention=attention,
    )
    model = dataclasses.replace(MODEL, fusion=fusion)
    return configs.Config(name="exact", model=model, data=data)


def pictures(count: int) -> tuple[bytes, ...]:
    source = sources.open_source("emoji:caption", "train")
    rng = np.random.default_rng(0)
    return tuple(source.example(i * 7, rng).images[0] for i in range(count))


def example(key: str, *turns: Turn) -> Example:
    refs = [part for turn in turns for part in turn.parts if isinstance(part, ImageRef)]
    return Example(key, "test", pictures(len(refs)), turns)


def examples() -> list[Example]:
    user, reply = functools.partial(Turn, "user"), functools.partial(Turn, "assistant")
    return [
        example("text only", user(("what is red and round?",)), reply(("an apple",))),
        example("one image", user((ImageRef(0),)), reply(("red apple",))),
        example(
            "three images in the middle of text",
            user(("first", ImageRef(0), "then", ImageRef(1), "and last", ImageRef(2), "which?")),
            reply(("second",)),
        ),
        example(
            "two turns",
            user((ImageRef(0), "what is this?")),
            reply(("a dog face",)),
            user(("and is it an animal?",)),
            reply(("yes",)),
        ),
    ]


@pytest.mark.parametrize(
    "attention, fusion",
    [
        ("causal", None),
        ("prefix", None),
        ("causal", dataclasses.replace(CROSS, width=28)),
        pytest.param("prefix", dataclasses.replace(CROSS, both=True), marks=pytest.mark.slow),
    ],
)
def test_packed_rows_give_the_loss_and_gradients_of_their_documents_alone(attention, fusion):
    run = config(attention, fusion)
    tokenizer = tokenizers.for_config(run)
    packed = [documents.document(e, run, tokenizer) for e in examples()]
    shape = packing.shape_of(run, tokenizer.pad)
    flat = params.init(run.model, jax.random.key(0))
    # Gates start at zero, where what lies behind them has no gradient.
    flat = {path: leaf + 0.5 * path.endswith("_gate") for path, leaf in flat.items()}

    @jax.jit
    def total(flat, batch):
        """Loss summed over supervised tokens, and its gradient."""

        def nats(flat):
            loss, sums = objectives.losses(params.build(run.model, flat), batch, run)
            return loss * sums["weight"], sums["weight"]

        return jax.value_and_grad(nats, has_aux=True)(flat)

    # One row with three documents, one with the last; then each alone; then a text-only batch.
    together = packing.assemble([packed[:3], packed[3:]], shape)
    alone = [packing.assemble([[document]], shape) for document in packed]
    (loss, weight), gradient = total(flat, together)
    assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in gradient.values())
    parts = [total(flat, batch) for batch in alone]

    assert total._cache_size() == 1  # text only, three images, images in the middle: one program
    np.testing.assert_allclose(weight, sum(part[0][1] for part in parts))
    np.testing.assert_allclose(loss, sum(part[0][0] for part in parts), rtol=1e-5)
    summed = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), [p[1] for p in parts])
    # Relative to each leaf's largest entry; the true gradient of key biases is zero, so what they
    # hold is rounding and is measured against the others.
    largest = max(float(jnp.abs(leaf).max()) for leaf in gradient.values())
    for path, leaf in gradient.items():
        scale = max(float(jnp.abs(leaf).max()), 1e-3 * largest)
        np.testing.assert_allclose(leaf / scale, summed[path] / scale, atol=1e-5, err_msg=path)
