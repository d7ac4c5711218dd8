"""What glibc does with memory that pictures no longer need.

As it comes, each picture's pixels are given back to the system and taken anew, which zeroes every
page: of a JPEG of 500 x 375, decoded and resized in a new process, a fifth of the time.
"""

import ctypes
import functools

# Parameters of mallopt(3), and the largest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 32 * 2**20


@functools.cache
def keep_freed() -> bool:
    """Lets the process use freed memory again, up to 128 MiB; nothing where there is no glibc.

    Returns:
      Whether it does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        return False
    settings = (_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, 4 * _LARGEST)
    done = [mallopt(*setting) for setting in settings]
    return done == [1, 1]
