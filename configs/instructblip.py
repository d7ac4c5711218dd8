"""InstructBLIP (Dai et al. 2023, arXiv 2305.06500): BLIP-2 whose Q-Former reads the instruction,
before a frozen Vicuna-1.1.

Variants: `7b` or `13b`. LAVIS has no training config: the figures are the paper's, unverified. The
Q-Former reads what the user asks; for its published weights, `data.instruction_tokenizer` is
BERT's. The authors' data: 13 sets of 26 (captions, questions, dialogues, LLaVA-Instruct), drawn in
proportion to the square roots of their sizes.
"""

from configs import blip2, common, local
from vlm_jax import config as c
from vlm_jax.presets import qformer
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

WORDS = (("7b", "13b"),)
ROWS = {"7b": 128, "13b": 64}  # a batch by size (paper, unverified)


@local.variant
def get_config(variant: str = ""):
    """Instruction tuning.

    Raises:
      ValueError: the variant is not known.
    """
    (size,) = common.words("instructblip", variant, *WORDS)
    config = common.system(
        f"instructblip-{size}",
        c.Model(
            published("blip2-g14"),
            qformer.INSTRUCTBLIP,
            decoder(f"llama1-{size}", vocab=32_001),
        ),
        # 32 queries, an instruction of at most 128 and an answer of 256 (blip2_vicuna_instruct.py).
        tokens=416,
        text_tokens=128,
        rows=ROWS[size],
        template="instructblip",
    )
    common.freeze(config, blip2.BELOW_NORM, common.DECODER)
    config.data.size_power = 0.5
    # Unverified: at most 60,000 steps, a warm-up of 1000 from 1e-8 to 1e-5 and a cosine to 0, betas
    # 0.9 and 0.999, a decay of 0.05. The code of LAVIS does not clip; whether pictures are cropped
    # at random stands nowhere, and they are not.
    config.train.update(steps=60_000, lr=1e-5, warmup_steps=1000, weight_decay=0.05, clip=0.0)
    return config
