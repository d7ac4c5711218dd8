"""LLaVA 1.0 (Liu et al. 2023, arXiv 2304.08485): 224 px, one linear layer, the first Vicuna.

Variants: `7b` or `13b`; with `align` the first stage, with `stages` both. The authors' data:
CC3M-595K (filtered pairs), then LLaVA-Instruct-158K. Their fine-tuning on ScienceQA (12 epochs,
unverified) has no variant, nor have their image start and end tokens (`--mm_use_im_start_end` of
the first scripts).
"""

from configs import common, llava15, local
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

WORDS = (("7b", "13b"), ("", "align", "stages"))


@local.variant
def get_config(variant: str = ""):
    """The second stage, or the first, or both.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("llava", variant, *WORDS)
    if stage == "stages":
        return common.walk(get_config, f"llava-{size}", align=f"{size}-align", tune=size)
    config = llava15.get_config(size)
    config.name = f"llava-{size}"
    config.data.template = "llava_v0"
    common.put(
        config,
        encoder=published("clip-l14", layer=-2),
        connector=Connector("linear"),
        decoder=decoder(f"llama1-{size}"),
    )
    # README and scripts/finetune.sh at v1.0.1: batch 32, 2e-5, three epochs, no decay, a warm-up of
    # 3 %, a cosine, 2048 tokens; pictures are cropped in both stages (`image_aspect_ratio` square).
    common.epochs(config, rows=32, samples=158_000, times=3, lr=2e-5)
    # README and scripts/pretrain.sh: batch 128, 2e-3, one epoch.
    return llava15.align(config, rows=128, samples=595_000, lr=2e-3) if stage else config
