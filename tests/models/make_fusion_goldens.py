"""Writes tests/goldens/fusion_*.npz: logits and gradients of decoders with cross-attention.

    PYTHONPATH=. python tests/models/make_fusion_goldens.py

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made those of the repository).
"""

import pathlib

import fusion_theirs
import numpy as np
from fusion_cases import GOLDENS

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def main() -> None:
    """Writes one file per case."""
    for name, case in GOLDENS.items():
        logits, weights, gradients = fusion_theirs.compare(case)
        arrays = {f"weights/{path}": array for path, array in weights.items()}
        arrays |= {f"gradients/{path}": array for path, array in gradients.items()}
        np.savez_compressed(FOLDER / f"fusion_{name}.npz", logits=logits, **arrays)


if __name__ == "__main__":
    main()
