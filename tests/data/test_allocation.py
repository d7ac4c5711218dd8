"""Memory of pictures is used again."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import allocation

# What glibc says of itself: system calls and page faults are counted otherwise, or not at all,
# where a sandbox stands in for the kernel.
HELD = """
import ctypes, sys
from vlm_jax.data import allocation, images

class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

info = ctypes.CDLL(None).mallinfo2
info.restype = Info
if sys.argv[1] == "kept":
    allocation.keep_freed()
file = open(sys.argv[2], "rb").read()
decoded = lambda: images.picture(file).resize((384, 384))
before = info().hblks
picture = decoded()
mapped = info().hblks - before
del picture
heap = info().arena
for _ in range(16):
    decoded()
print(mapped, info().arena - heap)
"""


def _counted() -> bool:
    return hasattr(ctypes.CDLL(None), "mallinfo2")


def _plain() -> dict[str, str]:
    # The Makefile asks glibc for huge pages, which leave room for a picture at the heap's end.
    return {k: v for k, v in os.environ.items() if not k.startswith(("GLIBC_TUNABLES", "MALLOC_"))}


@pytest.mark.skipif(
    not (allocation.keep_freed() and _counted()), reason="not glibc of 2.33 or later"
)
def test_pictures_share_the_same_memory_where_freed_memory_is_kept(tmp_path):
    # Made elsewhere: glibc maps no block as small as one that was freed.
    file = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((375, 500, 3), np.uint8)).save(file)
    found = {}
    for how in ("given", "kept"):
        command = [sys.executable, "-c", HELD, how, str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=_plain())
        found[how] = tuple(map(int, said.stdout.split()))
    # A block of its own, mapped for one picture; or none, and a heap that hardly grows.
    if not found["given"][0]:  # a sandbox's imports may leave other blocks than a kernel's
        pytest.skip("what was imported left room for a picture: nothing to keep")
    assert found["kept"][0] == 0 and found["kept"][1] < 375 * 500
