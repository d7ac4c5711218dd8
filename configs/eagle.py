"""Eagle-X5 (Shi et al. 2024, arXiv 2408.15998): five encoders brought to 32 x 32 and joined along
channels, a two-layer MLP, Vicuna-1.5.

Variants: `7b` or `13b`; with `align` the first stage. Where it differs from the published system:
SAM's features are resized, not gathered in squares; EVA-02 has no windows. Batches are LLaVA-1.5's.
"""

from configs import common, llava15, local
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.convnets import convnext
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.sam import sam

PAD = llava15.PAD
WORDS = (("7b", "13b"), ("", "align"))


@local.variant
def get_config(variant: str = ""):
    """The second stage, in which encoders train too, or the first.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("eagle", variant, *WORDS)
    config = llava15.get_config(size)
    config.name = f"eagle-{size}"
    common.put(
        config,
        encoder=published(
            "clip-l14-336", image_size=448, position_grid=(24, 24), layer=-2, resize=PAD
        ),
        extra_encoders=(
            convnext("xxlarge", image_size=1024, resize=PAD),
            sam("L", resize=PAD),
            published("eva02-clip-l14", patch=16, image_size=1024, class_token=False, resize=PAD),
            published("pix2struct-large", image_size=1024, max_patches=0, resize=PAD),
        ),
        connector=Connector("mlp", layers=2, resize=(32, 32)),
    )
    common.freeze(config)
    common.epochs(config, rows=128, samples=1_800_000, lr=2e-5)
    return llava15.align(config) if stage else config
