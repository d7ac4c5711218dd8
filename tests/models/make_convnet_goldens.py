"""Writes tests/goldens/convnets_*.npz: outputs and gradients of torch for small encoders.

    PYTHONPATH=. python tests/models/make_convnet_goldens.py

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made those of the repository).
"""

import pathlib

import convnet_theirs
import numpy as np
from convnet_cases import GOLDENS, pixels

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def main() -> None:
    """Writes one file per case."""
    for name, case in GOLDENS.items():
        x = pixels(case)
        output, gradients, names = convnet_theirs.compare(case, x)
        arrays = {f"gradients/{path}": array for path, array in gradients.items()}
        np.savez_compressed(FOLDER / f"convnets_{name}.npz", output=output, names=names, **arrays)


if __name__ == "__main__":
    main()
