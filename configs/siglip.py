"""Encoders of our own: SigLIP's pre-training (Zhai et al. 2023) on the embedded pictures and names.

Variants: `ti`, `s`, `m` or `l`, four sizes of encoder over one text tower.

python -m vlm_jax.main --config=configs/siglip.py:s --workdir=runs/siglip-s

A picture is answered with the nearest of the names there are. Another config starts from the
encoder of a run with `init=(c.Init("runs/siglip-s", "encoder"),)`, its `pool` left out.
"""

from configs import emoji
from vlm_jax import config as c
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.text import TextTower

FLOAT32 = {"dtype": "float32", "remat": False}
OUT = 128

# Width, blocks and the convolutional stages before them.
SIZES = {
    "ti": (64, 1, ((4, 24, 1), (2, 48, 1))),
    "s": (128, 2, ((4, 32, 1), (2, 96, 1))),
    "m": (192, 2, ((4, 32, 1), (2, 96, 2))),
    "l": (256, 2, ((4, 32, 1), (2, 96, 2), (2, 256, 2))),
}
TEXT = TextTower(
    vocab=3072,
    length=16,
    width=128,
    depth=2,
    mlp=384,
    heads=4,
    out=OUT,
    out_bias=True,
    project_images=True,
    logit_bias=True,
    **FLOAT32,
)


def get_config(variant: str = ""):
    """The recipe for one size, by default `s`.

    Raises:
      ValueError: there is no such variant.
    """
    variant = variant or "s"
    if variant not in SIZES:
        raise ValueError(f"configs/siglip.py has no variant {variant!r}; it has {', '.join(SIZES)}")
    width, depth, stages = SIZES[variant]
    encoder = Encoder(
        width=width,
        depth=depth,
        mlp=3 * width,
        heads=width // 32,
        patch=16,
        image_size=64,
        stem="conv",
        stem_stages=stages,
        pool="map",
        **FLOAT32,
    )
    return c.default(
        name=f"siglip-{variant}",
        model=c.Model(encoder=encoder, text=TEXT),
        data=c.Data(
            mixture={"emoji:caption": 1.0},
            template="siglip",
            rows=256,
            tokens=TEXT.length,
            images_per_row=1,
            augment=emoji.AUGMENT,
        ),
        # The papers' rates are for batches of thousands and models a thousand times as large.
        train=c.Train(
            steps=1000,
            lr=2e-3,
            warmup_steps=50,
            weight_decay=0.05,
            b2=0.95,
            ema=0.99,
        ),
        checkpoint=c.Checkpoint(every=250),
        eval=c.Eval(every=250, kinds=("caption",)),
    )
