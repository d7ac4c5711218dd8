"""JPEG decoders on the CPU beside `images.picture`: 500 x 375 JPEGs to 384 x 384 RGB.

    python -m benchmarks.decode_images
    python -m benchmarks.decode_images --width 2000 --height 1500 --repeats 20

All sides run in one process on one core, in turns over the same made-up pictures. A figure is the
median over pictures and repeats, in milliseconds of the process's CPU clock: to RGB pixels, and to
resized ones, with Pillow's bicubic filter unless a side has its own. `off` is the largest and the
mean difference from what Pillow decodes, and the mean of the resized. Decoders that are not
installed are skipped: simplejpeg, PyTurboJPEG, opencv-python-headless, imagecodecs, pyvips.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks.pictures import photograph
from vlm_jax.data import images

Decode = Callable[[bytes], np.ndarray]
Resize = Callable[[np.ndarray, int], np.ndarray]


def bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pillow's, as `images.fit` calls it."""
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def ours(size: int) -> tuple[Decode, Resize]:
    return lambda data: np.asarray(images.picture(data)), bicubic


def pillow(size: int) -> tuple[Decode, Resize]:
    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), bicubic


def draft(size: int) -> tuple[Decode, Resize]:
    """libjpeg's own reduction by 2, 4 or 8, to twice the size at least."""

    def decode(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (2 * size, 2 * size))
        return np.asarray(image.convert("RGB"))

    return decode, bicubic


def simplejpeg(size: int) -> tuple[Decode, Resize]:
    import simplejpeg

    return simplejpeg.decode_jpeg, bicubic


def turbojpeg(size: int) -> tuple[Decode, Resize]:
    import turbojpeg

    turbo = turbojpeg.TurboJPEG()
    return lambda data: turbo.decode(data, pixel_format=turbojpeg.TJPF_RGB), bicubic


def opencv(size: int) -> tuple[Decode, Resize]:
    import cv2

    cv2.setNumThreads(1)

    def decode(data: bytes) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

    # Its bicubic filter looks at 16 pixels however many become one; by area none is left out.
    return decode, lambda pixels, size: cv2.resize(pixels, (size, size), None, 0, 0, cv2.INTER_AREA)


def imagecodecs(size: int) -> tuple[Decode, Resize]:
    import imagecodecs

    return imagecodecs.jpeg8_decode, bicubic


def pyvips(size: int) -> tuple[Decode, Resize]:
    os.environ["VIPS_CONCURRENCY"] = "1"  # read when it is loaded
    import pyvips

    return lambda data: pyvips.Image.new_from_buffer(data, "").numpy(), bicubic


SIDES = {
    "images.picture": ours,
    "Pillow": pillow,
    "Pillow, draft": draft,
    "simplejpeg": simplejpeg,
    "PyTurboJPEG": turbojpeg,
    "OpenCV": opencv,
    "imagecodecs": imagecodecs,
    "pyvips": pyvips,
}


def main() -> None:
    """Prints a table, fastest first."""
    options = _options()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    pictures = [
        photograph(seed, options.width, options.height, options.quality)
        for seed in range(options.pictures)
    ]
    kilobytes = statistics.mean(map(len, pictures)) / 1000
    print(
        f"{options.width} x {options.height} of {kilobytes:.0f} kB to {options.size}, "
        f"{len(pictures)} pictures, {options.repeats} repeats, load {os.getloadavg()[0]:.1f}"
    )
    sides = {name: side for name in SIDES if (side := _installed(name, options.size))}
    taken = {name: ([], []) for name in sides}
    for _ in range(options.repeats):
        for data in pictures:
            for name, (decode, resize) in sides.items():
                start = time.process_time()
                pixels = decode(data)
                decoded = time.process_time()
                resize(pixels, options.size)
                taken[name][0].append(decoded - start)
                taken[name][1].append(time.process_time() - start)
    median = {name: [1000 * statistics.median(times) for times in taken[name]] for name in sides}
    base = median["images.picture"][1]
    print(f"{'side':14} {'decode':>7} {'resized':>8} {'ratio':>6}  off: max, mean, resized")
    for name in sorted(sides, key=lambda name: median[name][1]):
        decode, resized = median[name]
        off = ", ".join(
            f"{one:.2f}" for one in _off(sides[name], sides["Pillow"], pictures, options)
        )
        print(f"{name:14} {decode:7.2f} {resized:8.2f} {base / resized:6.2f}  {off}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quality", type=int, default=90)
    return parser.parse_args()


def _installed(name: str, size: int) -> tuple[Decode, Resize] | None:
    try:
        return SIDES[name](size)
    except (ImportError, OSError, RuntimeError) as missing:  # the library behind it, too
        print(f"{name} is skipped: {missing}")
        return None


def _off(side, other, pictures: list[bytes], options: argparse.Namespace) -> tuple[float, ...]:
    decoded, resized = [], []
    for data in pictures:
        one, two = (decode(data) for decode, _ in (side, other))
        same = one.shape[:2] == two.shape[:2]
        decoded.append(np.abs(one[..., :3].astype(int) - two) if same else np.nan)
        one, two = side[1](one, options.size), other[1](two, options.size)
        resized.append(np.abs(one[..., :3].astype(int) - two))
    return float(np.max(decoded)), float(np.mean(decoded)), float(np.mean(resized))


if __name__ == "__main__":
    main()
