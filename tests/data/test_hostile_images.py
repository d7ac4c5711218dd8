"""What comes of hostile and unusual pictures (`hostile.py`), and what it costs."""

import json
import subprocess
import sys
from pathlib import Path

import hostile
import numpy as np
import pytest

from vlm_jax.data import decoding, images
from vlm_jax.presets.encoders import Encoder

ROOT = Path(__file__).parents[2]
MEGABYTE = 1e6


# pytest takes away the filter of `decoding.py`; see `test_no_warning_leaks`.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", hostile.TABLE)
def test_every_picture_gives_its_pixels_or_its_reason(name, tmp_path):
    row = hostile.TABLE[name]
    image = row.make(tmp_path)
    if isinstance(row.expected, str):
        with pytest.raises(images.BadImage) as refusal:
            images.decode(image)
        assert refusal.value.reason == row.expected
        return
    decoded = images.decode(image)
    assert decoded.dtype == np.uint8 and decoded.shape == row.expected.shape
    np.testing.assert_allclose(decoded.astype(int), row.expected.astype(int), atol=row.atol)
    # What the header says, before any pixel is decoded.
    assert decoding.size(decoding.opened(image)) == decoded.shape[:2]


def test_a_jpeg_that_says_more_rows_than_it_has_ends_grey():
    """A known limit: libjpeg only warns of it, and Pillow does not tell."""
    decoded = images.decode(hostile.claiming(32, 40))
    assert decoded.shape == (40, 32, 4)
    np.testing.assert_array_equal(decoded[:24], images.decode(hostile.JPEG))
    np.testing.assert_array_equal(decoded[32:, :, :3], 128)


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """Of every row, measured in a process that has no more than the decoder; and what it said."""
    command = [sys.executable, "-BW", "always", hostile.__file__, tmp_path_factory.mktemp("costs")]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True
    )
    return json.loads(done.stdout or "{}"), done.stderr


def test_no_picture_crashes_hangs_writes_or_costs_much(costs):
    found, _ = costs
    assert found.keys() == hostile.TABLE.keys()
    assert not {name: cost for name, cost in found.items() if cost["status"]}
    # Seconds of the CPU: those on the wall are the machine's affair, but for what waits for ever.
    assert not {name: cost for name, cost in found.items() if cost["cpu"] > 2}
    assert not {name: cost for name, cost in found.items() if cost["memory"] > 100 * MEGABYTE}


def test_no_warning_leaks(costs):
    assert costs[1] == ""


@pytest.mark.parametrize("shape", [(1, 1), (1, 16_384), (16_384, 1), (2, 3)])
def test_no_shape_of_picture_is_too_odd_to_fit(shape):
    encoder = Encoder(16, 1, 32, 2, patch=4, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    grey = np.full((*shape, 4), (51, 51, 51, 255), np.uint8)
    np.testing.assert_allclose(images.fit(grey, encoder), 0.2, atol=1e-6)


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((4, 4)), "unsupported"),
        (np.zeros((4, 4, 3), np.float32), "unsupported"),
        (np.zeros((4, 4), np.float32), "unsupported"),
        (np.full((4, 4), 70_000, np.int32), "unsupported"),
        (np.zeros((2, 4, 4, 3), np.uint8), "unsupported"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((1, 20_000, 3), np.uint8), "too_large"),
    ],
)
def test_an_array_that_is_no_picture_is_refused(array, reason):
    with pytest.raises(images.BadImage) as refusal:
        images.decode(array)
    assert refusal.value.reason == reason
