"""LLaVA-NeXT (Liu et al. 2024): LLaVA-1.5 whose encoder trains too, at a tenth of the rate.

Variants: `vicuna-7b`, `vicuna-13b` or `mistral-7b`; with `align` the first stage, LLaVA-1.5's, with
`stages` both. A picture is its whole and up to four tiles of 336 px, their visual tokens put
together line by line. The authors' data: LCS-558K, then 760K samples that were not published
(LLaVA-1.5's, GPT-4V's answers and tasks on documents and charts; all of it unverified).
"""

from configs import common, llava15, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.resizing import Resize

# image_grid_pinpoints
TILES = Resize(
    "pinpoints", pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
)
DECODERS = {
    "vicuna-7b": decoder("llama2-7b", vocab=32_064),
    "vicuna-13b": decoder("llama2-13b", vocab=32_064),
    # Mistral-7B-Instruct-v0.2 has no window.
    "mistral-7b": decoder(
        "mistral-7b", vocab=32_064, window=0, pattern=("global",), rope_theta=1e6
    ),
}
# conversation.py
TEMPLATES = {
    "vicuna-7b": "vicuna_v1",
    "vicuna-13b": "vicuna_v1",
    "mistral-7b": "llava_mistral",
}
WORDS = (tuple(DECODERS), ("", "align", "stages"))


@local.variant
def get_config(variant: str = ""):
    """The second stage, or the first, or both.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("llava_next", variant, *WORDS)
    if stage == "stages":
        return common.walk(get_config, f"llava_next-{size}", align=f"{size}-align", tune=size)
    config = llava15.get_config()
    config.name = f"llava_next-{size}"
    common.put(
        config,
        encoder=published("clip-l14-336", layer=-2, resize=TILES),
        connector=Connector("mlp", layers=2, newline="token"),
        decoder=DECODERS[size],
    )
    config.data.template = TEMPLATES[size]
    config.data.update(tokens=4096, images_per_row=5)
    common.freeze(config, rules=(c.Rule(common.ENCODERS, lr=0.1), *c.FULL))
    # Batch, samples and 2e-5 with 2e-6 for the encoder (`mm_vision_tower_lr`) are unverified: the
    # LLaVA-NeXT repository has scripts of later models (1e-5 or 2e-5, 1e-6 or 2e-6).
    common.epochs(config, rows=128, samples=760_000, lr=2e-5)
    return align(config) if stage else config


def align(config):
    """The first stage: LLaVA-1.5's, one view a picture."""
    llava15.align(config)
    config.data.update(tokens=2048, images_per_row=1)
    return config
