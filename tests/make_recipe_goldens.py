"""Writes tests/goldens/recipes.json: what every recipe makes of one sample, a line for each.

PYTHONPATH=. python tests/make_recipe_goldens.py
"""

import json
import pathlib

import recipes

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "recipes.json"


def main() -> None:
    """Writes a line for each, so that a change shows as one."""
    lines = (json.dumps(each, ensure_ascii=False) for each in recipes.records())
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
