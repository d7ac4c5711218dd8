"""OpenFlamingo (Awadalla et al. 2023, arXiv 2308.01390): CLIP L/14, 64 latents, gated
cross-attention in a frozen decoder.

Variants: `9b` (MPT-7B, every fourth layer) or `4b` (RedPajama-3B, every second). The 3B is left
out: its MPT-1B norms queries and keys over all heads at once, which no preset does. The authors'
data: 60M sequences of MMC4 (pictures and texts whose similarity is 0.24 or more, at most six
pictures, 256 tokens) and 120M pairs of LAION-2B (32 tokens), whose loss counts 0.2
(`data.loss_weights`).
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
        # MMC4: at most six images in 256 tokens (train/data.py).
        tokens=256,
        images_per_row=6,
    )
    common.captions(config, "flamingo")
    # Only the gated blocks are decayed (train/train.py, get_grouped_params).
    rules = c.Rule(r"decoder/cross/.*"), c.Rule(r".*", weight_decay=0.0)
    common.freeze(config, common.ENCODERS, common.DECODER_ALONE, rules=rules)
    # scripts/run_train.sh: 32 sequences and 64 pairs a GPU on eight (that of the 3B; of the others
    # none is there), 480 times 125,000 and 250,000 samples, a warm-up of 1875. train/train.py:
    # 1e-4, constant, a decay of 0.1, clipping at 1; train/data.py flips half of the pictures.
    common.epochs(config, rows=768, samples=480 * 375_000, lr=1e-4, weight_decay=0.1)
    config.train.update(schedule="constant", warmup_steps=1875)
    config.data.augment.flip = 0.5
    return config
