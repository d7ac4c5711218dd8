"""MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592): all of BLIP-2 frozen, one linear layer trains.

Variants: `7b` or `13b`, the first stage; with `tune` the second, on 3,500 long captions.
"""

from configs import blip2, common, local
from vlm_jax.presets.decoders import decoder

WORDS = (("7b", "13b"), ("", "tune"))


@local.variant
def get_config(variant: str = ""):
    """The first stage, or the second.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("minigpt4", variant, *WORDS)
    config = blip2.get_config()
    config.name = f"minigpt4-{size}"
    common.put(config, decoder=decoder(f"llama1-{size}"))
    common.freeze(config, common.ENCODERS, r"connector/(?!project/).*", common.DECODER)
    # train_configs/minigpt4_stage1_pretrain.yaml, on the paper's four devices
    config.data.rows = 256
    config.train.update(steps=20_000, lr=1e-4, end_lr=0.8, warmup_steps=5000, b2=0.999)
    return tune(config) if stage else config


def tune(config):
    """The second stage (minigpt4_stage2_finetune.yaml): answers of at most 160 tokens."""
    config.name += "-tune"
    config.data.update(rows=12, tokens=512, template="vicuna_v1")
    config.train.update(steps=1000, lr=3e-5, end_lr=1 / 3, warmup_steps=200)
    return config
