"""ATTRIBUTION.md and DATASHEET.md of the embedded data, filled with what the build found."""

import collections
import pathlib

import embedded_sources as sources
import embedded_words as lettering
from embedded_concepts import (
    HELD_OUT_STYLE,
    PICTURE_FOLDERS,
    SAME_PICTURE_RMS,
    Picture,
    near_pairs,
)

UNICODE_LICENCE = pathlib.Path(__file__).parent / "licences" / "unicode-v3.txt"
ALIKE_RMS = 12.0  # levels of 0..255: near-copies such as "guard" and "man guard"
SPLITS = ("train", "validation", "unseen_style", "unseen_concept")

ATTRIBUTION = """\
# Where the embedded data comes from

Written by `tools/build_embedded.py`. Every picture was changed in the same way: converted to RGBA,
padded to a square, resized to 64x64 where it was larger, and saved as PNG; the pictures themselves
were not redrawn. Labels were lower-cased, and tags that equal a held-out caption were removed.

| Part | Source | Version | Licence |
|---|---|---|---|
| style `noto` | Noto Emoji by Google, from npm `{noto.name}` | {noto.version} | Apache-2.0 |
| style `twemoji` | Twemoji by Twitter, Inc and other contributors, from npm `{twemoji.name}` \
| {twemoji.version} | CC-BY-4.0 |
| style `fluent` | Fluent Emoji by Microsoft, from npm `{fluent.name}` | {fluent.version} | MIT |
| captions, tags, groups | Unicode CLDR, from npm `{labels.name}` | {labels.version} \
| MIT, Unicode-3.0 |
| words | drawn with the DejaVu fonts that matplotlib ships; no font is included | 2.37 \
| Bitstream Vera, Arev |

None of these authors endorses this project.

## Noto Emoji

Copyright Google LLC. Licensed under the Apache License, Version 2.0; a copy is the file LICENSE of
this repository, also at <https://www.apache.org/licenses/LICENSE-2.0>. Project:
<https://github.com/googlefonts/noto-emoji>; its flags come from region-flags, which are in the
public domain or otherwise exempt from copyright.

## Twemoji

Copyright 2020 Twitter, Inc and other contributors. Graphics licensed under Creative Commons
Attribution 4.0 International, <https://creativecommons.org/licenses/by/4.0/>. Project:
<https://github.com/jdecked/twemoji>. Changes: as above.

## The npm packages of Noto and Twemoji

{datasource}

## Fluent Emoji

Project: <https://github.com/microsoft/fluentui-emoji>; packaged by LobeHub,
<https://github.com/lobehub/fluent-emoji>. The flags of this package are drawn like Noto's.

MIT License

Copyright (c) Microsoft Corporation.
Copyright (c) 2023 LobeHub

{mit}

## emojibase-data

{emojibase}

## Unicode CLDR (the labels and tags in emojibase-data)

{unicode}

## DejaVu fonts

{dejavu}
"""

DATASHEET = """\
# Datasheet of the embedded data

Written by `tools/build_embedded.py`; sources and licences are in `ATTRIBUTION.md`.

**What.** {emoji_count:,} pictures of {concept_count:,} emoji in three artists' styles, and
{word_count:,} pictures of {lexicon_count} English words in {font_count} fonts: 64x64 RGBA PNG with
real transparency. **Why.** To train and judge small vision-language models on real drawings without
any download. **Not for** claims about photographs, or about people: people are drawn symbols with
CLDR names.

**Records** are msgpack maps in ArrayRecord shards (`manifest.json`: records, bytes, sha256): `key`
(hexcode without FE0F), `root`, `style`, `caption` (CLDR short name, lower case), `tags`, `group`,
`subgroup`, `split`, `image`. Their order is a hash of key and style: any prefix is a fair sample.

**Concepts** are base emoji: no skin tones, components or lone regional indicators. Concepts that
share a caption or a picture (equal premultiplied pixels in any two sets, or within a set equal up
to rounding: below {same_rms:.0f} of 255 levels in root mean square) have one `root`, the smallest
of their keys, and one split. {joined} concepts have another's root: families of which Twemoji draws
one icon, and flags of territories.

**Splits** follow from sha256 of `vlm_jax:` and the root, never from a picture: 10 % of the roots
are `unseen_concept` in every style; of 20 % the {held_out_style} picture is `unseen_style`, of 10 %
`validation`, while `train` shows their other styles; the rest is `train`. A concept without
{held_out_style} picture cannot be the middle two. Words are split alike with the font
`{held_out_font}`; a word that is an emoji's caption follows that emoji. No caption of
`unseen_concept` is a caption or tag elsewhere, except that a held-out word to read may be the tag
of an emoji. Choices between models are made on `validation` only.

| Pictures (of which flags) | {split_names} |
|---|{rule}|
{rows}

Words: {word_rows}.

**Flags** are group `flags`: {flags}. The {held_out_style} package's
flags are Noto's design, so a score on `unseen_style` is also given without them.

**Known weaknesses.** Pictures may be near-copies without being equal, mostly gender variants
("guard", "man guard"): {alike} pairs of different roots within a set differ by less than
{alike_rms:.0f} levels in root mean square, {alike_apart} of them with one side in `unseen_concept`
and the other not. One picture can have several captions (joined concepts), so no model reaches
100 %. Captions are English and reflect Unicode's choice of symbols. Country flags and religious
symbols are included as Unicode has them.
"""


