"""BLIP-2 (Li et al. 2023, arXiv 2301.12597): EVA-CLIP g/14, a Q-Former, a frozen OPT.

Variants: `opt-2.7b` or `opt-6.7b`. This is the second, generative stage; the first one's
contrastive and matching losses need a text tower, which is not here. With `coco` the captioning of
COCO that follows, in which the encoder trains too. FlanT5, an encoder and decoder, is left out.

The authors' data, 129M pictures: COCO, Visual Genome, CC3M, CC12M, SBU and 115M of LAION-400M with
captions by CapFilt (unverified). Their captions are in lower case, without punctuation, at most 50
words long (lavis/processors/blip_processors.py).
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets import qformer
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

WORDS = (("opt-2.7b", "opt-6.7b"), ("", "coco"))
# The norm of the encoder's features trains with the Q-Former (LAVIS: ln_vision).
BELOW_NORM = r"encoder/(?!norm/).*"


@local.variant
def get_config(variant: str = ""):
    """The second stage, or what follows it.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("blip2", variant, *WORDS)
    config = common.system(
        f"blip2-{size}",
        c.Model(published("blip2-g14"), qformer.BLIP2, decoder(size)),
        # 32 queries and at most 32 tokens of text (max_txt_len of blip2_opt.py).
        tokens=64,
    )
    common.captions(config, "blip2")
    common.freeze(config, BELOW_NORM, common.DECODER)
    # The paper, unverified: 80,000 steps of 1920 pictures, 1e-4 down to 5e-5, a warm-up of 2000,
    # betas 0.9 and 0.98. The public pretrain_stage2.yaml, for COCO and Visual Genome, has 16 times
    # 64, ten epochs down to 1e-5, and 0.999.
    config.data.rows = 1920
    config.train.update(steps=80_000, lr=1e-4, end_lr=0.5, warmup_steps=2000, b2=0.98)
    lavis(config)
    return coco(config) if stage else config


def lavis(config) -> None:
    """What all recipes of LAVIS share.

    lavis/projects/blip2/train: a decay of 0.05, of matrices alone (base_model.py). base_task.py
    does not clip, and blip_processors.py crops (blip2_image_train). Its warm-ups start at 1e-6
    (1e-8 for COCO), ours at 0; its cosine falls once an epoch and is counted from the first step
    on.
    """
    config.train.update(weight_decay=0.05, clip=0.0)
    config.data.augment.update(crop=(0.5, 1.0), flip=0.5)


def coco(config):
    """Captioning of COCO at 364 px (caption_coco_ft.yaml, train_caption_coco.sh): 16 times 16."""
    config.name += "-coco"
    common.put(config, encoder=published("blip2-g14", image_size=364))
    common.freeze(config, common.DECODER)
    # Five epochs of Karpathy's 566,747 captions (their number is unverified), to 0; the prompt is
    # "a photo of ".
    common.epochs(config, rows=256, samples=566_747, times=5, lr=1e-5, b2=0.999)
    config.train.update(warmup_steps=1000, end_lr=0.0)
    return config
