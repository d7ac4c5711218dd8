"""Eagle-X5 (Shi et al. 2024, arXiv 2408.15998): five encoders brought to 32 x 32 and joined along
channels, a two-layer MLP, Vicuna-1.5.

Variants: `7b` or `13b`; with `align` the first stage, with `stages` both. Where it differs from the
published system: SAM's features are resized, not gathered in squares; EVA-02 has no windows.

The authors' data (README): LLaVA-1.5's LCS-558K; then Eagle-1.8M: LLaVA-1.5's 665K, Open-Hermes
300K (text alone), LVIS-Instruct4V 220K, LRV-Instruct 150K, Geo170K 120K, ShareGPT-4V 100K, Visual7W
70K, synDog 50K, DocVQA 39K, ChartQA 28K, DVQA 25K, LLaVAR 20K, AI2D 15K, LAION-GPT4V 11K.
"""

from configs import common, llava15, local
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.convnets import convnext
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.resizing import Resize
from vlm_jax.presets.sam import sam

WORDS = (("7b", "13b"), ("", "align", "stages"))


@local.variant
def get_config(variant: str = ""):
    """The second stage, in which encoders train too, or the first, or both.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("eagle", variant, *WORDS)
    if stage == "stages":
        return common.walk(get_config, f"eagle-{size}", align=f"{size}-align", tune=size)
    config = llava15.get_config(size)
    config.name = f"eagle-{size}"
    put_encoders(config, llava15.PAD)
    common.put(config, connector=Connector("mlp", layers=2, resize=(32, 32)))
    common.freeze(config)
    # README, scripts/finetune-eagle-x5-vicuna-7b-1.8m.sh: batches of 128 (4 on each of 32), one
    # epoch, 2e-5 for all parameters, no decay, a warm-up of 3 %, a cosine, 2048 tokens, pictures
    # padded.
    common.epochs(config, rows=128, samples=1_800_000, lr=2e-5)
    return align(config) if stage else config


def align(config):
    """The first stage: LLaVA-1.5's figures (README), pictures cropped.

    scripts/pretrain-eagle-x5-vicuna-7b.sh has no `image_aspect_ratio`.
    """
    put_encoders(config, llava15.CROP)
    return llava15.align(config)


def put_encoders(config, resize: Resize) -> None:
    """The five, all of which see one picture (multi_backbone_channel_concatenation_encoder.py)."""
    shown = {"image_size": 1024, "resize": resize}
    common.put(
        config,
        encoder=published(
            "clip-l14-336", image_size=448, position_grid=(24, 24), layer=-2, resize=resize
        ),
        extra_encoders=(
            convnext("xxlarge", **shown),
            sam("L", resize=resize),
            published("eva02-clip-l14", patch=16, class_token=False, **shown),
            published("pix2struct-large", max_patches=0, **shown),
        ),
    )
