"""PaliGemma 2 (Steiner et al. 2024, arXiv 2412.03555): PaliGemma with Gemma 2.

Variants: `3b` or `10b`, and `224`, `448` or `896` pixels, as in `10b-448`. Figures are PaliGemma's:
the paper searched rates for each task and size, and no readable source has them.
"""

from configs import common, local, paligemma
from vlm_jax.presets.decoders import decoder

DECODERS = {"3b": "gemma2-2b", "10b": "gemma2-9b"}
WORDS = (tuple(DECODERS), *paligemma.WORDS)


@local.variant
def get_config(variant: str = ""):
    """Fine-tuning.

    Raises:
      ValueError: the variant is not known.
    """
    size, pixels = common.words("paligemma2", variant, *WORDS)
    config = paligemma.get_config(pixels)
    config.name = f"paligemma2-{size}-{pixels}"
    common.put(config, decoder=decoder(DECODERS[size], vocab=config.model.decoder.vocab))
    return config
