"""The demo: a small model that learns to name and question real pictures in minutes on a CPU.

python -m vlm_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import Encoder

# Kinds of examples and their weights; names are most of what there is to learn.
MIXTURE = {"emoji:caption": 12.0, "emoji:group": 1.0, "emoji:yes_no": 1.0, "emoji:choice": 2.0}

# float32: matrix products in bfloat16 are no faster on CPUs without AMX.
FLOAT32 = {"dtype": "float32", "remat": False}

ENCODER = Encoder(
    width=128,
    depth=2,
    mlp=384,
    heads=2,
    patch=16,
    image_size=64,
    # Strided convolutions are several times slower than these on XLA's CPU backend.
    stem="conv",
    stem_stages=((4, 32, 1), (2, 96, 1)),
    **FLOAT32,
)
CONNECTOR = Connector(
    kind="perceiver", queries=8, layers=1, width=128, hidden=256, heads=2, kv_heads=2, **FLOAT32
)
DECODER = decoder(
    "1m", vocab=3072, width=128, depth=2, mlp=256, heads=2, kv_heads=2, head_dim=64, **FLOAT32
)

AUGMENT = c.Augment(
    scale=(0.8, 1.1),
    aspect=0.1,
    rotate=10.0,
    translate=0.05,
    brightness=0.06,
    contrast=0.2,
    saturation=0.25,
    hue=0.02,
    gain=0.1,
    shade=0.2,
)


def get_config(variant: str = ""):
    """The demo's config; it has no variants.

    Raises:
      ValueError: a variant is asked for.
    """
    if variant:
        raise ValueError(f"configs/tiny.py has no variant {variant!r}")
    kinds = tuple(name.partition(":")[2] for name in MIXTURE)
    return c.default(
        name="tiny",
        model=c.Model(ENCODER, CONNECTOR, DECODER),
        data=c.Data(mixture=MIXTURE, rows=16, tokens=88, images_per_row=5, augment=AUGMENT),
        train=c.Train(
            steps=900,
            optimizer="muon",
            lr=2e-3,
            adam_lr=3e-3,
            warmup_steps=50,
            weight_decay=0.05,
            b2=0.98,
            bag_of_words=0.5,
            ema=0.99,
        ),
        checkpoint=c.Checkpoint(every=225),
        eval=c.Eval(every=225, kinds=kinds, examples=64, text_only_steps=200),
    )
