"""SmolVLM (Marafioti et al. 2025, arXiv 2504.05299): Idefics3 with SmolLM2.

Variants: `256m`, `500m` or `2.2b`, the second stage, in which all of it trains; with `first` the
first, by DoRA, with `instruct` the third, and with `stages` all.

Figures are those of the authors' configs, smollm's vision/experiments/pretraining/vloom: tr_341 and
345 and 346 of 256m, 343 and 347 and 349 of 500m, 348 and 350 of 2.2b, which has no third one there.
The authors' data: LAION-COCO 60 % and pages 40 %; pages 30 % and instructions 70 %; instructions.
Their pictures of LAION-COCO are at most 1536 px large (1152 for 2.2b), others 2048 (1920); ours are
enlarged to four tiles a side in all stages.
"""

from configs import common, idefics2, idefics3, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit

# Encoder, factor of the pixel shuffle, decoder, rows of its vocabulary.
SMALL = vit("B/16", image_size=512, resize=idefics3.tiles(512))
LARGE = vit("So400m/14", image_size=378, resize=idefics3.tiles(384))
SIZES = {
    "256m": (SMALL, 4, "smollm2-135m", 49_280),
    "500m": (SMALL, 4, "smollm2-360m", 49_280),
    "2.2b": (LARGE, 3, "smollm2-1.7b", 49_155),
}
WORDS = (tuple(SIZES), ("", "first", "instruct", "stages"))


@local.variant
def get_config(variant: str = ""):
    """The second stage, the first, or the third; or all.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("smolvlm", variant, *WORDS)
    if stage == "stages":
        each = {"first": f"{size}-first", "second": size, "instruct": f"{size}-instruct"}
        return common.walk(get_config, f"smolvlm-{size}", **each)
    encoder, factor, name, vocab = SIZES[size]
    config = idefics3.get_config()
    config.name = f"smolvlm-{size}"
    common.put(
        config,
        encoder=encoder,
        connector=Connector("linear", pool="shuffle", factor=factor, bias=False),
        # Unlike SmolLM2's own, the published output matrices are not the embedding tables.
        decoder=decoder(name, vocab=vocab, tied=False),
    )
    # max_seq_len; max_num_images is of two pictures, of up to 16 tiles and the whole each.
    config.data.update(tokens=7000, images_per_row=34, template="smolvlm")
    config.train.neftune = 5.0  # neftune_noise_alpha, of the second and third stage
    return {"": lambda config: config, "first": first, "instruct": instruct}[stage](config)


def first(config):
    """The first stage: adapters, connector, norms and the encoder's embeddings train.

    1e-4, that falls linearly towards step 500,000, of which no more than 200,000 were planned and
    about 25,000 taken (the second stages start from 25,750, 24,750 and 22,250).
    """
    config.name += "-first"
    unfrozen = (  # patterns_to_unfreeze, no_decay
        c.Rule(r"encoder/stem/.*bias", weight_decay=0.0),
        c.Rule(r"connector/.*|encoder/(stem|positions).*"),
    )
    idefics2.adapt(config, "dora", unfrozen)
    common.captions(config)
    config.data.rows = 1024
    config.train.update(steps=25_000, warmup_steps=2000, end_lr=475 / 498, neftune=0.0)
    return config


def instruct(config):
    """The third stage: linearly to 0 in 2000 steps of 8192 (max_num_opt_steps says 4000)."""
    config.name += "-instruct"
    config.data.rows = 8192
    config.train.steps = 2000
    return config
