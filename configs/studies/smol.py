"""Which connector, and what to train, between two published towers: seven cells.

make pretrained models/efficientnet-lite0/config.json models/smollm2-135m-instruct/config.json
python -m vlm_jax.study --config=configs/studies/smol.py --workdir=runs/studies/smol

Every cell sees 8,000 captioned pictures, in batches of some 12. Five connectors (1.0M parameters of
the linear one, 3.3M to 4.4M, 9.0M with gated cross-attention) speak to a decoder that stays as it
came; behind the MLP it is also trained by LoRA and whole. The encoder is frozen everywhere.
"""

import dataclasses

from configs import common, smol
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.presets.qformer import QFormer

EXAMPLES = 8_000
# Four times as many pictures a step end 0.13 nats higher: there are too few steps then.
ROWS, PER_ROW = 2, 6

LINEAR = Connector(
    "linear", pool="shuffle", factor=2, input_norm="layer", out_scale=0.27, **smol.FLOAT32
)
PERCEIVER = Connector(
    "perceiver", queries=4, layers=2, width=384, hidden=768, heads=6, kv_heads=6, **smol.FLOAT32
)
# As in BLIP-2 queries look at the image in every second layer.
QFORMER = QFormer(queries=4, width=384, depth=2, mlp=1536, heads=6, **smol.FLOAT32)
# Three gated blocks among thirty layers; a picture takes one position of the text.
GATED = CrossAttention(768, heads=9, kv_heads=9, head_dim=64, every=10, start=4)

FROZEN = (c.Rule(common.ENCODERS, "frozen"), c.Rule(common.DECODER_ALONE, "frozen"), *c.FULL)
# What attends takes a third of a projection's rate: at the whole of it the Q-Former's training ends
# at 3.8 nats, and it sees next to nothing.
ATTENDING = tuple(
    rule if rule.mode == "frozen" else dataclasses.replace(rule, lr=1 / 3) for rule in FROZEN
)
LORA = (
    c.Rule(common.ENCODERS, "frozen"),
    c.Rule(r"decoder/stack/.*", "lora", lr=0.2, rank=16, alpha=32.0),
    c.Rule(common.DECODER_ALONE, "frozen"),
    *c.FULL,
)
# A pretrained decoder takes a twentieth of a new connector's rate.
WHOLE = (
    c.Rule(common.ENCODERS, "frozen"),
    c.Rule(r"decoder/.*/(bias|scale)", lr=0.05, weight_decay=0.0),
    c.Rule(r"decoder/.*", lr=0.05),
    *c.FULL,
)

# Connector, fusion, what trains.
CELLS = {
    "linear": (LINEAR, None, FROZEN),
    "mlp": (smol.CONNECTOR, None, FROZEN),
    "perceiver": (PERCEIVER, None, ATTENDING),
    "qformer": (QFORMER, None, ATTENDING),
    "cross_attention": (LINEAR, GATED, ATTENDING),
    "mlp_lora": (smol.CONNECTOR, None, LORA),
    "mlp_full": (smol.CONNECTOR, None, WHOLE),
}

RATE = 3e-3  # of AdamW


def get_config(cell: str = "mlp"):
    """The config of a cell.

    Raises:
      ValueError: there is no such cell.
    """
    if cell not in CELLS:
        known = ", ".join(CELLS)
        raise ValueError(f"configs/studies/smol.py has no cell {cell!r}; it has: {known}")
    connector, fusion, rules = CELLS[cell]
    config = smol.get_config()
    config.name = f"smol-{cell}"
    common.put(config, connector=connector)
    if fusion is not None:
        common.put(config, fusion=fusion)
    common.replace(config.data, augment=c.Augment())
    # Room for as many captions in every cell: a picture takes four positions, or one.
    positions = 4 if fusion is None else 1
    config.data.update(rows=ROWS, tokens=40 + PER_ROW * positions, images_per_row=PER_ROW)
    common.replace(
        config,
        adaptation=rules,
        train=c.Train(
            steps=-(-EXAMPLES // (ROWS * PER_ROW)),
            warmup_steps=20,
            lr=RATE,
            b2=0.98,
            weight_decay=0.05,
            ema=0.98,
            feature_cache=1.0,
        ),
    )
    config.checkpoint.every = 200
    config.eval.every = 0
    return config
