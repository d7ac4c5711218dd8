"""One decode for whatever is called a picture: its pixels, or a stable reason why there are none.

A file may claim anything. What its header says is checked before Pillow sees it, so that a small
file costs neither much memory nor much time: sizes before anything is allocated (WebP and GIF
readers allocate when they open), and how many pieces a header has before they are walked through.

Pillow reads all formats. Of a JPEG of 500 x 375 it made RGB in 1.55 ms, simplejpeg in 0.92 and
OpenCV in 1.00, the same pixels; with Pillow's filter to 384 x 384 that was 4.30 and 3.75 ms, so a
second decoder for one format gains 13 %. OpenCV's filter is much faster (1.30 in all), but gives
other pixels than the published preprocessors; `draft` reduces nothing at that size, and where it
does it changes pixels (benchmarks/decode_images.py: medians of CPU time on a busy Xeon core).
"""

import dataclasses
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

MAX_PIXELS = 50_000_000
MAX_SIDE = 16_384
# Of a file. A photograph of MAX_PIXELS as a JPEG has half of it; readers take time by the byte.
MAX_BYTES = 64 * 2**20

# Chunks, blocks or reads of one file. A PNG of MAX_BYTES has 8,192 chunks of the usual size.
_MAX_PIECES = 100_000
# Each scan of a progressive JPEG goes over all its pixels; encoders write about ten. The cost of
# many is known: libjpeg-turbo.org/pmwiki/uploads/About/TwoIssueswiththeJPEGStandard.pdf
_MAX_SCANS = 100
# A segment of a JPEG holds 64 KiB and Pillow joins those of EXIF one by one.
_MAX_EXIF_SEGMENTS = 16
_MAX_EXIF = 2**20
# Of a TIFF: offsets and lengths of strips or tiles are most. Python makes 36 bytes of each.
_MAX_NUMBERS = 2**19

# Filters are the process's, and to change them for a while is not safe beside other threads
# (python/cpython#91505). Broken EXIF or animation, of which these warn, is ignored here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.\w+Plugin")


