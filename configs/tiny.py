"""The demo: a small model that learns to name and question real pictures in minutes on a CPU.

python -m vlm_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import llama
from vlm_jax.presets.encoders import Encoder

# float32: matrix products in bfloat16 are no faster on CPUs without AMX.
ENCODER = Encoder(
    width=192,
    depth=4,
    mlp=768,
    heads=4,
    patch=16,
    image_size=64,
    stem="conv",
    stem_stages=((4, 64, 1), (2, 128, 2)),
    drop_path=0.1,
    dtype="float32",
    remat=False,
)
CONNECTOR = Connector(
    kind="perceiver",
    queries=4,
    layers=1,
    width=192,
    hidden=384,
    heads=4,
    kv_heads=4,
    dtype="float32",
)
DECODER = llama(
    "1m",
    vocab=3072,
    width=192,
    mlp=512,
    heads=4,
    head_dim=48,
    dropout=0.1,
    dtype="float32",
    remat=False,
)


def get_config(variant: str = ""):
    """The demo's config; it has no variants."""
    if variant:
        raise ValueError(f"configs/tiny.py has no variant {variant!r}")
    config = c.default(
        name="tiny",
        model=c.Model(ENCODER, CONNECTOR, DECODER),
        data=c.Data(
            mixture={
                "emoji:caption": 6.0,
                "emoji:group": 0.5,
                "emoji:yes_no": 1.0,
                "emoji:choice": 1.0,
                "emoji:scene": 0.5,
                "emoji:reading": 0.5,
                "emoji:compare": 0.5,
            },
            rows=8,
            tokens=128,
            images_per_row=8,
            augment=c.Augment(
                background="random",
                scale=(0.7, 1.1),
                rotate=15.0,
                shear=10.0,
                translate=0.08,
                brightness=0.2,
                contrast=0.2,
                saturation=0.3,
                hue=0.05,
            ),
        ),
        train=c.Train(
            steps=1200,
            lr=2e-3,
            warmup_steps=100,
            weight_decay=0.05,
            bag_of_words=0.5,
            label_smoothing=0.1,
            ema=0.995,
        ),
        checkpoint=c.Checkpoint(every=300),
        eval=c.Eval(every=200, kinds=KINDS, text_only_steps=300, examples=64),
    )
    return config


KINDS = ("caption", "group", "yes_no", "choice", "scene", "reading", "compare")
