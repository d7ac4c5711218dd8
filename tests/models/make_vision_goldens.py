"""Writes tests/goldens/vision_*.npz: outputs and gradients of transformers for small towers.

    PYTHONPATH=. python tests/models/make_vision_goldens.py

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made those of the repository).
"""

import pathlib

import numpy as np
import vision_theirs
from vision_cases import SMALL, inputs

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def main() -> None:
    """Writes one file per tower."""
    for name, tower in SMALL.items():
        x = inputs(tower)
        output, weights, gradients = vision_theirs.compare(tower, x)
        arrays = {f"weights/{path}": array for path, array in weights.items()}
        if tower.gradients:
            arrays |= {f"gradients/{path}": array for path, array in gradients.items()}
        np.savez_compressed(FOLDER / f"vision_{name}.npz", inputs=x, output=output, **arrays)


if __name__ == "__main__":
    main()
