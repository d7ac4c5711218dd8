"""Writes tests/goldens/weights_gguf.npz: transformers' logits for the tiny GGUF files.

    PYTHONPATH=. python tests/weights/make_gguf_goldens.py

Needs torch, transformers and gguf (2.13.0, 5.23.0 and 0.19.0 made those of the repository).
"""

import pathlib
import tempfile

import numpy as np
from gguf_cases import CASES
from gguf_theirs import logits

FILE = pathlib.Path(__file__).parents[1] / "goldens" / "weights_gguf.npz"


def main() -> None:
    """Writes one array per case."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: logits(name, pathlib.Path(folder)) for name in CASES}
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
