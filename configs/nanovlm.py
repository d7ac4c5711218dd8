"""nanoVLM v0.1 222M (Hugging Face 2025): SigLIP-B/16, pixel shuffle and one linear layer,
SmolLM2-135M; the connector learns twenty times as fast as the rest."""

from configs import common
from vlm_jax import config as c
from vlm_jax import schema
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

WORDS = (("",),)


def get_config(variant: str = ""):
    """The one stage; it has no variants.

    Raises:
      ValueError: a variant is asked for.
    """
    common.words("nanovlm", variant, *WORDS)
    config = common.system(
        "nanovlm",
        c.Model(
            published("siglip-b16"),
            Connector("linear", pool="shuffle", factor=2, bias=False),
            decoder("smollm2-135m"),
        ),
        tokens=128,
        template="tiny",
    )
    config.adaptation = schema.plain((c.Rule(r"(encoder|decoder)/.*", lr=0.05), c.Rule(r".*")))
    # 1.7M samples of The Cauldron; AdamW's own decay of 0.01.
    common.epochs(config, rows=256, samples=1_700_000, times=5, lr=2e-3, weight_decay=0.01)
    config.train.end_lr = 0.1
    return config
