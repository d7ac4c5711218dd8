"""Encoders of our own, pre-trained by captioning the embedded pictures, beside `siglip.py:s`.

Variants: `cap` tells a name token by token; `cappa` three of four names all at once (Tschannen et
al. 2023, arXiv 2306.07915); `coca` compares pictures with names too (Yu et al. 2022, 2205.01917).

python -m vlm_jax.main --config=configs/captioner.py:cappa --workdir=runs/cappa

Another config starts from the encoder with `init=(c.Init("runs/cappa", "encoder"),)`. Unlike
CapPa's, the decoder looks at the picture before each layer, not between its two parts; and unlike
CoCa's, its text tower shares no layers with the decoder.
"""

import dataclasses

from configs import siglip
from vlm_jax import config as c
from vlm_jax import schema
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.fusion import CrossAttention

WIDTH, DEPTH = 128, 4
VARIANTS = ("cap", "cappa", "coca")
DECODER = Decoder(
    siglip.TEXT.vocab,
    WIDTH,
    DEPTH,
    mlp=384,
    heads=4,
    kv_heads=4,
    head_dim=32,
    tied=True,
    **siglip.FLOAT32,
)
# Plain cross-attention, as both papers have it.
LOOKS = CrossAttention(0, 4, 4, 32, every=1, norm="rms", gate="none")


def get_config(variant: str = ""):
    """One of the captioners, by default `cappa`.

    Raises:
      ValueError: there is no such variant.
    """
    variant = variant or "cappa"
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/captioner.py has no variant {variant!r}; it has {', '.join(VARIANTS)}"
        )
    config = siglip.get_config("s")
    config.name = variant
    config.data.update(template="plain", tokens=32, text_tokens=siglip.TEXT.length)
    encoder = config.model.encoder.to_dict() | {"pool": "none"}
    encoder = schema.typed(Encoder, encoder, "config.model.encoder")
    with config.ignore_type():
        config.model = schema.plain(_model(variant, encoder))
    # masked_pred_prob of big_vision's configs/proj/cappa/pretrain.py, whose masking_ratio is 1.
    config.train.parallel = 0.75 if variant == "cappa" else 0.0
    # CoCa weighs the captions twice and the comparison, a softmax, once (section 4.1).
    config.train.update(pairs="softmax", pairs_weight=0.5 if variant == "coca" else 0.0)
    return config


def _model(variant: str, encoder: Encoder) -> c.Model:
    if variant != "coca":
        decoder = dataclasses.replace(DECODER, masked=variant == "cappa")
        looks = dataclasses.replace(LOOKS, width=encoder.width)
        return c.Model(encoder, Connector("none", out=encoder.width), decoder, fusion=looks)
    # The first half of the decoder reads text alone; a pooler makes what the second looks at, and
    # one of its own what is compared.
    pooler = Connector("perceiver", queries=8, layers=1, heads=4, kv_heads=4, **siglip.FLOAT32)
    looks = dataclasses.replace(LOOKS, start=DEPTH // 2)
    text = dataclasses.replace(siglip.TEXT, image_pool="map", logit_bias=False)
    return c.Model(encoder, pooler, DECODER, fusion=looks, text=text)
