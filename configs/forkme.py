"""Your own pictures and conversations: copy this file and change what is yours.

make pretrained                                                 # two published towers, once
make models/efficientnet-lite0/config.json models/smollm2-135m-instruct/config.json
python -m vlm_jax.prepare validate my_data/train.jsonl          # says what is wrong, line by line
python -m vlm_jax.main --config=configs/forkme.py:my_data --workdir=runs/mine

The variant is a folder with `train.jsonl`, `validation.jsonl` and the pictures that they name, one
conversation per line (`vlm_jax/data/formats.py`; what is in LLaVA's form is "llava" below):

    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>What is this?"},
                                       {"role": "assistant", "content": "A cat."}]}
"""

from configs import smol
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.convnets import efficientnet
from vlm_jax.presets.decoders import decoder

# Sixteen visual tokens of 224 pixels. Any encoder and decoder that `vlm_jax.convert import` read
# may stand here: `init` below names their folders.
ENCODER = efficientnet("lite0", image_size=224, taps=(4, 6), resize_to=8, **smol.FLOAT32)
CONNECTOR = Connector(
    "mlp", pool="shuffle", input_norm="layer", hidden=1536, out_scale=0.27, **smol.FLOAT32
)
DECODER = decoder("smollm2-135m", **smol.FLOAT32)
ROWS = 8


def get_config(folder: str = "my_data"):
    """The config.

    Args:
      folder: of the data.
    """
    paths = {"train": f"{folder}/train.jsonl", "validation": f"{folder}/validation.jsonl"}
    return c.default(
        name="mine",
        model=c.Model(ENCODER, CONNECTOR, DECODER),
        data=c.Data(
            corpora={"mine": c.Corpus("messages", paths)},
            mixture={"mine": 1.0},
            tokenizer=f"{smol.DECODER_FOLDER}/source/tokenizer.json",
            template="smollm2",
            # ROWS rows of 256 positions; as many conversations share one as fit, and none sees
            # another. A conversation longer than a row is left out and counted.
            rows=ROWS,
            tokens=256,
            images_per_row=8,
        ),
        # Found with eight rows; with other ones the rate goes with the square root of their number.
        train=c.Train(steps=500, lr=c.scaled_lr(1e-3, ROWS, at=8), warmup_steps=20),
        init=(
            c.Init(smol.ENCODER_FOLDER, "encoder"),
            c.Init(smol.DECODER_FOLDER, "decoder"),
        ),
        # The connector trains, and the towers stay as they came. Without the first rule all
        # trains: give the towers a tenth of the learning rate then, with `lr=0.1`.
        adaptation=(c.Rule(r"(encoder|decoder)/.*", mode="frozen"), *c.FULL),
        checkpoint=c.Checkpoint(every=100),
        eval=c.Eval(every=100, kinds=("mine",), splits=("validation",), max_new_tokens=48),
    )
