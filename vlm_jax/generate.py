"""Asks a trained model about pictures.

python -m vlm_jax.generate --model=runs/tiny --image=cat.png
python -m vlm_jax.generate --model=runs/tiny --image=a.png --image=b.png --prompt="same thing?"
"""

import os
from collections.abc import Sequence

from absl import flags

from vlm_jax import doors

_MODEL = flags.DEFINE_string("model", None, "Folder of a run.", required=True)
_IMAGE = flags.DEFINE_multi_string("image", [], "Picture to look at; repeat for several.")
_PROMPT = flags.DEFINE_string("prompt", "", "What to ask; empty asks for a caption.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Length limit of the answer.")


def main(argv: Sequence[str]) -> None:
    """Prints the model's answer."""
    doors.no_arguments(argv)
    import vlm_jax

    model = vlm_jax.load(_MODEL.value)
    images = [os.path.expanduser(image) for image in _IMAGE.value]
    print(model.generate([images], [_PROMPT.value], _MAX_NEW_TOKENS.value)[0])


if __name__ == "__main__":
    doors.run(main)
