"""Prismatic VLMs (Karamcheti et al. 2024, arXiv 2402.07865): one stage, features of the last block
but one, base Llama 2.

Variants: `dinosiglip` (joined along channels), `siglip`, `clip` or `dinov2`, and `7b` or `13b`;
with `controlled` one epoch of LLaVA-1.5's data alone; with `align` the first of two stages, which
the others do without. Images of 384 px are 378 here: their last six pixels have no patch.

The authors' data: LLaVA-1.5's mix665k with LVIS-Instruct-4V and LRV-Instruct (conf/datasets.py:
llava_v1_5_lvis4v_lrv_mix1231k); LCS-558K for `align`.
"""

from configs import common, llava15, local
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.resizing import SQUASH, Resize


def _encoder(name: str, **fields) -> Encoder:
    return published(name, **{"layer": -2, "final_norm": False, "resize": SQUASH} | fields)


# "resize-naive" of the published models; "letterbox" is `Resize("letterbox")`.
NAIVE_384 = Resize(side=384)
SIGLIP = _encoder("siglip-so400m14-378", resize=NAIVE_384)
ENCODERS = {
    "dinosiglip": (_encoder("dinov2-reg-l14", image_size=378, resize=NAIVE_384), SIGLIP),
    "siglip": (SIGLIP,),
    "clip": (_encoder("clip-l14-336"),),
    "dinov2": (_encoder("dinov2-reg-l14"),),
}
WORDS = (tuple(ENCODERS), ("7b", "13b"), ("", "controlled", "align"))
SAMPLES = 1_231_000


@local.variant
def get_config(variant: str = ""):
    """The one stage, two epochs; or one of others.

    Raises:
      ValueError: the variant is not known.
    """
    encoder, size, stage = common.words("prismatic", variant, *WORDS)
    config = llava15.get_config(size)
    config.name = f"prismatic-{encoder}-{size}"
    config.data.template = "in_out"
    first, *others = ENCODERS[encoder]
    language = decoder(f"llama2-{size}", vocab=32_064)
    common.put(config, encoder=first, extra_encoders=tuple(others), decoder=language)
    if others:
        # fused-gelu-mlp (nn_utils.py): three layers, the first four times as wide as the features
        hidden = 4 * sum(e.width for e in ENCODERS[encoder]), language.width
        common.put(config, connector=Connector("mlp", layers=3, hidden=hidden))
    # conf/models.py: Prism_7B_DINOSigLIP and its parents; 16 a device, 2e-5, a decay of 0.1 (LLaVA:
    # 0), clipping at 1, a warm-up of 3 %, a cosine, 2048 tokens. No stage trains an encoder.
    common.epochs(config, rows=128, samples=SAMPLES, times=2, lr=2e-5, weight_decay=0.1)
    return {"": lambda config: config, "controlled": controlled, "align": align}[stage](config)


def controlled(config):
    """The one stage on LLaVA-1.5's data (Prism_7B_DINOSigLIP_Controlled)."""
    config.name += "-controlled"
    common.epochs(config, rows=128, samples=llava15.TUNE)
    return config


def align(config):
    """The projector alone (align_* of conf/models.py)."""
    config.name += "-align"
    common.captions(config, "clip")  # the caption and the end of sequence (datasets.py)
    common.freeze(config, common.ENCODERS, common.DECODER)
    common.epochs(config, rows=256, samples=llava15.ALIGN, lr=1e-3, weight_decay=0.0)
    return config
