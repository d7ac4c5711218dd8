"""Writes tests/goldens/published_*.npz with transformers.

    PYTHONPATH=. python tests/weights/make_published.py [NAME ...]

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made those of the repository).
"""

import json
import pathlib
import sys
import tempfile

import goldens
import published
from safetensors.numpy import load_file


def main() -> None:
    """Writes the golden files named, by default all."""
    for name in sys.argv[1:] or published.CASES:
        case = published.CASES[name]
        model, inputs, found = published.clear(case)
        with tempfile.TemporaryDirectory() as folder:
            published.save(pathlib.Path(folder), model)
            config = json.loads(published.config_text(pathlib.Path(folder)))
            tensors = load_file(f"{folder}/model.safetensors")
        goldens.write(name, goldens.Golden(config, tensors, inputs, found))


if __name__ == "__main__":
    main()
