"""Asks a trained model about pictures.

python -m vlm_jax.generate --model=runs/tiny --image=cat.png
python -m vlm_jax.generate --model=runs/tiny --image=a.png --image=b.png --prompt="same thing?"
python -m vlm_jax.generate --model=runs/tiny --image=cat.png --temperature=0.8 --top_p=0.9 --seed=1
python -m vlm_jax.generate --model=runs/tiny --image=cat.png --beams=4 --stop="."
"""

import os
from collections.abc import Sequence

from absl import flags

from vlm_jax import doors

_MODEL = flags.DEFINE_string("model", None, "Folder of a run.", required=True)
_IMAGE = flags.DEFINE_multi_string("image", [], "Picture to look at; repeat for several.")
_PROMPT = flags.DEFINE_string("prompt", "", "What to ask; empty asks for a caption.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Length limit of the answer.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Draws tokens above 0; 0 = the most likely.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draws from so many of the likeliest tokens; 0 = all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draws from the fewest tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.")
_BEAMS = flags.DEFINE_integer("beams", 1, "Hypotheses of a beam search; 1 = none.")
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Above 0 favours long answers.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the answer; repeat for several.")


def main(argv: Sequence[str]) -> None:
    """Prints the model's answer."""
    doors.no_arguments(argv)
    import vlm_jax

    model = vlm_jax.load(_MODEL.value)
    images = [os.path.expanduser(image) for image in _IMAGE.value]
    options = {
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
        "beams": _BEAMS.value,
        "length_penalty": _LENGTH_PENALTY.value,
        "stop": tuple(_STOP.value),
    }
    replies = model.generate(
        [images], [_PROMPT.value], _MAX_NEW_TOKENS.value, seed=_SEED.value, **options
    )
    print(replies[0])


if __name__ == "__main__":
    doors.run(main)
