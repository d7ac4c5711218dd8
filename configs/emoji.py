"""The best model that an hour on two CPU cores trains on the embedded pictures.

    python -m vlm_jax.main --config=configs/emoji.py --workdir=runs/emoji
"""

from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import llama
from vlm_jax.presets.encoders import Encoder

# Kinds of examples and their weights; names are most of what there is to learn.
MIXTURE = {
    "emoji:caption": 8.0,
    "emoji:group": 1.0,
    "emoji:yes_no": 2.0,
    "emoji:choice": 2.0,
    "emoji:scene": 1.0,
    "emoji:reading": 1.0,
    "emoji:compare": 1.0,
}

# float32: matrix products in bfloat16 are no faster on CPUs without AMX.
ENCODER = Encoder(
    width=192,
    depth=3,
    mlp=576,
    heads=4,
    patch=16,
    image_size=64,
    # Strided convolutions are several times slower than these on XLA's CPU backend.
    stem="conv",
    stem_stages=((4, 64, 1), (2, 128, 2)),
    drop_path=0.1,
    dtype="float32",
    remat=False,
)
CONNECTOR = Connector(
    kind="perceiver", queries=8, layers=1, width=192, hidden=384, heads=4, kv_heads=4, dtype="float32"
)
DECODER = llama(
    "1m", vocab=3072, width=192, depth=3, mlp=512, heads=4, head_dim=48, dtype="float32", remat=False
)

# Two of three styles are flat drawings and the third is shaded: geometry, colour and light must not
# matter.
AUGMENT = c.Augment(
    background="random",
    scale=(0.65, 1.15),
    aspect=0.2,
    rotate=20.0,
    shear=10.0,
    translate=0.1,
    brightness=0.12,
    contrast=0.35,
    saturation=0.5,
    hue=0.04,
    gain=0.2,
    grey=0.05,
    blur=1.0,
    shade=0.35,
    noise=0.05,
    erase=0.3,
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
        data=c.Data(mixture=MIXTURE, rows=16, tokens=208, images_per_row=10, augment=AUGMENT),
        train=c.Train(
            steps=5000,
            lr=2e-3,
            warmup_steps=200,
            weight_decay=0.05,
            b2=0.98,
            label_smoothing=0.1,
            bag_of_words=0.5,
            ema=0.998,
        ),
        checkpoint=c.Checkpoint(every=500),
        eval=c.Eval(every=500, kinds=kinds, text_only_steps=800, text_only_every=100),
    )
