"""LLaVA 1.0 (Liu et al. 2023, arXiv 2304.08485): 224 px, one linear layer, the first Vicuna.

Variants: `7b` or `13b`; with `align` the first stage.
"""

from configs import common, llava15, local
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

WORDS = (("7b", "13b"), ("", "align"))


@local.variant
def get_config(variant: str = ""):
    """The second stage, or the first.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("llava", variant, *WORDS)
    config = llava15.get_config(size)
    config.name = f"llava-{size}"
    common.put(
        config,
        encoder=published("clip-l14", layer=-2),
        connector=Connector("linear"),
        decoder=decoder(f"llama1-{size}"),
    )
    # scripts/pretrain.sh and finetune.sh at v1.0: CC3M-595K, then LLaVA-Instruct-158K three times.
    common.epochs(config, rows=32, samples=158_000, times=3, lr=2e-5)
    return llava15.align(config, rows=128, samples=595_000, lr=2e-3) if stage else config
