"""A model of a few thousand parameters over the embedded data, for the tests of evaluation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config as configs
from vlm_jax.models import params
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder

VOCAB = 3072


def config(connector: str = "perceiver", **measured) -> configs.Config:
    """A config whose `eval` part has the fields `measured`."""
    encoder = Encoder(16, 1, 32, 2, patch=16, image_size=64, dtype="float32", remat=False)
    kind = Connector(connector, queries=3, layers=1, heads=2, kv_heads=2, dtype="float32")
    decoder = Decoder(VOCAB, 16, 1, 32, 2, 1, 8, tied=True, dtype="float32", remat=False)
    return configs.Config(
        name="test",
        model=configs.Model(encoder, kind, decoder),
        data=configs.Data({"emoji:caption": 1.0}, tokens=96, images_per_row=2),
        eval=configs.Eval(**{"rows": 4, "max_new_tokens": 3, **measured}),
    )


@functools.cache
def parameters(connector: str = "perceiver", seed: int = 0) -> dict[str, jax.Array]:
    """Random parameters of `config(connector)`, large enough for its replies to differ."""
    rng = np.random.default_rng(seed)
    shapes = params.abstract(config(connector).model)
    # Not `params.init`, which takes longer to compile than all that is tested here.
    return {path: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype) for path, x in shapes.items()}


def blind(config: configs.Config) -> configs.Config:
    """The same config without images."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, images=False))
