"""Which pictures exist, which concepts they show, and which split each of them belongs to."""

import collections
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping

import embedded_pictures as pix
import embedded_sources as sources
import numpy as np
from jaxtyping import UInt8

PICTURE_FOLDERS = {
    "noto": (sources.NOTO, "package/img/google/64/"),
    "twemoji": (sources.TWEMOJI, "package/img/twitter/64/"),
    "fluent": (sources.FLUENT, "package/assets/"),
}
HELD_OUT_STYLE = "fluent"
# Pictures of one set whose premultiplied channels differ by less than this, in root mean square
# of 0..255, are redraws of one picture. Nothing lies between 0.6 and 3 in these sets.
SAME_PICTURE_RMS = 2.0


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji: what emojibase says of it."""

    key: str
    caption: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a concept (or of a word) in one style (or font)."""

    key: str
    style: str
    rgba: UInt8[np.ndarray, "64 64 4"]


def plain(text: str) -> str:
    """A caption for comparing: lower case, single spaces."""
    return " ".join(text.lower().split())


def concepts(labels: pathlib.Path) -> dict[str, Concept]:
    """Base emoji of emojibase by plain hexcode: no skin tones (nested there), no components
    (skin and hair swatches), no lone regional indicators (they have no group)."""
    names = sources.json_member(labels, "package/meta/groups.json")
    messages = sources.json_member(labels, "package/en/messages.json")["groups"]
    group_names = {group["key"]: group["message"] for group in messages}
    found = {}
    for entry in sources.json_member(labels, "package/en/data.json"):
        group = names["groups"].get(str(entry.get("group")))
        if group in (None, "component"):
            continue
        key = sources.plain_hexcode(entry["hexcode"])
        tags = tuple(sorted({plain(tag) for tag in entry.get("tags", ())}))
        subgroup = names["subgroups"][str(entry["subgroup"])]
        found[key] = Concept(key, plain(entry["label"]), tags, group_names[group], subgroup)
    return found


def emoji_pictures(known: Mapping[str, Concept], cache: pathlib.Path) -> list[Picture]:
    """Every set's picture of every known concept."""
    found = []
    for style, (package, folder) in PICTURE_FOLDERS.items():
        encoded = sources.pictures(sources.fetch(package, cache), folder)
        found += [
            Picture(key, style, pix.normalise(encoded[key])) for key in known if key in encoded
        ]
    return found


def same_pictures(pictures: list[Picture]) -> list[tuple[str, str]]:
    """Pairs of concepts with one picture: anywhere exactly, within a set up to rounding."""
    pairs = []
    by_print = collections.defaultdict(list)
    for picture in pictures:
        by_print[pix.fingerprint(picture.rgba)].append(picture.key)
    for keys in by_print.values():
        pairs += [(keys[0], key) for key in keys[1:]]
    for style in PICTURE_FOLDERS:
        pairs += near_pairs([p for p in pictures if p.style == style], SAME_PICTURE_RMS)
    return pairs


def near_pairs(pictures: list[Picture], limit: float) -> list[tuple[str, str]]:
    """Pairs of concepts whose pictures differ by less than `limit` levels in root mean square."""
    flat = np.stack([np.frombuffer(pix.fingerprint(p.rgba), np.uint8) for p in pictures])
    wide = flat.astype(np.float32)
    norms = (wide**2).sum(1)
    # The Gram matrix only proposes; float32 cancellation makes it too coarse to decide.
    rough = norms[:, None] + norms[None] - 2 * wide @ wide.T
    firsts, seconds = np.nonzero(np.triu(rough < (limit + 2) ** 2 * wide.shape[1], 1))
    pairs = []
    for i, j in zip(firsts.tolist(), seconds.tolist(), strict=True):
        gap = flat[i].astype(np.int64) - flat[j]
        if (gap**2).mean() < limit**2:
            pairs.append((pictures[i].key, pictures[j].key))
    return pairs


def roots(known: Mapping[str, Concept], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Joins concepts that share a caption or a picture: concept -> smallest key of its set."""
    parent = {key: key for key in known}

    def find(key: str) -> str:
        while parent[key] != key:
            key = parent[key]
        return key

    first_with: dict[str, str] = {}
    same_caption = [
        (key, first_with.setdefault(concept.caption, key)) for key, concept in known.items()
    ]
    for one, other in [*same_caption, *pairs]:
        low, high = sorted((find(one), find(other)))
        parent[high] = low
    return {key: find(key) for key in known}


def split_of(root: str, held_out_style: bool) -> str:
    """The split of a picture, from its concept's root alone: never by image."""
    bucket = int(hashlib.sha256(f"vlm_jax:{root}".encode()).hexdigest()[:8], 16) % 100
    if bucket < 10:
        return "unseen_concept"
    if held_out_style and bucket < 30:
        return "unseen_style"
    if held_out_style and bucket < 40:
        return "validation"
    return "train"


def words(known: Iterable[Concept], count: int) -> list[str]:
    """The `count` words of 2 to 8 ASCII letters that most concepts use in caption or tags."""
    uses: collections.Counter[str] = collections.Counter()
    for concept in known:
        if concept.group != "flags":  # their tags are country codes
            text = " ".join((concept.caption, *concept.tags))
            uses.update(set(re.findall(r"(?<![^\s-])[a-z]{2,8}(?![^\s-])", text)))
    return sorted(sorted(uses), key=uses.__getitem__, reverse=True)[:count]
