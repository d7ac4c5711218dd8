"""docs/recipes.md says what the configs resolve to."""

import re

import make_recipes_table as table
import pytest

PAGE = table.TABLE.read_text()


@pytest.mark.parametrize("file", table.files())
def test_a_section_says_what_its_config_resolves_to(file):
    """`PYTHONPATH=. python tests/make_recipes_table.py` writes the page anew."""
    assert table.section(file) in PAGE


def test_every_config_of_a_published_system_has_a_section():
    assert re.findall(r"^## configs/(.+)\.py$", PAGE, re.M) == table.files()
    assert PAGE.startswith(table.INTRODUCTION)
