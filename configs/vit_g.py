"""ViT-g/14, Perceiver pooling to 64 tokens, a 7B decoder: the shapes a pod slice trains.

    python -m vlm_jax.main --config=configs/vit_g.py --workdir=runs/vit_g
    python -m vlm_jax.main --config=configs/vit_g.py:local --workdir=runs/local   # the same, tiny

It reads the embedded pictures until `data.mixture` and `data.tokenizer` name your own.
"""

from configs import common, local
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit

WORDS = (("",),)


@local.variant
def get_config(variant: str = ""):
    """The pod's config; it has no variants of its own.

    Raises:
      ValueError: a variant is asked for.
    """
    common.words("vit_g", variant, *WORDS)
    return c.default(
        name="vit_g",
        model=c.Model(
            vit("g/14", image_size=224),
            # Three layers of Idefics2's resampler: 16 heads of 96 become 32 of 128 at its width.
            Connector(kind="perceiver", queries=64, layers=3, heads=32, kv_heads=8, remat=True),
            decoder("llama2-7b"),
        ),
        data=c.Data(
            mixture=common.MIXTURE, rows=256, tokens=2048, images_per_row=16, pool=1024, threads=16
        ),
        # LLaVA-1.5's second stage (2310.03744): lr 2e-5, cosine, 3 % warm-up, no decay.
        train=c.Train(steps=5200, lr=2e-5, warmup_steps=156, weight_decay=0.0, b2=0.999),
        checkpoint=c.Checkpoint(every=500),
        eval=c.Eval(every=1000, kinds=("caption", "choice", "yes_no")),
        parallel=c.Parallel(data=1, fsdp=-1),
    )
