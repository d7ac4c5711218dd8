"""mPLUG-Owl (Ye et al. 2023, arXiv 2304.14178): CLIP L/14, a visual abstractor, LLaMA-7B.

The second stage, which trains the decoder's queries and values by LoRA and nothing else; `full` is
the same with all of the decoder (train_it_wo_lora.sh); `align` is the first, which trains encoder
and abstractor.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import resampler
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.resizing import SQUASH

WORDS = (("", "full", "align"),)


@local.variant
def get_config(variant: str = ""):
    """The second stage, or the first.

    Raises:
      ValueError: the variant is not known.
    """
    (stage,) = common.words("mplug_owl", variant, *WORDS)
    config = common.system(
        "mplug_owl",
        c.Model(
            published("clip-l14", norm_eps=1e-6, final_norm=True, keep_class=True, resize=SQUASH),
            resampler("mplug-owl"),
            decoder("llama1-7b"),
        ),
        tokens=2048,
    )
    common.adapt(
        config,
        c.Rule(r"decoder/.*(query|value)/kernel", "lora", rank=8, alpha=32.0, dropout=0.05),
    )
    config.data.rows = 32
    config.train.update(steps=4236, lr=2e-5, end_lr=0.05, warmup_steps=50, weight_decay=1e-4)
    return {"": lambda config: config, "full": full, "align": align}[stage](config)


def full(config):
    """The second stage without LoRA."""
    config.name += "-full"
    common.freeze(config, common.ENCODERS, r"connector/.*")
    config.train.update(lr=1e-5, end_lr=0.1)
    return config


def align(config):
    """The first stage: 2.1M tokens a batch."""
    config.name += "-align"
    common.freeze(config, common.DECODER)
    common.captions(config)
    config.data.update(rows=1024, images_per_row=16)
    config.train.update(steps=50_000, lr=1e-4, warmup_steps=2000, weight_decay=0.1)
    config.train.update(end_lr=0.0, b2=0.98, eps=1e-6)
    return config
