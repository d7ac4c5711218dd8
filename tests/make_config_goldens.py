"""Writes tests/goldens/configs.json: every config as its difference from the defaults.

PYTHONPATH=. python tests/make_config_goldens.py
"""

import json
import pathlib

import systems

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "configs.json"


def main() -> None:
    """Writes a line for each config, so that a change shows as one."""
    sections = (
        f"{json.dumps(section)}: {{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in each.items())
        + "\n}"
        for section, each in systems.golden().items()
    )
    GOLDEN.write_text("{" + ",\n".join(sections) + "}\n")


if __name__ == "__main__":
    main()
