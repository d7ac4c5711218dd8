"""LLaVA-1.5 (Liu et al. 2024, arXiv 2310.03744): CLIP L/14 at 336 px, a two-layer MLP, Vicuna-1.5.

    python -m vlm_jax.main --config=configs/llava15.py:13b-align --workdir=runs/llava15

Variants: `7b` or `13b`; with `align` the first stage, which trains the projector alone; with `lora`
the second by LoRA (scripts/v1_5/finetune_lora.sh). `stages` and `lora-stages` walk both in one run.

The authors' data (paper, table 7, read in a fact check of it): LCS-558K of LAION, CC and SBU with
BLIP's captions; then mix665k: LLaVA 158K, ShareGPT 40K (text alone), VQAv2 83K, GQA 72K, OKVQA 9K,
OCR-VQA 80K, A-OKVQA 66K, TextCaps 22K, RefCOCO 48K, Visual Genome 86K. Their batches are of like
lengths and with or without pictures (`group_by_modality_length`); ours need no such order.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax import schema
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.resizing import Resize

WORDS = (("7b", "13b"), ("", "align", "lora", "stages", "lora-stages"))
# `image_aspect_ratio` of the scripts: "pad" in the second stage, by default a crop in the first.
PAD, CROP = Resize("pad"), Resize("crop")
# blip_laion_cc_sbu_558k.json of scripts/v1_5/pretrain.sh, llava_v1_5_mix665k.json of finetune.sh:
# 2181 and 5198 steps.
ALIGN, TUNE = 558_128, 665_298


@local.variant
def get_config(variant: str = ""):
    """The second stage, or the first, or both.

    Raises:
      ValueError: the variant is not known.
    """
    size, stage = common.words("llava15", variant, *WORDS)
    if stage.endswith("stages"):
        tune = f"{size}-{stage}".removesuffix("-stages")
        return common.walk(get_config, f"llava15-{tune}", align=f"{size}-align", tune=tune)
    config = common.system(
        f"llava15-{size}",
        c.Model(
            published("clip-l14-336", layer=-2, resize=PAD),
            Connector("mlp", layers=2),
            # The published folder pads Vicuna's 32,000 rows.
            decoder(f"llama2-{size}", vocab=32_064),
        ),
        tokens=2048,  # --model_max_length
    )
    common.freeze(config, common.ENCODERS)
    # scripts/v1_5/finetune.sh: 16 a GPU on eight; one epoch, no decay, a warm-up of 3 %, a cosine
    # to 0; AdamW, its betas and the clipping at 1 are the Trainer's.
    common.epochs(config, rows=128, samples=TUNE, lr=2e-5)
    return {"": lambda config: config, "align": align, "lora": lora}[stage](config)


def lora(config):
    """The second stage by LoRA: every linear layer of the decoder but the output matrix."""
    config.name += "-lora"
    # scripts/v1_5/finetune_lora.sh; dropout and which layers: llava/train/train.py
    # (lora_dropout, find_all_linear_names). Batch and schedule are the full tuning's.
    common.adapt(
        config,
        c.Rule(r"decoder/stack/.*", "lora", rank=128, alpha=256.0, dropout=0.05),
        c.Rule(r"connector/.*", lr=0.1),  # mm_projector_lr is 2e-5
    )
    config.train.lr = 2e-4
    return config


def align(config, rows: int = 256, samples: int = ALIGN, lr: float = 1e-3):
    """The first stage of a config: captions without prompts, the connector alone.

    Batch, rate and samples are of scripts/v1_5/pretrain.sh: 32 a GPU on eight; the rest is the
    second stage's.
    """
    config.name += "-align"
    common.captions(config)
    if len(config.model.extra_encoders) == 0:
        config.model.encoder.resize = schema.plain(CROP)
    common.freeze(config, common.ENCODERS, common.DECODER)
    common.epochs(config, rows=rows, samples=samples, lr=lr)
    return config
