"""Writes tests/goldens/generation.npz: what transformers generates with weights of models_*.npz.

    PYTHONPATH=. python tests/models/make_generation_goldens.py

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made that of the repository).
"""

import pathlib

import numpy as np
import their_generations
import theirs
from generations import FILTERS, SMALL, logits

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def main() -> None:
    """Writes the file."""
    arrays = {}
    for name, case in SMALL.items():
        seed, ends, found = their_generations.answers(case, theirs.make(case))
        arrays |= {f"{name}/seed": seed, f"{name}/ends": ends}
        arrays |= {f"{name}/{options}": made for options, made in found.items()}
    for name, options in FILTERS.items():
        arrays[f"filters/{name}"] = their_generations.filtered(logits(), options)
    np.savez_compressed(FOLDER / "generation.npz", **arrays)


if __name__ == "__main__":
    main()
