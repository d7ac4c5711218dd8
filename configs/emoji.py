"""All kinds of examples of the embedded pictures, sized for an hour on two CPU cores.

python -m vlm_jax.main --config=configs/emoji.py --workdir=runs/emoji
"""

from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import Encoder

# Kinds of examples and their weights. Questions cost no more than captions: an image is most of an
# example's cost, and every image with a name teaches names through the auxiliary losses.
MIXTURE = {
    "emoji:caption": 8.0,
    "emoji:group": 0.5,
    "emoji:yes_no": 4.0,
    "emoji:choice": 3.0,
    "emoji:scene": 0.5,
    "emoji:reading": 0.5,
    "emoji:compare": 0.5,
}

# float32: matrix products in bfloat16 are no faster on CPUs without AMX.
FLOAT32 = {"dtype": "float32", "remat": False}

ENCODER = Encoder(
    width=256,
    depth=1,
    mlp=512,
    heads=4,
    patch=16,
    image_size=64,
    # Strided convolutions are several times slower than these on XLA's CPU backend.
    stem="conv",
    stem_stages=((4, 32, 1), (2, 96, 2), (2, 256, 2)),
    **FLOAT32,
)
CONNECTOR = Connector(
    kind="perceiver", queries=6, layers=1, width=128, hidden=384, heads=2, kv_heads=2, **FLOAT32
)
# Two layers of two heads never learned to compare a name with a picture: yes/no stayed at chance.
DECODER = decoder(
    "1m", vocab=3072, width=128, depth=4, mlp=384, heads=4, kv_heads=4, head_dim=32, **FLOAT32
)

# Two of the three styles are flat drawings and the third is shaded: geometry, colour and light must
# not matter. The background stays white, as in evaluation.
AUGMENT = c.Augment(
    scale=(0.75, 1.1),
    aspect=0.12,
    rotate=12.0,
    shear=5.0,
    translate=0.07,
    perspective=0.06,
    brightness=0.08,
    contrast=0.25,
    saturation=0.35,
    hue=0.03,
    gain=0.15,
    grey=0.05,
    blur=0.8,
    shade=0.25,
    erase=0.2,
)


def get_config(variant: str = ""):
    """The config; it has no variants.

    Raises:
      ValueError: a variant is asked for.
    """
    if variant:
        raise ValueError(f"configs/emoji.py has no variant {variant!r}")
    kinds = tuple(name.partition(":")[2] for name in MIXTURE)
    return c.default(
        name="emoji",
        model=c.Model(ENCODER, CONNECTOR, DECODER),
        data=c.Data(
            mixture=MIXTURE, rows=64, tokens=80, images_per_row=4, views=2, augment=AUGMENT
        ),
        train=c.Train(
            steps=1100,
            optimizer="muon",
            lr=6e-3,
            adam_lr=3e-3,
            warmup_steps=60,
            weight_decay=0.05,
            b2=0.98,
            label_smoothing=0.05,
            bag_of_words=0.5,
            # The same thing drawn by two artists must look the same: what transfers to a third.
            contrastive=1.5,
            ema=0.998,
        ),
        checkpoint=c.Checkpoint(every=200),
        eval=c.Eval(every=300, kinds=kinds, text_only_steps=400, text_only_every=50),
    )
