"""MiniGPT-v2 (Chen et al. 2023, arXiv 2310.09478): EVA-CLIP g/14 at 448 px, four neighbouring
features to one token, Llama-2-chat 7B.

The linear layer trains, and the decoder's queries and values by LoRA. Of the paper's three stages
the repository has a config of one alone. The authors' data there (minigptv2_finetune.yaml, shares
of batches): LLaVA's dialogues 30, details 20 and reasoning 80; Flickr's grounded captions, phrases
and objects 80 each; GQA 50; multi-task dialogues 50; RefVG 40; OCR-VQA and TextCaps 30 each;
RefCOCO, RefCOCO+ and RefCOCOg 25 each, their inverse 10 each; COCO's questions 15, A-OKVQA 12,
OKVQA 8; COCO's captions 10; instructions without pictures 10.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

WORDS = (("",),)


@local.variant
def get_config(variant: str = ""):
    """The last stage; it has no variants.

    Raises:
      ValueError: a variant is asked for.
    """
    common.words("minigpt_v2", variant, *WORDS)
    config = common.system(
        "minigpt_v2",
        c.Model(
            published("blip2-g14", image_size=448, keep_class=False),
            Connector("linear", pool="adjacent", factor=4),
            decoder("llama2-7b"),
        ),
        # 256 visual tokens and at most 1024 of text (minigptv2_finetune.yaml)
        tokens=1280,
        template="minigpt_v2",
        rows=96,  # ours: 1 to 6 a GPU by data set, on GPUs that no file counts
    )
    # train_configs/minigptv2_finetune.yaml: 50 times 1000 steps, 1e-5 to 1e-6, a warm-up of 1000
    # from 1e-6; base_task.py does not clip. The dropout is the model's default (minigpt_base.py).
    common.adapt(
        config,
        c.Rule(r"decoder/.*(query|value)/kernel", "lora", rank=64, alpha=16.0, dropout=0.05),
        c.Rule(r"connector/.*/kernel"),
        c.Rule(r"connector/.*", weight_decay=0.0),
    )
    config.train.update(steps=50_000, lr=1e-5, end_lr=0.1, warmup_steps=1000)
    config.train.update(weight_decay=0.05, clip=0.0)
    return config