def attribution(cache: pathlib.Path) -> str:
    """The licence or required notice of every source."""
    archives = {package: sources.fetch(package, cache) for package in sources.PACKAGES}
    mit = sources.licence(archives[sources.LABELS])
    return ATTRIBUTION.format(
        noto=sources.NOTO,
        twemoji=sources.TWEMOJI,
        fluent=sources.FLUENT,
        labels=sources.LABELS,
        datasource=sources.licence(archives[sources.NOTO]).strip(),
        mit=mit[mit.index("Permission is hereby granted") :].strip(),
        emojibase=mit.strip(),
        unicode=UNICODE_LICENCE.read_text().strip(),
        dejavu=lettering.licence().strip(),
    )


def datasheet(emoji: list[dict], words: list[dict], pictures: list[Picture]) -> str:
    """The counts and the warnings that a user of the data needs."""
    root = {record["key"]: record["root"] for record in emoji}
    alike = alike_roots(pictures, root)
    held_out = {record["root"] for record in emoji if record["split"] == "unseen_concept"}
    return DATASHEET.format(
        emoji_count=len(emoji),
        concept_count=len(root),
        word_count=len(words),
        lexicon_count=len({record["key"] for record in words}),
        font_count=len(lettering.FONTS),
        joined=sum(key != value for key, value in root.items()),
        held_out_style=HELD_OUT_STYLE,
        same_rms=SAME_PICTURE_RMS,
        held_out_font=lettering.HELD_OUT_FONT,
        split_names=" | ".join(SPLITS),
        rule="|".join(["---:"] * len(SPLITS)),
        rows="\n".join(count_row(style, emoji) for style in PICTURE_FOLDERS),
        word_rows=", ".join(f"{split_count(words, split)} {split}" for split in SPLITS),
        flags=", ".join(f"{len(flags(emoji, style))} {style}" for style in PICTURE_FOLDERS),
        alike=len(alike),
        alike_rms=ALIKE_RMS,
        alike_apart=sum(len(pair & held_out) == 1 for pair in alike),
    )


def alike_roots(pictures: list[Picture], root: dict[str, str]) -> set[frozenset[str]]:
    """Pairs of different roots with near-copies in at least one set."""
    pairs = set()
    for style in PICTURE_FOLDERS:
        mine = [picture for picture in pictures if picture.style == style]
        pairs |= {frozenset((root[a], root[b])) for a, b in near_pairs(mine, ALIKE_RMS)}
    return {pair for pair in pairs if len(pair) == 2}


def flags(emoji: list[dict], style: str) -> list[dict]:
    return [r for r in emoji if r["style"] == style and r["group"] == "flags"]


def split_count(records: list[dict], split: str) -> int:
    return sum(record["split"] == split for record in records)


def count_row(style: str, emoji: list[dict]) -> str:
    """One row of the split table."""
    mine = [record for record in emoji if record["style"] == style]
    flagged = collections.Counter(record["split"] for record in flags(emoji, style))
    cells = [f"{split_count(mine, split):,} ({flagged[split]})" for split in SPLITS]
    return f"| {style} | " + " | ".join(cells) + " |"
