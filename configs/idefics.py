"""Idefics 9B (Laurençon et al. 2023, arXiv 2306.16527): OpenCLIP H/14, 64 latents, gated
cross-attention before every fourth layer of LLaMA-7B.

Its number of steps is ours. The authors' data: OBELICS 73.85 %, Wikipedia 6.15 %, LAION 17.18 %,
PMD 2.82 % of the tokens (model card, unverified). The instructed model, all of which was tuned, has
no variant: no readable source has its figures.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import resampler
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.fusion import cross_attention
from vlm_jax.presets.resizing import SQUASH

WORDS = (("9b",),)


@local.variant
def get_config(variant: str = ""):
    """Pre-training.

    Raises:
      ValueError: the variant is not known.
    """
    (size,) = common.words("idefics", variant, *WORDS)
    config = common.system(
        f"idefics-{size}",
        c.Model(
            published("openclip-h14", keep_class=True, resize=SQUASH),
            resampler("idefics"),
            # <fake_token_around_image> and <image>
            decoder("llama1-7b", added=2),
            fusion=cross_attention("idefics-9b"),
        ),
        tokens=1024,
        images_per_row=8,
    )
    common.captions(config, "idefics")
    # no_decay of the m4 trainer: gates and the resampler too
    rules = c.Rule(r"connector/.*|.*_gate", weight_decay=0.0), *c.FULL
    common.freeze(config, common.ENCODERS, common.DECODER_ALONE, rules=rules)
    # Model card, unverified: 1.31M tokens a batch in sequences of 1024, 1e-5, a warm-up of 2000, a
    # decay of 0.1, clipping at 1, and a z-loss of 1e-3.
    config.data.rows = 1280
    config.train.update(steps=40_000, lr=1e-5, warmup_steps=2000, weight_decay=0.1, z_loss=1e-3)
    return config
