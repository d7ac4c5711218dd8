"""MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592): all of BLIP-2 frozen, one linear layer trains.

Variants: `7b` or `13b`, the first stage; with `tune` the second, on 3,500 long captions; with
`stages` both. The authors' data: LAION and CC with SBU at 115 to 14, then cc_sbu_align.
"""

from configs import blip2, common, local
from vlm_jax.presets.decoders import decoder

WORDS = (("7b", "13b"), ("", "tune", "stages"))


@local.variant
def get_config(variant: str = ""):
    """The first stage, or the second, or both.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("minigpt4", variant, *WORDS)
    if stage == "stages":
        return common.walk(get_config, f"minigpt4-{size}", align=size, tune=f"{size}-tune")
    config = blip2.get_config()
    config.name = f"minigpt4-{size}"
    common.put(config, decoder=decoder(f"llama1-{size}"))
    common.freeze(config, common.ENCODERS, r"connector/(?!project/).*", common.DECODER)
    # train_configs/minigpt4_stage1_pretrain.yaml: 64 a GPU on the four of MiniGPT4_Train.md; four
    # times 5000 steps from 1e-4 to 8e-5, a decay of 0.05, 0.999 (runner_base.py), no clipping. The
    # warm-up starts at 1e-6, and the cosine is counted from the first step on. Pictures are
    # squashed (blip_processors.py).
    # Beginning of sequence, picture, caption, end of line (minigpt_base.py).
    config.data.update(rows=256, template="plain")
    config.data.augment.update(crop=(1.0, 1.0), flip=0.0)
    config.train.update(steps=20_000, lr=1e-4, end_lr=0.8, warmup_steps=5000, b2=0.999)
    return tune(config) if stage else config


def tune(config):
    """The second stage (minigpt4_stage2_finetune.yaml): answers of at most 160 tokens.

    Five times 200 steps of 12 on one GPU, from 3e-5 to 1e-5, a warm-up of 200 from 1e-6.
    """
    config.name += "-tune"
    config.data.update(rows=12, tokens=512, template="minigpt4")
    config.train.update(steps=1000, lr=3e-5, end_lr=1 / 3, warmup_steps=200)
    return config
