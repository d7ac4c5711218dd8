"""Near-duplicates: the hash is pHash, and the search finds what comparing all with all finds."""

import io

import numpy as np
import pytest
import scipy.fft
from PIL import Image, ImageEnhance

from vlm_jax.data import decoding, duplicates
from vlm_jax.data.duplicates import Signatures
from vlm_jax.data.emoji_records import load_records


def rgba(image):
    return np.asarray(image.convert("RGBA"))


def photo(seed, size=(120, 90)):
    """Broad patches of colour and finer ones, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse, fine = (rng.integers(0, 256, (n, n, 3), np.uint8) for n in (4, 12))
    layers = [Image.fromarray(a).resize(size, Image.Resampling.BICUBIC) for a in (coarse, fine)]
    return Image.blend(*layers, 0.4)


def emoji(style="noto"):
    """Pictures by caption, on white."""
    found = {}
    for record in load_records("emoji"):
        if record.style == style:
            picture = decoding.decode(record.image)
            white = Image.new("RGBA", picture.shape[1::-1], "white")
            found[record.caption] = Image.alpha_composite(white, Image.fromarray(picture))
    return found


def signatures(images):
    signed = b"".join(duplicates.sign(rgba(image)) for image in images)
    return duplicates.read(np.frombuffer(signed, np.uint8).reshape(-1, 1, duplicates.SIZE))


def test_the_hash_is_the_signs_of_the_lowest_frequencies_about_their_median():
    for seed in range(50):
        image = photo(seed)
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
        low = scipy.fft.dctn(grey, type=2)[:8, :8]
        expected = np.packbits(low > np.median(low)).tobytes()
        assert duplicates.sign(rgba(image))[:8] == expected


def test_a_picture_with_an_axis_of_symmetry_has_no_odd_frequencies():
    half = rgba(photo(3))
    image = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
    bits = np.unpackbits(np.frombuffer(duplicates.sign(rgba(image))[:8], np.uint8)).reshape(8, 8)
    # They are 0, and the others about as often below as above: one side of the median for all.
    assert len(set(bits[:, 1::2].ravel())) == 1


def jpeg(image, quality):
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


CHANGES = {
    "smaller": lambda image: image.resize((77, 60), Image.Resampling.BICUBIC),
    "larger": lambda image: image.resize((200, 171), Image.Resampling.BILINEAR),
    "jpeg": lambda image: jpeg(image, 50),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "all": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(0.92).resize((90, 80)), 75),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_of_a_picture_are_near_to_it(change):
    """Of 200 made pictures all are found; of 1,906 drawings, of few large shapes, nearly all."""
    pictures = [photo(seed) for seed in range(200)]
    changed = signatures([CHANGES[change](picture) for picture in pictures])
    found = duplicates.nearest(signatures(pictures), changed, 4)
    np.testing.assert_array_equal(found, np.arange(200))
    assert (duplicates.firsts(signatures(pictures), 4) < 0).all()


def test_drawings_of_different_things_are_rarely_near():
    drawings = list(emoji().values())
    known = signatures(drawings)
    found = duplicates.nearest(known, signatures(map(CHANGES["all"], drawings)), 4)
    assert (found >= 0).mean() > 0.95
    # Flags that differ in an emblem, men and women of one profession: 77 of 1.8 million pairs.
    assert (duplicates.firsts(known, 4) >= 0).mean() < 0.04


def test_plain_pictures_of_different_colours_are_not_near():
    colours = ["white", "black", "red", "lime", "blue", "yellow", "grey"]
    plain = signatures([Image.new("RGB", (40, 40), colour) for colour in colours])
    assert len(set(plain.hashes.ravel().tolist())) < len(colours)
    assert (duplicates.firsts(plain, 4) < 0).all()


def random_signatures(rng, count, pictures, spread):
    """Around some centres, so that there are chains: a near b and b near c, but not a near c."""
    hashes = rng.integers(0, 2**64, (count // 8, pictures), dtype=np.uint64)
    hashes = hashes[rng.integers(0, len(hashes), count)]
    for _ in range(spread):
        bits = np.uint64(1) << rng.integers(0, 64, hashes.shape, dtype=np.uint64)
        hashes ^= np.where(rng.random(hashes.shape) < 0.7, bits, np.uint64(0))
    colours = rng.integers(0, 36, (count, pictures, 48)).astype(np.uint8)
    return Signatures(hashes, colours)


def near(one, i, other, j, bits):
    """The definition, for one pair."""
    apart = [int(a ^ b).bit_count() for a, b in zip(one.hashes[i], other.hashes[j])]
    colour = np.abs(one.colours[i].astype(int) - other.colours[j].astype(int))
    return max(apart) <= bits and colour.max() <= duplicates.MAX_COLOUR


@pytest.mark.parametrize("bits, pictures", [(0, 1), (3, 1), (3, 2), (6, 1)])
def test_the_search_finds_what_comparing_all_with_all_finds(monkeypatch, bits, pictures):
    monkeypatch.setattr(duplicates, "_FEW", 32)  # so that halves are divided again
    made = random_signatures(np.random.default_rng(bits), 300, pictures, bits + 1)
    expected, kept = [], []
    for i in range(300):
        owner = next((k for k in kept if near(made, k, made, i, bits)), -1)
        expected.append(owner)
        kept += [i] * (owner < 0)
    assert 20 < len(kept) < 299
    assert duplicates.firsts(made, bits).tolist() == expected
    known, asked = made.take(slice(150)), made.take(slice(150, None))
    first = [
        next((k for k in range(150) if near(known, k, asked, i, bits)), -1) for i in range(150)
    ]
    assert duplicates.nearest(known, asked, bits).tolist() == first


@pytest.mark.parametrize("count", [10, 10**6])
def test_hashes_that_differ_anywhere_in_few_bits_agree_in_some_set_of_blocks(count):
    rng = np.random.default_rng(0)
    for bits in range(13):
        masks = np.array(list(duplicates._masks(bits, count)))
        assert len(masks) == len(set(masks.tolist()))
        for _ in range(50):
            flipped = sum(1 << int(b) for b in rng.permutation(64)[:bits])
            assert any(int(mask) & flipped == 0 for mask in masks)
