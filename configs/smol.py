"""Published weights on both sides of a connector: EfficientNet-Lite0, SmolLM2-135M-Instruct.

make smol     # fetches the weights, imports them into models/, trains this config

Both towers are frozen: what is trained is an MLP of 3.5M parameters, on captions of the embedded
pictures: 300 steps of 3 seconds on two cores. The variant `random_encoder` leaves the encoder as
it is drawn and changes nothing else.
"""

from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.convnets import efficientnet
from vlm_jax.presets.decoders import decoder

ENCODER_FOLDER = "models/efficientnet-lite0"
DECODER_FOLDER = "models/smollm2-135m-instruct"

# float32: matrix products in bfloat16 are no faster on CPUs without AMX.
FLOAT32 = {"dtype": "float32", "remat": False}

# The middle stage (8x8 places) and the last one (4x4), side by side on 4x4 places.
ENCODER = efficientnet("lite0", image_size=128, taps=(4, 6), resize_to=4, **FLOAT32)

# Four visual tokens: the frozen decoder's work grows with every one. The norm gives both variants
# inputs of one scale, and visual tokens start as small as the decoder's embeddings (0.14, root mean
# square), without which sixty steps end 0.6 nats higher.
CONNECTOR = Connector(
    "mlp", pool="shuffle", factor=2, input_norm="layer", hidden=1536, out_scale=0.27, **FLOAT32
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
)

VARIANTS = ("", "random_encoder")


def get_config(variant: str = ""):
    """The config.

    Args:
      variant: "" or "random_encoder".

    Raises:
      ValueError: another variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"configs/smol.py has no variant {variant!r}; expected random_encoder")
    pretrained = [c.Init(DECODER_FOLDER, "decoder")]
    if not variant:
        pretrained.append(c.Init(ENCODER_FOLDER, "encoder"))
    return c.default(
        name="-".join(filter(None, ["smol", variant])),
        model=c.Model(ENCODER, CONNECTOR, decoder("smollm2-135m", **FLOAT32)),
        data=c.Data(
            mixture={"emoji:caption": 1.0},
            tokenizer=f"{DECODER_FOLDER}/source/tokenizer.json",
            # The first stage of LLaVA, for the same reason: a prompt would say nothing and cost
            # the frozen decoder as much as the picture.
            template="plain",
            rows=8,
            tokens=56,
            images_per_row=6,
            augment=AUGMENT,
        ),
        train=c.Train(
            steps=300,
            optimizer="muon",
            lr=2e-2,
            adam_lr=3e-3,
            warmup_steps=20,
            weight_decay=0.05,
            b2=0.98,
            ema=0.98,
        ),
        init=tuple(pretrained),
        adaptation=(
            c.Rule(r"(encoder|decoder)/.*", mode="frozen"),
            *c.FULL,
        ),
        checkpoint=c.Checkpoint(every=100, keep=1),
        eval=c.Eval(
            every=100, splits=("validation", "unseen_style"), examples=64, max_new_tokens=12
        ),
    )
