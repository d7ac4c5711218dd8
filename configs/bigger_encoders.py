"""The grid of "Are Bigger Encoders Always Better" (arXiv 2408.00620): LLaVA-1.5's first stage with
CLIP encoders of 86M, 304M, 632M and 1.01B parameters before frozen Vicuna.

Variants: `b`, `l`, `h` or `g`, and `7b` or `13b`, as in `g-13b`. OpenCLIP's towers at 224 px have
those sizes; no readable text of the paper names them, nor rate, batch or epochs: those are
LLaVA-1.5's first stage's here, all of them ours. The authors' data: 1M to 10M pairs of CC12M, or of
LAION-400M; the decoder is frozen (accounts of the paper, unverified).
"""

from configs import common, llava15, local
from vlm_jax.presets.encoder_sizes import published

ENCODERS = {"b": "openclip-b16", "l": "openclip-l14", "h": "openclip-h14", "g": "openclip-g14"}
WORDS = (tuple(ENCODERS), ("7b", "13b"))
SAMPLES = 1_000_000  # to ten times as many, in steps of as many


@local.variant
def get_config(variant: str = ""):
    """A cell of the grid.

    Raises:
      ValueError: the variant is not known.
    """
    encoder, size = common.words("bigger_encoders", variant, *WORDS)
    config = llava15.get_config(f"{size}-align")
    config.name = f"bigger_encoders-{encoder}-{size}"
    common.put(config, encoder=published(ENCODERS[encoder], layer=-2))
    common.epochs(config, rows=256, samples=SAMPLES)
    return config
