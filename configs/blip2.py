"""BLIP-2 (Li et al. 2023, arXiv 2301.12597): EVA-CLIP g/14, a Q-Former, a frozen OPT.

Variants: `opt-2.7b` or `opt-6.7b`. This is the second, generative stage; the first one's
contrastive and matching losses need a text tower, which is not here.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets import qformer
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

WORDS = (("opt-2.7b", "opt-6.7b"),)
# The norm of the encoder's features trains with the Q-Former (LAVIS: ln_vision).
BELOW_NORM = r"encoder/(?!norm/).*"


@local.variant
def get_config(variant: str = ""):
    """The second stage.

    Raises:
      ValueError: the variant is not known.
    """
    (size,) = common.words("blip2", variant, *WORDS)
    config = common.system(
        f"blip2-{size}",
        c.Model(published("blip2-g14"), qformer.BLIP2, decoder(size)),
        # 32 queries and at most 32 tokens of text.
        tokens=64,
    )
    common.captions(config)
    common.freeze(config, BELOW_NORM, common.DECODER)
    config.data.rows = 1920
    config.train.update(steps=80_000, lr=1e-4, end_lr=0.5, warmup_steps=2000)
    config.train.update(weight_decay=0.05, b2=0.98)
    return config
