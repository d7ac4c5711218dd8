"""Idefics2 8B (Laurençon et al. 2024, arXiv 2405.02246): SigLIP-SO400M up to 980 px, a Perceiver to
64 tokens, Mistral-7B.

Variants: `64` tokens a picture, or `320`, for the picture and the quarters it is cut into. Pictures
keep their aspect ratio; small ones are enlarged at random. Encoder and decoder train by LoRA, as
full training diverged; the rows of the three added tokens are part of the frozen table, while the
recipe trains them. Its number of steps is ours.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import resampler
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.resizing import Resize

RESIZE = {
    mode: Resize(mode, filter="bilinear", shortest=378, longest=980)
    for mode in ("bounds", "quarters")
}
WORDS = (("64", "320"),)


@local.variant
def get_config(variant: str = ""):
    """Pre-training at full resolution.

    Raises:
      ValueError: the variant is not known.
    """
    (tokens,) = common.words("idefics2", variant, *WORDS)
    config = common.system(
        f"idefics2-{tokens}",
        c.Model(
            published("idefics2", resize=RESIZE["bounds" if tokens == "64" else "quarters"]),
            resampler("idefics2"),
            # <fake_token_around_image>, <image> and <end_of_utterance>
            decoder("mistral-7b", vocab=32_003),
        ),
        tokens=2048,
        images_per_row=int(tokens) // 64,
    )
    common.captions(config)
    # The m4 trainer's defaults: all linear layers, norms trained, no decay for the Perceiver.
    lora = {"mode": "lora", "rank": 64, "alpha": 16.0, "dropout": 0.1}
    common.adapt(
        config,
        c.Rule(r"(encoder|decoder)/stack/.*|decoder/output/kernel", **lora),
        c.Rule(r"(encoder|decoder)/.*norm.?/.*", weight_decay=0.0),
        c.Rule(r"connector/embed_mlp/.*"),
        c.Rule(r"connector/.*", weight_decay=0.0),
    )
    config.data.rows = 2048
    config.data.augment.upscale = (378, 980)
    config.train.update(steps=40_000, lr=1e-4, warmup_steps=2000, weight_decay=0.1)
    return config
