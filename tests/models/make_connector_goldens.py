"""Writes tests/goldens/connectors_*.npz: outputs and gradients of transformers for connectors.

    PYTHONPATH=. python tests/models/make_connector_goldens.py

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made those of the repository).
"""

import json
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
        # As two vectors: an archive spends more on an array's name than on what these hold.
        arrays["shapes"] = json.dumps({key: array.shape for key, array in weights.items()})
        arrays["weights"] = flat(weights)
        arrays["gradients"] = flat({key: gradients[key] for key in weights})
        np.savez_compressed(FOLDER / f"connectors_{name}.npz", output=output, **arrays)


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """All numbers one after the other."""
    return np.concatenate([array.ravel() for array in arrays.values()])


if __name__ == "__main__":
    main()
