"""Idefics3 8B (Laurençon et al. 2024, arXiv 2408.12637): SigLIP-SO400M at 364 px, pixel shuffle and
one linear layer, Llama 3.1 8B.

A picture is enlarged to 1456 px, cut into up to 16 tiles, and seen as a whole. All of it trains.
No readable source has its figures: batch, rate, schedule and steps are those of SmolVLM's second
stage, by the same trainer, and so ours; of the paper's stages this is one, and its data (OBELICS,
LAION-COCO, Docmatix, The Cauldron; unverified) has no shares here.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit
from vlm_jax.presets.resizing import Resize

WORDS = (("8b",),)


@local.variant
def get_config(variant: str = ""):
    """Training on large pictures.

    Raises:
      ValueError: the variant is not known.
    """
    (size,) = common.words("idefics3", variant, *WORDS)
    config = common.system(
        f"idefics3-{size}",
        c.Model(
            vit("So400m/14", image_size=364, resize=tiles(364)),
            Connector("linear", pool="shuffle", factor=2, bias=False),
            decoder("llama3.1-8b", vocab=128_259),
        ),
        tokens=4096,
        rows=2048,
        template="idefics3",
        images_per_row=17,
    )
    # smollm's vision/experiments/pretraining/vloom/tr_350_smolvlm_2B_2nd_stage/config.yaml
    config.train.update(steps=6000, lr=1e-4, warmup_steps=100, weight_decay=0.1)
    config.train.schedule = "linear"
    return config


def tiles(side: int) -> Resize:
    """Up to 4 x 4 tiles of so many pixels, and the whole picture."""
    return Resize("grid", side=side, filter="lanczos", longest=4 * side)
