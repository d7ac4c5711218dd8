"""Writes tests/goldens/resizing.npz: small pictures as published image processors make them.

    PYTHONPATH=.:tests/data python tests/data/make_resizing_goldens.py

Needs transformers, torch and torchvision, the last of which no requirement of ours names.
"""

from pathlib import Path

import numpy as np
import resizing_theirs
from test_resizing import SMALL

GOLDENS = Path(__file__).parents[1] / "goldens" / "resizing.npz"


def main():
    arrays = {}
    for name, row in resizing_theirs.table().items():
        run = row.theirs()
        for height, width in SMALL:
            for n, view in enumerate(run(resizing_theirs.picture(height, width, 0.1))):
                arrays[f"{name}/{height}x{width}/{n}"] = np.round(view).astype(np.uint8)
    np.savez_compressed(GOLDENS, **arrays)


if __name__ == "__main__":
    main()
