"""OpenFlamingo (Awadalla et al. 2023, arXiv 2308.01390): CLIP L/14, 64 latents, gated
cross-attention in a frozen decoder.

Variants: `9b` (MPT-7B, every fourth layer) or `4b` (RedPajama-3B, every second). The 3B is left
out: its MPT-1B norms queries and keys over all heads at once, which no preset does. Batch is ours.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import resampler
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.fusion import cross_attention

DECODERS = {"9b": "mpt-7b", "4b": "redpajama-3b"}
WORDS = (tuple(DECODERS),)


@local.variant
def get_config(variant: str = ""):
    """The one stage.

    Raises:
      ValueError: the variant is not known.
    """
    (size,) = common.words("openflamingo", variant, *WORDS)
    config = common.system(
        f"openflamingo-{size}",
        c.Model(
            published("clip-l14"),
            resampler("open-flamingo"),
            # <image> and <|endofchunk|>
            decoder(DECODERS[size], added=2),
            fusion=cross_attention(f"open-flamingo-{size}"),
        ),
        # MMC4: at most six images in 256 tokens.
        tokens=256,
        images_per_row=6,
    )
    common.captions(config)
    # Only the gated blocks are decayed.
    rules = c.Rule(r"decoder/cross/.*"), c.Rule(r".*", weight_decay=0.0)
    common.freeze(config, common.ENCODERS, common.DECODER_ALONE, rules=rules)
    # 60M sequences of MMC4 and 120M of LAION; the rate is constant (train.py).
    common.epochs(config, rows=512, samples=180_000_000, lr=1e-4, weight_decay=0.1)
    config.train.update(schedule="constant", warmup_steps=1875)
    return config