class BadImage(Exception):
    """A picture that cannot be used.

    Attributes:
      reason: a stable word that is counted:
        missing        no such file, or it may not be read
        not_a_file     a folder, a pipe or a device
        empty          no bytes, or no pixels
        not_an_image   none of FORMATS
        too_large      more than MAX_BYTES, MAX_PIXELS or MAX_SIDE
        truncated      its end is missing
        corrupt        it contradicts itself
        unsupported    of a kind for which no pixels are defined here
        no_such_image  a sample refers to a picture that it does not have
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


Picture = bytes | os.PathLike | str | np.ndarray | Image.Image


def decode(image: Picture) -> UInt8[np.ndarray, "h w 4"]:
    """RGBA pixels of a picture; see `picture`.

    Raises:
      BadImage: see its reasons.
    """
    return np.asarray(picture(image).convert("RGBA"))


def picture(image: Picture) -> Image.Image:
    """Encoded bytes, a file, or a picture already in memory: upright, of mode RGB or RGBA.

    Animations give their first frame, files of several pages their first page. 16-bit grey is
    scaled to 8 bits (Pillow would clip it). Colour profiles are not applied.

    Raises:
      BadImage: see its reasons.
    """
    image = opened(image)
    try:
        image.load()
    except Exception as error:
        raise _bad(error) from error
    try:
        return _coloured(_upright(image))
    except (ValueError, OSError) as error:
        raise BadImage("unsupported", f"pixels of mode {image.mode}: {error}") from error


def opened(image: Picture) -> Image.Image:
    """A picture whose header is read and whose size is no bomb; no pixel of a file is decoded yet.

    Raises:
      BadImage: see its reasons.
    """
    if isinstance(image, np.ndarray):
        image = _of_array(image)
    if not isinstance(image, Image.Image):
        image = _open(read(image))
    _check_size(*image.size)
    return image


def size(image: Image.Image) -> tuple[int, int]:
    """Height and width that an opened picture will have upright."""
    width, height = image.size
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def check(image: bytes | os.PathLike | str) -> None:
    """Reads no more than what a file claims, which shows most of what is wrong with it.

    Raises:
      BadImage: see its reasons.
    """
    opened(image)


def _of_array(array: np.ndarray) -> Image.Image:
    try:
        return Image.fromarray(array)
    except (TypeError, ValueError) as error:
        detail = f"an array of {array.dtype} {list(array.shape)}"
        raise BadImage("unsupported", f"{detail}: expected uint8 [h, w, 3 or 4]") from error


def read(image: bytes | os.PathLike | str) -> bytes:
    """The bytes of a picture, nothing of which is looked at.

    Raises:
      BadImage: it is missing, not_a_file, empty or too_large.
    """
    size = len(image) if isinstance(image, bytes) else _size_of_file(image)
    if not size:
        raise BadImage("empty", "no bytes")
    if size > MAX_BYTES:
        raise BadImage("too_large", f"{size} bytes, more than {MAX_BYTES}")
    if isinstance(image, bytes):
        return image
    try:
        with open(image, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage("missing", str(error)) from error


def _size_of_file(path: os.PathLike | str) -> int:
    """Asked before the file is opened: to open a pipe waits for its other end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BadImage("missing", str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise BadImage("not_a_file", os.fsdecode(path))
    return found.st_size


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limit = f"{MAX_PIXELS} pixels and {MAX_SIDE} a side"
        raise BadImage("too_large", f"{width} x {height}, more than {limit}")
    if not width * height:
        raise BadImage("empty", f"{width} x {height}")


def _open(data: bytes) -> Image.Image:
    """The picture behind its header; no pixel is decoded yet."""
    for kind in FORMATS.values():
        if data.startswith(kind.magic):
            break
    else:
        raise BadImage("not_an_image", f"none of {', '.join(FORMATS)}")
    try:
        image = kind.reader(_Bytes(kind.check(data)))
    except Exception as error:  # plugins raise whatever their parser stumbles over
        raise _bad(error) from error
    if any(tile[0] in Image.DECODERS for tile in image.tile):
        raise BadImage("unsupported", "a compression that Pillow reads in Python, byte by byte")
    return image


def _bad(error: Exception) -> BadImage:
    if isinstance(error, BadImage):
        return error
    said = str(error)
    for word, reason in _SAID.items():
        if word in said.lower():
            return BadImage(reason, said)
    return BadImage("truncated" if isinstance(error, EOFError) else "corrupt", said)


# What Pillow's messages say, by the reason they stand for.
_SAID = {
    "truncated": "truncated",
    "cannot handle": "unsupported",
    "unsupported": "unsupported",
    "unknown pixel mode": "unsupported",
}


class _Bytes(io.BytesIO):
    """Bytes that are read in so many pieces at most."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._left = _MAX_PIECES

    def read(self, size: int | None = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise BadImage("corrupt", f"it is read in more than {_MAX_PIECES} pieces")
        return super().read(size)


def _check_png(data: bytes) -> bytes:
    """The chunks that say pixels, whole and with the right checksum; others may be bombs."""
    kept, kinds, at, view = [data[:8]], set(), 8, memoryview(data)
    for _ in range(_MAX_PIECES):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        if not kind.isalpha():
            raise BadImage("corrupt", f"a PNG chunk named {kind}")
        start, at = at, at + 12 + length
        if at > len(data):
            break
        if kind in _PNG_CHUNKS and not (kind == b"eXIf" and length > _MAX_EXIF):
            if zlib.crc32(view[start + 4 : at - 4]) != int.from_bytes(view[at - 4 : at]):
                raise BadImage("corrupt", f"checksum of the PNG chunk {kind.decode()}")
            # Before the pixels, where it is read with the header.
            kept.insert(2 if kind == b"eXIf" else len(kept), view[start:at])
            kinds.add(kind)
        if kind == b"IEND":
            if data[25] == 3 and b"PLTE" not in kinds:
                raise BadImage("corrupt", "an indexed PNG without a palette")
            return b"".join(kept)
    else:
        raise BadImage("corrupt", f"more than {_MAX_PIECES} PNG chunks")
    raise BadImage("truncated", "no end of the PNG")


_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")


def _check_jpeg(data: bytes) -> bytes:
    """Counts what costs time, up to the end of the picture; what follows may be a film."""
    at, scans, segments = 2, 0, 0
    for _ in range(_MAX_PIECES):
        marker = _JPEG_MARKER.search(data, at)
        if marker is None or marker[0] == b"\xff\xd9":
            break
        at = marker.end()
        if marker[0] not in _JPEG_BARE:
            scans += marker[0] == b"\xff\xda"
            segments += data.startswith(b"Exif\0\0", at + 2)
            at += int.from_bytes(data[at : at + 2])
    else:
        raise BadImage("corrupt", f"more than {_MAX_PIECES} segments")
    if marker is None or not scans:
        raise BadImage("truncated", "no end of the JPEG, or no scan before it")
    if scans > _MAX_SCANS or segments > _MAX_EXIF_SEGMENTS:
        raise BadImage("corrupt", f"a JPEG of {scans} scans and {segments} segments of EXIF")
    return data


# Zeros that stand behind a byte 0xff of the pixels, and restarts within them, are no markers.
_JPEG_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")
_JPEG_BARE = (b"\xff\x01", b"\xff\xd8")  # without a length


def _check_webp(data: bytes) -> bytes:
    if data[8:12] != b"WEBP":
        raise BadImage("not_an_image", "RIFF, but not WebP")
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise BadImage("truncated", "shorter than the WebP says")
    # Sizes stand elsewhere in a lossy, a lossless and an extended file.
    kind, small = data[12:16], int.from_bytes(data[21:25], "little")
    width, height = struct.unpack_from("<HH", data, 26)
    if kind == b"VP8 ":
        _check_size(width & 0x3FFF, height & 0x3FFF)
    elif kind == b"VP8L":
        _check_size((small & 0x3FFF) + 1, ((small >> 14) & 0x3FFF) + 1)
    else:
        _check_size(*(int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27)))
    return data


def _check_gif(data: bytes) -> bytes:
    """Finds the first frame, which makes the picture larger where it is larger."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    for _ in range(_MAX_PIECES):
        kind = data[at : at + 1]
        if kind == b",":
            left, top, columns, rows = struct.unpack_from("<4H", data, at + 1)
            _check_size(max(width, left + columns), max(height, top + rows))
            return data
        if kind not in (b"!", b"\0"):
            break
        at += 2 if kind == b"!" else 1
        at = _after_blocks(data, at) if kind == b"!" else at
    ended = at >= len(data)
    raise BadImage("truncated" if ended else "corrupt", "no frame in the GIF")


def _after_blocks(data: bytes, at: int) -> int:
    for _ in range(_MAX_PIECES):
        if at >= len(data) or not data[at]:
            return at + 1
        at += 1 + data[at]
    raise BadImage("corrupt", f"an extension of more than {_MAX_PIECES} GIF blocks")


def _check_tiff(data: bytes) -> bytes:
    """How many numbers the tags hold, and how large a tile is: Pillow makes both in memory."""
    order = "<" if data.startswith(b"II") else ">"
    (first,) = struct.unpack_from(order + "I", data, 4)
    numbers, found, folders = 0, {}, [first]
    for folder in folders:
        for tag, kind, count, raw in _tiff_tags(data, order, folder):
            numbers += 0 if kind in _TIFF_BYTES else count
            if folder == first and tag in (*_TIFF_SIDES, *_TIFF_FOLDERS):
                if kind not in _TIFF_INTEGERS or count != 1:
                    raise BadImage("corrupt", f"the TIFF tag {tag} is not one integer")
                (found[tag],) = struct.unpack_from(order + _TIFF_INTEGERS[kind], raw)
                folders += [found[tag]] if tag in _TIFF_FOLDERS and len(folders) < 9 else []
    if numbers > _MAX_NUMBERS:
        raise BadImage("corrupt", f"TIFF tags of {numbers} numbers, more than {_MAX_NUMBERS}")
    for side, tile in (_TIFF_SIDES[:2], _TIFF_SIDES[2:]):
        if found.get(tile, 0) > found.get(side, 0) + 1024:
            raise BadImage("corrupt", f"a TIFF of tiles of {found[tile]}, larger than itself")
    return data


def _tiff_tags(data: bytes, order: str, at: int) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, count, value or its offset) of as many entries as there are."""
    if at + 2 > len(data):
        return iter(())
    (count,) = struct.unpack_from(order + "H", data, at)
    entries = data[at + 2 : at + 2 + 12 * count]
    return struct.iter_unpack(order + "HHI4s", entries[: len(entries) // 12 * 12])


_TIFF_BYTES = (1, 2, 7)  # types that Pillow keeps as bytes
_TIFF_INTEGERS = {3: "H", 4: "I", 13: "I"}
_TIFF_SIDES = (256, 322, 257, 323)  # of the picture and of a tile, across and down
_TIFF_FOLDERS = (34665, 34853, 40965)  # EXIF, GPS and interoperability


@dataclasses.dataclass(frozen=True)
class _Format:
    magic: bytes | tuple[bytes, ...]
    reader: Callable[[io.BytesIO], Image.Image]
    check: Callable[[bytes], bytes] = bytes


# Readers that neither start other programs (EPS does), nor work in Python (PPM does), nor have
# more than pixels to say.
FORMATS = {
    "PNG": _Format(b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile, _check_png),
    "JPEG": _Format(b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile, _check_jpeg),
    "WEBP": _Format(b"RIFF", WebPImagePlugin.WebPImageFile, _check_webp),
    "GIF": _Format((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile, _check_gif),
    "BMP": _Format(b"BM", BmpImagePlugin.BmpImageFile),
    "TIFF": _Format((b"II*\0", b"MM\0*"), TiffImagePlugin.TiffImageFile, _check_tiff),
}


def _orientation(image: Image.Image) -> int:
    """As its EXIF or XMP says, 1 = upright; Pillow turns a TIFF itself."""
    said = [image.info[key] for key in ("exif", "xmp") if image.info.get(key)]
    if not said or max(map(len, said)) > _MAX_EXIF or image.format == "TIFF":
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF says nothing about the pixels (huggingface/datasets#7668)
        return 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    if turn is None:
        return image
    image = image.transpose(turn)
    for said in ("exif", "xmp"):  # which hold no longer
        image.info.pop(said, None)
    return image


def _coloured(image: Image.Image) -> Image.Image:
    """Of mode RGB where nothing can be transparent, else RGBA."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("numbers without a known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _of_16_bits(image)
    if image.mode in ("RGB", "L", "CMYK", "YCbCr", "HSV", "LAB") and not _keyed(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode in ("CMYK", "YCbCr", "HSV", "LAB"):  # directly, LAB would come out wrong
        image = image.convert("RGB")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _keyed(image: Image.Image) -> bool:
    """Whether one colour stands for transparency."""
    return image.info.get("transparency") is not None


def _of_16_bits(image: Image.Image) -> Image.Image:
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65_535:
        raise ValueError("integers beyond 16 bits")
    shown = Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return shown.convert("RGBA")
    alpha = Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (shown, shown, shown, alpha))
