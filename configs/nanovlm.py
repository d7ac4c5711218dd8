"""nanoVLM (Hugging Face 2025): a SigLIP, pixel shuffle and one linear layer, a small SmolLM2; the
connector learns faster than the rest.

Variants: `222m`, version 0.1 with pictures of 224 px; or `460m`, whose pictures are enlarged to
2048 px and cut into up to 16 tiles beside the whole, and packed. Pixels are not normalised.

The authors' data (models/config.py): 45 sets of The Cauldron; FineVision, shuffled.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax import schema
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.encoders import vit
from vlm_jax.presets.resizing import Resize

# data/processors.py: ToTensor alone
PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
WORDS = (("222m", "460m"),)


@local.variant
def get_config(variant: str = ""):
    """The one stage.

    Raises:
      ValueError: the variant is not known.
    """
    (size,) = common.words("nanovlm", variant, *WORDS)
    config = common.system(
        f"nanovlm-{size}",
        c.Model(
            published("siglip-b16", resize=Resize(filter="bilinear"), **PIXELS),
            Connector("linear", pool="shuffle", factor=2, bias=False),
            decoder("smollm2-135m"),
        ),
        tokens=128,  # 49 of them visual (lm_max_length)
        template="nanovlm_v0",
    )
    _slower_towers(config, 1e-4 / 2e-3)
    # TrainConfig at v0.1: batches of 256, five epochs, 2e-3 and 1e-4; train.py: a warm-up of 3 %, a
    # cosine to a tenth, no clipping, and AdamW's own decay of 0.01, of biases and norms too.
    # README: 1.7M samples.
    common.epochs(config, rows=256, samples=1_700_000, times=5, lr=2e-3, weight_decay=0.01)
    config.train.update(end_lr=0.1, clip=0.0)
    return tiled(config) if size == "460m" else config


def tiled(config):
    """What changed after version 0.1 (TrainConfig of October 2025).

    Rows of 4096 tokens and at most 18 tiles, 2 a GPU, accumulated 8 times; that there are eight
    GPUs is ours. 5.12e-3 for the connector, 5e-5 for the rest, 40,000 steps, clipping at 1.
    """
    common.put(
        config,
        encoder=vit(
            "B/16",
            image_size=512,
            resize=Resize("whole_and_grid", longest=2048),
            **PIXELS,
        ),
        connector=Connector("linear", pool="shuffle", factor=4, bias=False),
        decoder=decoder("smollm2-360m", vocab=49_218),
    )
    config.data.update(rows=128, tokens=4096, images_per_row=18, template="nanovlm")
    _slower_towers(config, 5e-5 / 5.12e-3)
    config.train.update(steps=40_000, lr=5.12e-3, warmup_steps=1200, clip=1.0)
    return config


def _slower_towers(config, lr: float) -> None:
    rules = (c.Rule(r"(encoder|decoder)/.*", lr=lr), c.Rule(r".*"))
    config.adaptation = schema.plain(rules)
