"""PaliGemma 3B (Beyer et al. 2024, arXiv 2407.07726): SigLIP-SO400M, one linear layer, Gemma 2B;
image and prompt see each other both ways.

Variants: `224`, `448` or `896` pixels. This is big_vision's fine-tuning (transfers/forkme.py); the
samples and epochs are its example's.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit

WORDS = (("224", "448", "896"),)


@local.variant
def get_config(variant: str = ""):
    """Fine-tuning.

    Raises:
      ValueError: the variant is not known.
    """
    (pixels,) = common.words("paligemma", variant, *WORDS)
    encoder = vit("So400m/14", image_size=int(pixels))
    config = common.system(
        f"paligemma-{pixels}",
        # Behind Gemma's 256,000 tokens: 1024 for places, 128 for segments, <image>, and padding.
        c.Model(encoder, Connector("linear"), decoder("gemma-2b", vocab=257_216)),
        tokens=encoder.patches + 128,
        attention="prefix",
        template="tiny",
    )
    # Its decay of 3e-7 is not multiplied by the learning rate; ours is.
    common.epochs(config, rows=32, samples=90, times=15, warmup=0.05, lr=1e-5, weight_decay=0.03)
    return config
