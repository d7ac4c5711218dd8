"""mPLUG-Owl (Ye et al. 2023, arXiv 2304.14178): CLIP L/14, a visual abstractor, LLaMA-7B.

The second stage, which trains the decoder's queries and values by LoRA and nothing else; `full` is
the same with all of the decoder (train_it_wo_lora.sh); `align` is the first, which trains encoder
and abstractor; `stages` walks the first and the second. The paper says that the second trains the
abstractor too; the code does not.

The authors' data: LAION-400M, COYO, CC and COCO for the first stage (unverified); then 361,481
samples of Alpaca, Vicuna and Baize, without pictures, and of LLaVA-Instruct (their number:
train_it.sh).
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import resampler
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.resizing import SQUASH

WORDS = (("", "full", "align", "stages"),)


@local.variant
def get_config(variant: str = ""):
    """The second stage, or the first, or both.

    Raises:
      ValueError: the variant is not known.
    """
    (stage,) = common.words("mplug_owl", variant, *WORDS)
    if stage == "stages":
        return common.walk(get_config, "mplug_owl", align="align", tune="")
    config = common.system(
        "mplug_owl",
        c.Model(
            published("clip-l14", norm_eps=1e-6, final_norm=True, keep_class=True, resize=SQUASH),
            resampler("mplug-owl"),
            decoder("llama1-7b"),
        ),
        tokens=2048,
        template="mplug_owl",
    )
    common.adapt(
        config,
        c.Rule(r"decoder/.*(query|value)/kernel", "lora", rank=8, alpha=32.0, dropout=0.05),
    )
    # scripts/train_it.sh: 4236 steps are three epochs of batches of 256, that is of eight nodes
    # with 4 a GPU; betas, decay and clipping at 1 are its own. It asks for a floor of 1e-6, which
    # pipeline/train.py hands to nobody (its Trainer falls to 0 linearly); the floor is kept here.
    config.data.rows = 256
    config.train.update(steps=4236, lr=2e-5, end_lr=0.05, warmup_steps=50, weight_decay=1e-4)
    # configs/v0.yaml: CaptionProcessor of 224 px
    config.data.augment.update(crop=(0.5, 1.0), flip=0.5)
    return {"": lambda config: config, "full": full, "align": align}[stage](config)


def full(config):
    """The second stage without LoRA."""
    config.name += "-full"
    common.freeze(config, common.ENCODERS, r"connector/.*")
    # scripts/train_it_wo_lora.sh: 1 a GPU, accumulated 4 times
    config.train.update(lr=1e-5, end_lr=0.1)
    return config


def align(config):
    """The first stage, as the paper has it, unverified: 2.1M tokens a batch.

    50,000 steps, 1e-4 after a warm-up of 2000, betas 0.9 and 0.98, 1e-6, a decay of 0.1.
    """
    config.name += "-align"
    common.freeze(config, common.DECODER)
    common.captions(config)
    config.data.update(rows=1024, images_per_row=16)
    config.train.update(steps=50_000, lr=1e-4, warmup_steps=2000, weight_decay=0.1)
    config.train.update(end_lr=0.0, b2=0.98, eps=1e-6)
    return config
