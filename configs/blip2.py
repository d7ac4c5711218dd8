"""BLIP-2 (Li et al. 2023, arXiv 2301.12597): EVA-CLIP g/14, a Q-Former, a frozen OPT.

Variants: `opt-2.7b` or `opt-6.7b`, the second, generative stage; with `coco` the captioning of COCO
that follows, in which the encoder trains too; `stage1`, the first, in which the Q-Former learns to
see without a decoder; with `stages` it and the second in one run. The first begins as BERT, whose
folder is as transformers writes it, and the second needs a decoder:
`init=(..., c.Init("bert-base-uncased", "connector"), c.Init("bert-base-uncased", "text"))`, and
`init=(c.Init("models/opt", "decoder"),)` among the changes of `stage2`. Alone, the second
starts from `c.Init("runs/blip2-stage1", "connector")`. FlanT5, an encoder and decoder, is left out.

The authors' data, 129M pictures: COCO, Visual Genome, CC3M, CC12M, SBU and 115M of LAION-400M with
captions by CapFilt (unverified). Their captions are in lower case, without punctuation, at most 50
words long (lavis/processors/blip_processors.py).
"""

import dataclasses

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets import matching, qformer
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

WORDS = (("opt-2.7b", "opt-6.7b"), ("", "coco", "stages"))
FIRST = "stage1"
# The norm of the encoder's features trains with the Q-Former (LAVIS: ln_vision).
BELOW_NORM = r"encoder/(?!norm/).*"


@local.variant
def get_config(variant: str = ""):
    """One of the stages, by default the second, or the first two in one run.

    Raises:
      ValueError: the variant is not known.
    """
    if variant == FIRST:
        return _first()
    size, stage = common.words("blip2", variant, *WORDS)
    if stage == "stages":
        return common.walk(get_config, f"blip2-{size}", stage1=FIRST, stage2=size)
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


def _first():
    """The first stage, of ViT-g."""
    heads = matching.BLIP2
    # BERT's dropout, which LAVIS leaves on (Qformer.py); we have none on attention's weights.
    reader = dataclasses.replace(qformer.BLIP2, vocab=heads.start + 1, dropout=0.1)
    config = common.system(
        "blip2-stage1",
        c.Model(published("blip2-g14"), reader, text=heads),
        tokens=heads.length,  # max_txt_len (blip2_qformer.py)
        # [CLS], caption, [SEP] with BERT's tokenizer, as long as there is room.
        template="clip",
        overlong="truncate",
        # RandomResizedCrop(scale=(0.5, 1.0)) and flips (blip_processors.py, blip2_image_train).
        augment=c.Augment(crop=(0.5, 1.0), flip=0.5),
    )
    with config.unlocked():
        config.data.mixture = {"emoji:caption": 1.0}
    config.eval.kinds = ("caption",)
    common.freeze(config, BELOW_NORM)
    # Section 3.4 of the paper: 250k steps of 1680 pairs with ViT-g, AdamW (0.9, 0.98), weight decay
    # 0.05, a peak of 1e-4 after 2000 steps. It says no end of the cosine for this stage: 1e-5 is
    # that of pretrain_stage1.yaml (which warms up for 5000 steps from 1e-6).
    config.data.rows = 1680
    config.train.update(steps=250_000, lr=1e-4, end_lr=0.1, warmup_steps=2000)
    config.train.update(weight_decay=0.05, b2=0.98, clip=0.0)  # `lavis`
    # Of comparing and of the tokens (blip2_qformer.py, Qformer.py).
    config.train.update(pairs="softmax", label_smoothing=0.1)
    return config
