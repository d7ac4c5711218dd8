"""Writes tests/goldens/models_*.npz: outputs and gradients of transformers for small towers.

    PYTHONPATH=. python tests/models/make_goldens.py

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made those of the repository).
"""

import pathlib

import numpy as np
import theirs
from cases import GOLDENS, inputs

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def main() -> None:
    """Writes one file per case."""
    for name, case in GOLDENS.items():
        x = inputs(case)
        output, weights, gradients = theirs.compare(case, theirs.make(case), x)
        arrays = {f"weights/{path}": array for path, array in weights.items()}
        arrays |= {f"gradients/{path}": array for path, array in gradients.items()}
        np.savez_compressed(FOLDER / f"models_{name}.npz", inputs=x, output=output, **arrays)


if __name__ == "__main__":
    main()
