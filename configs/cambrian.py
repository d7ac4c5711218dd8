"""Cambrian-1 (Tong et al. 2024, arXiv 2406.16860): four frozen encoders, the Spatial Vision
Aggregator, 24 x 25 visual tokens, samplers in the decoder.

Variants: `8b` (Llama 3 8B Instruct) or `13b` (Vicuna-1.5); with `align` the first stage, with
`stages` both. The 34B (Yi) is left out. Images of 384 px are 378 here: their last six pixels have
no patch.

The authors' data: 2.5M samples of alignment, then Cambrian-7M: language 21.00 %, general 34.52, OCR
27.22, counting 8.71, math 7.20, code 0.87, science 0.88, at most 350,000 of a source (README).
"""

from configs import common, llava15, local
from vlm_jax import config as c
from vlm_jax.presets.convnets import convnext
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.resizing import Resize
from vlm_jax.presets.sva import CAMBRIAN, CAMBRIAN_SAMPLERS

DECODERS = {"8b": "llama3-8b", "13b": "llama2-13b"}
PAD_384 = Resize("pad", side=384)
# --version llama_v3 and v1
TEMPLATES = {"8b": "cambrian", "13b": "vicuna_v1"}
WORDS = (tuple(DECODERS), ("", "align", "stages"))


@local.variant
def get_config(variant: str = ""):
    """The second stage, or the first, or both.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("cambrian", variant, *WORDS)
    if stage == "stages":
        return common.walk(get_config, f"cambrian-{size}", align=f"{size}-align", tune=size)
    config = llava15.get_config()
    config.name = f"cambrian-{size}"
    config.data.template = TEMPLATES[size]
    common.put(
        config,
        encoder=published("siglip-so400m14-378", resize=PAD_384),
        extra_encoders=(
            published("clip-l14-336", layer=-2, resize=llava15.PAD),
            published("dinov2-g14", image_size=378, resize=PAD_384),
            convnext(
                "xxlarge", image_size=1024, taps=(0, 1, 2, 3), resize_to=96, resize=llava15.PAD
            ),
        ),
        connector=CAMBRIAN,
        decoder=decoder(DECODERS[size]),
        samplers=CAMBRIAN_SAMPLERS[size],
    )
    # scripts/cambrian/finetune_cambrian_8b.sh, README for the batch: one epoch, 4e-5, no decay, a
    # warm-up of 3 %, a cosine, 2048 tokens.
    common.epochs(config, rows=512, samples=7_000_000, lr=4e-5)
    return align(config) if stage else config


def align(config):
    """The first stage; the aggregator's attention learns at a tenth of the projections' rate.

    scripts/cambrian/pretrain_cambrian_8b.sh: batches of 512, 1e-3, a warm-up of 6 %, pictures
    padded; 1e-4 (mm_vision_sampler_lr) holds for vision_sampler and vision_query
    (cambrian_trainer.py).
    """
    template = config.data.template
    llava15.align(config, rows=512, samples=2_500_000)
    config.data.template = template  # --version is that of the second stage
    common.epochs(config, rows=512, samples=2_500_000, warmup=0.06)
    attention = c.Rule(r"(samplers|connector/(query|sampler))(/.*)?", lr=0.1)
    common.freeze(config, common.ENCODERS, common.DECODER, rules=(attention, *c.FULL))
    return config
