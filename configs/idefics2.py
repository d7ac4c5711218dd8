"""Idefics2 8B (Laurençon et al. 2024, arXiv 2405.02246): SigLIP-SO400M up to 980 px, a Perceiver to
64 tokens, Mistral-7B.

Variants: `64` tokens a picture, or `320`, for the picture and the quarters it is cut into; with
`first` the first of two stages of pre-training, whose pictures have at most 384 px; with `instruct`
the tuning that follows both; with `stages` all three. Pictures keep their aspect ratio; small ones
are enlarged at random in the latter two. Encoder and decoder train by LoRA, as full training
diverged, and by DoRA in tuning; the rows of the three added tokens are part of the frozen table,
while the recipe trains them.

The authors' data (section 4.1 and table 14 of the paper): first OBELICS 70 %, pairs (PMD and
LAION-COCO) 30 %; then OBELICS 45 %, pairs 35 %, pages (OCR-IDL, PDFA, Rendered Text) 20 %; then The
Cauldron's 50 sets and text alone, of which the largest are OpenHermes 12.73 %, VQAv2 5.72, Rendered
Text 5.57, narratives 4.56, Chart2Text 4.38, DVQA 4.27, GeomVerse 3.83, MetaMathQA 3.81.
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
SMALL = Resize("bounds", filter="bilinear", shortest=378, longest=384)
# The Perceiver is not decayed, what comes before it is.
CONNECTOR = c.Rule(r"connector/embed_mlp/.*"), c.Rule(r"connector/.*", weight_decay=0.0)
WORDS = (("64", "320"), ("", "first", "instruct", "stages"))


@local.variant
def get_config(variant: str = ""):
    """Pre-training at full resolution, at a low one, or tuning; or all.

    Raises:
      ValueError: the variant is not known.
    """
    tokens, stage = common.words("idefics2", variant, *WORDS)
    if stage == "stages":
        each = {"first": f"{tokens}-first", "second": tokens, "instruct": f"{tokens}-instruct"}
        return common.walk(get_config, f"idefics2-{tokens}", **each)
    config = common.system(
        f"idefics2-{tokens}",
        c.Model(
            published("idefics2", resize=RESIZE["bounds" if tokens == "64" else "quarters"]),
            resampler("idefics2"),
            # <fake_token_around_image>, <image> and <end_of_utterance>
            decoder("mistral-7b", vocab=32_003),
        ),
        # 17,000 images in 2048 sequences of a batch, each of 2048 tokens (documents; pairs have
        # 1536, pages 1024). Quarters and the whole are five images.
        tokens=2048,
        images_per_row={"64": 8, "320": 10}[tokens],
        template="idefics2",
    )
    adapt(config, "lora")
    # The paper: 2048 sequences a batch and 1e-4 in both stages. 225G tokens of text, 2.5M of them a
    # batch, are 90,000 steps of both; that halves are alike is ours. The m4 trainer (config.py, and
    # tr_341 of SmolVLM, which is no Idefics2): betas 0.9 and 0.999, a decay of 0.1, clipping at 1,
    # a warm-up of 2000, a linear decay.
    config.data.rows = 2048
    config.data.augment.upscale = (378, 980)
    config.train.update(steps=45_000, lr=1e-4, warmup_steps=2000, weight_decay=0.1)
    config.train.schedule = "linear"
    return {"": pretrain, "first": first, "instruct": instruct}[stage](config)


def pretrain(config):
    """The second stage of pre-training."""
    common.captions(config, "idefics")
    return config


def first(config):
    """The first stage of pre-training: at most 384 px, no quarters."""
    config.name += "-first"
    common.captions(config, "idefics")
    small = published("idefics2", max_patches=27 * 27, resize=SMALL)
    common.put(config, encoder=small)
    config.data.images_per_row = 8
    config.data.augment.upscale = (0, 0)
    return config


def instruct(config):
    """Tuning on The Cauldron by DoRA, with NEFTune's noise.

    No source has alpha of the noise, batch, rate, warm-up or steps: they are those of SmolVLM's
    second stage (tr_345 of the same trainer).
    """
    config.name += "-instruct"
    adapt(config, "dora")
    config.train.update(steps=6000, warmup_steps=100, neftune=5.0)
    return config


def adapt(config, mode: str, connector: tuple[c.Rule, ...] = CONNECTOR) -> None:
    """What trains: the m4 trainer's defaults, as its configs of SmolVLM's first stage have them.

    Rank 64, alpha 16 and dropout of 0.1 on all linear layers (Idefics2's own are not published);
    norms and connector train, without a decay of biases, norms and the Perceiver (no_decay).
    """
    adapters = {"mode": mode, "rank": 64, "alpha": 16.0, "dropout": 0.1}
    common.adapt(
        config,
        c.Rule(r"(encoder|decoder)/stack/.*|decoder/output/kernel", **adapters),
        c.Rule(r"(encoder|decoder)/.*norm.?/.*", weight_decay=0.0),
        *connector,
    )
