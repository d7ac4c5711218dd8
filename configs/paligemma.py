"""PaliGemma 3B (Beyer et al. 2024, arXiv 2407.07726): SigLIP-SO400M, one linear layer, Gemma 2B;
image and prompt see each other both ways.

Variants: `224`, `448` or `896` pixels. This is the third stage, big_vision's fine-tuning
(configs/proj/paligemma/transfers/forkme.py); the samples and epochs are its example's. Batches and
rates of the two stages before it (1G examples at 224 px with 128 tokens of text; 50M at 448 and 10M
at 896 px with 512; README and accounts of the paper) stand in no readable source, so they have no
variant; nor do the 40 tasks of transfers/, whose batches, rates and decays were searched for each.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit

WORDS = (("224", "448", "896"),)


@local.variant
def get_config(variant: str = ""):
    """Fine-tuning.

    Raises:
      ValueError: the variant is not known.
    """
    (pixels,) = common.words("paligemma", variant, *WORDS)
    encoder = vit("So400m/14", image_size=int(pixels))
    config = common.system(
        f"paligemma-{pixels}",
        # Behind Gemma's 256,000 tokens: 1024 for places, 128 for segments, <image>, and padding.
        c.Model(encoder, Connector("linear"), decoder("gemma-2b", vocab=257_216)),
        tokens=encoder.patches + 128,  # text_len
        attention="prefix",
        template="paligemma",
    )
    # forkme.py: batches of 32, 1e-5 for all of it, a warm-up of 5 %, a cosine to 0, clipping at 1.
    # Its decay of 3e-7 is not multiplied by the learning rate; ours is. optax.py decays what is
    # called kernel, as nothing in Gemma is.
    common.epochs(config, rows=32, samples=90, times=15, warmup=0.05, lr=1e-5, weight_decay=0.03)
    rules = c.Rule(r"(encoder|connector)/.*kernel"), c.Rule(r".*", weight_decay=0.0)
    common.freeze(config, rules=rules)
    return config
