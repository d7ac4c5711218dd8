"""ViT-g/14, Perceiver pooling to 64 tokens, a 7B decoder: the shapes a pod slice trains.

    python -m vlm_jax.main --config=configs/vit_g.py --workdir=runs/vit_g
    python -m vlm_jax.main --config=configs/vit_g.py:smoke --workdir=runs/smoke   # the same, tiny

It reads the embedded pictures until `data.mixture` and `data.tokenizer` name your own.
"""

from configs import local
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit

MIXTURE = {"emoji:caption": 1.0, "emoji:choice": 1.0, "emoji:yes_no": 1.0}


@local.variant
def get_config(variant: str = ""):
    """The pod's config, or with `smoke` the same structure at tiny widths on the embedded data.

    Raises:
      ValueError: the variant is not known.
    """
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/vit_g.py has no variant {variant!r}; it has: smoke")
    config = c.default(
        name="vit_g",
        model=c.Model(
            vit("g/14", image_size=224),
            # Three layers of Idefics2's resampler: 16 heads of 96 become 32 of 128 at its width.
            Connector(kind="perceiver", queries=64, layers=3, heads=32, kv_heads=8, remat=True),
            decoder("llama2-7b"),
        ),
        data=c.Data(
            mixture=MIXTURE, rows=256, tokens=2048, images_per_row=16, pool=1024, threads=16
        ),
        # LLaVA-1.5's second stage (2310.03744): lr 2e-5, cosine, 3 % warm-up, no decay.
        train=c.Train(steps=5200, lr=2e-5, warmup_steps=156, weight_decay=0.0, b2=0.999),
        checkpoint=c.Checkpoint(every=500),
        eval=c.Eval(every=1000, kinds=("caption", "choice", "yes_no")),
        parallel=c.Parallel(data=1, fsdp=-1),
    )
    return smoke(config) if variant == "smoke" else config


def smoke(config):
    """Tiny widths, few steps; every part of the structure stays."""
    model = config.model
    model.encoder.update(width=88, depth=3, mlp=384, heads=4, image_size=56, dtype="float32")
    model.connector.update(queries=8, layers=3, heads=4, kv_heads=1, dtype="float32")
    model.decoder.update(
        vocab=3072, width=64, depth=3, mlp=172, heads=4, kv_heads=4, head_dim=16, dtype="float32"
    )
    config.data.update(rows=8, tokens=128, images_per_row=6, pool=64, threads=2)
    config.train.update(steps=20, lr=1e-3, warmup_steps=5, log_every=5)
    config.checkpoint.every = 10
    config.eval.update(every=10, examples=16, final_examples=16, splits=("validation",))
    return config
