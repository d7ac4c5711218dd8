"""Memory of pictures is used again."""

import os
import subprocess
import sys

import pytest

from vlm_jax.data import allocation

FAULTS = """
import io, resource, sys
import numpy as np
from PIL import Image
from vlm_jax.data import allocation, images
if sys.argv[1] == "kept":
    allocation.keep_freed()
file = io.BytesIO()
Image.fromarray(np.zeros((375, 500, 3), np.uint8)).save(file, "JPEG")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(24):
    if number == 8:
        begun = faults()
    images.picture(file.getvalue()).resize((384, 384))
print((faults() - begun) // 16)
"""


@pytest.mark.skipif(not allocation.keep_freed(), reason="the C library is not glibc")
def test_pictures_take_no_new_pages_where_freed_memory_is_kept():
    # What the Makefile asks of glibc, huge pages, makes few faults of many.
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    found = {}
    for how in ("given", "kept"):
        command = [sys.executable, "-c", FAULTS, how]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        found[how] = int(said.stdout)
    # One of 500 x 375 is 183 pages of 4 KiB at four bytes a pixel; some systems map larger ones.
    assert found["kept"] <= 2 < found["given"]
