"""Idefics 9B (Laurençon et al. 2023, arXiv 2306.16527): OpenCLIP H/14, 64 latents, gated
cross-attention before every fourth layer of LLaMA-7B.

Its number of steps is ours.
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
    common.captions(config)
    common.freeze(config, common.ENCODERS, common.DECODER_ALONE)
    config.data.rows = 1280  # 1.31M tokens
    config.train.update(steps=40_000, lr=1e-5, warmup_steps=2000, weight_decay=0.1)
    return config
