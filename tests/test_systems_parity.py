"""Parameters of transformers' classes, counted again. Needs torch."""

import pytest
from test_systems import COUNTED

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", COUNTED)
def test_transformers_has_the_recorded_parameters(name):
    import systems_theirs

    assert tuple(systems_theirs.counts(name).values()) == COUNTED[name]
