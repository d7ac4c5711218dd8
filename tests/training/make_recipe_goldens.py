"""Writes tests/goldens/recipes_*.npz: what a torch loop makes of small published systems.

    PYTHONPATH=. python tests/training/make_recipe_goldens.py

Needs torch and transformers (torch 2.13.0 and transformers 5.23.0 made those of the repository).
"""

import pathlib
import tempfile

import recipe_cases
import recipe_theirs


def main() -> None:
    """Writes one file per case."""
    for name in recipe_cases.RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            recipe_cases.write(name, recipe_theirs.make(name, pathlib.Path(folder)))


if __name__ == "__main__":
    main()
