"""Writes tests/goldens/connectors_*.npz: outputs and gradients of transformers for connectors.

    PYTHONPATH=. python tests/models/make_connector_goldens.py

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made those of the repository).
"""

import pathlib

import connector_theirs
import numpy as np
from cases import cotangent
from connector_cases import GOLDENS, inputs

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def main() -> None:
    """Writes one file per case."""
    for name, case in GOLDENS.items():
        fed = inputs(case)
        output, weights, gradients = connector_theirs.compare(case, fed, cotangent)
        arrays = {f"inputs/{key}": array for key, array in fed.items()}
        arrays |= {f"weights/{key}": array for key, array in weights.items()}
        arrays |= {f"gradients/{key}": array for key, array in gradients.items()}
        np.savez_compressed(FOLDER / f"connectors_{name}.npz", output=output, **arrays)


if __name__ == "__main__":
    main()
