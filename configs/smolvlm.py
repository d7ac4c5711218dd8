"""SmolVLM (Marafioti et al. 2025, arXiv 2504.05299): Idefics3 with SmolLM2.

Variants: `256m`, `500m` or `2.2b`.
"""

from configs import common, idefics3, local
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit

# Encoder, factor of the pixel shuffle, decoder, rows of its vocabulary.
SMALL = vit("B/16", image_size=512, resize=idefics3.tiles(512))
LARGE = vit("So400m/14", image_size=378, resize=idefics3.tiles(384))
SIZES = {
    "256m": (SMALL, 4, "smollm2-135m", 49_280),
    "500m": (SMALL, 4, "smollm2-360m", 49_280),
    "2.2b": (LARGE, 3, "smollm2-1.7b", 49_155),
}
WORDS = (tuple(SIZES),)


@local.variant
def get_config(variant: str = ""):
    """Training on large pictures.

    Raises:
      ValueError: the variant is not known.
    """
    (size,) = common.words("smolvlm", variant, *WORDS)
    encoder, factor, name, vocab = SIZES[size]
    config = idefics3.get_config()
    config.name = f"smolvlm-{size}"
    common.put(
        config,
        encoder=encoder,
        connector=Connector("linear", pool="shuffle", factor=factor, bias=False),
        # Unlike SmolLM2's own, the published output matrices are not the embedding tables.
        decoder=decoder(name, vocab=vocab, tied=False),
    )
    return config
