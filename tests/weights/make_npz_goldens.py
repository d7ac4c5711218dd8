"""Writes tests/goldens/weights_npz.npz: what transformers makes of the tiny checkpoints.

    PYTHONPATH=. python tests/weights/make_npz_goldens.py

Needs torch and transformers (2.13.0 and 5.23.0 made those of the repository).
"""

import pathlib

import numpy as np
from npz_cases import CASES
from npz_theirs import outputs

FILE = pathlib.Path(__file__).parents[1] / "goldens" / "weights_npz.npz"


def main() -> None:
    """Writes an array per case and output; those in float32 stand for the others."""
    found = {
        f"{name}/{output}": array
        for name, (_, _, dtype) in CASES.items()
        if dtype == "float32"
        for output, array in outputs(name).items()
    }
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
