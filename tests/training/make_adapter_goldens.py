"""Writes tests/goldens/adapters_*.npz: what the peft library makes of small adapted towers.

    PYTHONPATH=. python tests/training/make_adapter_goldens.py

Needs torch, transformers and peft (torch 2.13.0, transformers 5.23.0 and peft 0.21.2 made those of
the repository).
"""

import pathlib

import adapter_theirs
import numpy as np
from adapter_cases import CASES

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def main() -> None:
    """Writes one file per case."""
    for name in CASES:
        np.savez_compressed(FOLDER / f"adapters_{name}.npz", **adapter_theirs.make(name))


if __name__ == "__main__":
    main()
