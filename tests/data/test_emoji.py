"""The embedded data: honest splits, well-formed Examples, true and unpredictable answers."""

import collections
import functools
import hashlib
import importlib.util
import io
import json
import pathlib
import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from vlm_jax.data import emoji, scenes
from vlm_jax.data.emoji_records import Record, embedded, load_records
from vlm_jax.data.example import Example, ImageRef
from vlm_jax.errors import ConfigError

TOOLS = pathlib.Path(__file__).parents[2] / "tools"
CORPORA = ("emoji", "words")
SAMPLE = 400


@functools.cache
def records() -> tuple[Record, ...]:
    return tuple(r for corpus in CORPORA for r in load_records(corpus))


@functools.cache
def examples(split: str, kind: str) -> list[Example]:
    source = emoji.EmojiSource(split, kind)
    return [source[i] for i in range(min(len(source), SAMPLE))]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(embedded("tokenizer.json").read_text())


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGBA"
        return np.asarray(image)


def premultiplied(data: bytes) -> bytes:
    rgba = decode(data).astype(np.float32)
    return np.rint(
        np.concatenate([rgba[..., :3] * rgba[..., 3:] / 255, rgba[..., 3:]], -1)
    ).tobytes()


def plain(text: str) -> str:
    return " ".join(text.lower().split())


def question(example: Example) -> str:
    return "".join(part for part in example.turns[0].parts if isinstance(part, str))


def answer(example: Example) -> str:
    return example.turns[-1].parts[0]


def unseen_captions() -> set[str]:
    return {plain(r.caption) for r in records() if r.split == "unseen_concept"}


# the data


def test_every_file_is_the_one_the_manifest_names():
    manifest = json.loads(embedded("manifest.json").read_text())
    rows = [*manifest["shards"], {"name": "tokenizer.json", **manifest["tokenizer"]}]
    for row in rows:
        data = embedded(row["name"]).read_bytes()
        assert len(data) == row["bytes"] <= 15_000_000
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
    assert sum(row["records"] for row in manifest["shards"]) == len(records())


def test_no_caption_of_an_unseen_concept_occurs_in_another_split():
    hidden = unseen_captions()
    emoji_captions = {plain(r.caption) for r in load_records("emoji")}
    hidden_emoji = hidden & emoji_captions
    assert len(hidden_emoji) > 200
    for record in records():
        if record.split != "unseen_concept":
            assert plain(record.caption) not in hidden
            assert not hidden_emoji & {plain(tag) for tag in record.tags}


def test_no_picture_occurs_in_two_splits():
    for fingerprint in (lambda data: data, premultiplied):
        splits = collections.defaultdict(set)
        for record in records():
            splits[fingerprint(record.image)].add(record.split)
        assert {len(names) for names in splits.values()} == {1}


def test_a_split_follows_from_the_root_and_the_held_out_style_alone():
    for record in records():
        digest = hashlib.sha256(f"vlm_jax:{record.root}".encode()).hexdigest()
        bucket = int(digest[:8], 16) % 100
        held_out = record.style in ("fluent", "serif-italic")
        want = "train"
        if bucket < 10:
            want = "unseen_concept"
        elif bucket < 40 and held_out:
            want = "unseen_style" if bucket < 30 else "validation"
        assert record.split == want


def test_a_held_out_style_shows_only_concepts_that_train_shows_otherwise():
    shown = {r.key for r in records() if r.split == "train"}
    for record in records():
        assert (record.key in shown) == (record.split != "unseen_concept")


def test_pictures_are_64_pixel_rgba_with_real_transparency():
    alphas = [decode(r.image)[..., 3] for r in records()]
    assert {a.shape for a in alphas} == {(64, 64)}
    assert np.mean([a.min() == 0 for a in alphas]) > 0.95


def test_no_emoji_is_a_skin_tone_a_component_or_a_lone_regional_indicator():
    for record in load_records("emoji"):
        points = [int(part, 16) for part in record.key.split("-")]
        assert not any(0x1F3FB <= p <= 0x1F3FF for p in points)
        assert not (len(points) == 1 and 0x1F1E6 <= points[0] <= 0x1F1FF)
        assert 0xFE0F not in points


# how pictures are made


@pytest.fixture
def pictures(monkeypatch):
    """tools/embedded_pictures.py, which is not part of the package."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("pictures", TOOLS / "embedded_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def test_resizing_multiplies_by_alpha_first(pictures):
    # Blue inside, transparent white outside; straight-alpha resizing would leave a pale rim.
    rgba = np.full((256, 256, 4), (255, 255, 255, 0), np.uint8)
    rgba[50:201, 61:190] = (0, 0, 255, 255)
    small = pictures.normalise(encoded(Image.fromarray(rgba), format="PNG")).astype(int)
    visible = small[..., 3] > 0
    assert (small[visible][:, :3] == (0, 0, 255)).all()
    assert not small[~visible].any()
    # and what shows on black is what resizing the premultiplied blue channel gives
    blue = Image.fromarray(np.float32(rgba[..., 2]) * np.float32(rgba[..., 3] / 255))
    want = np.asarray(blue.resize((64, 64), Image.Resampling.LANCZOS)).clip(0, 255)
    assert np.abs(small[..., 2] * small[..., 3] / 255 - want).max() <= 1


def test_palettes_grey_with_alpha_and_odd_sizes_come_out_right(pictures):
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.paste(0, (0, 0, 64, 8))
    got = pictures.normalise(encoded(palette, format="PNG", transparency=0))
    assert not got[:8].any()
    assert (got[8:] == (10, 200, 30, 255)).all()

    grey = Image.new("LA", (64, 64), (90, 128))
    got = pictures.normalise(encoded(grey, format="PNG"))
    assert (got == (90, 90, 90, 128)).all()

    tall = Image.new("RGBA", (256, 264), (200, 100, 50, 255))
    got = pictures.normalise(encoded(tall, format="WEBP", lossless=True))
    assert (got[:, 4:-4] == (200, 100, 50, 255)).all()  # 8 of 264 pixels are padding: 1 of 64
    assert got[:, 0, 3].max() < 255


def test_normalising_a_stored_picture_changes_nothing(pictures):
    for record in records()[::200]:
        np.testing.assert_array_equal(pictures.normalise(record.image), decode(record.image))


# the examples


@pytest.mark.parametrize("split", emoji.SPLITS)
@pytest.mark.parametrize("kind", emoji.KINDS)
def test_every_kind_yields_well_formed_examples_in_every_split(split, kind):
    source = emoji.EmojiSource(split, kind)
    made = examples(split, kind)
    assert len(source) >= 60
    assert len({e.key for e in made}) == len(made)
    for example in made:
        assert example.source == kind
        assert [turn.role for turn in example.turns] == ["user", "assistant"]
        shown = [p for p in example.turns[0].parts if isinstance(p, ImageRef)]
        assert [ref.index for ref in shown] == list(range(len(example.images)))
        assert list(example.turns[0].parts[: len(shown)]) == shown
        assert len(example.images) == (2 if kind == "compare" else 1)
        assert len(example.image_texts) in (0, len(example.images))
        assert bool(question(example)) == (kind != "caption")
        assert "{" not in question(example)
        assert answer(example) == answer(example).strip() == answer(example).lower() != ""
        assert set(example.meta) >= {"flag", "concept", "style"}
        assert answer(example) in example.meta.get("options", [answer(example)])
        for data in example.images:
            assert decode(data).shape == (64, 64, 4)


@pytest.mark.parametrize("kind", emoji.KINDS)
def test_a_source_is_a_pure_function_of_index_and_seed(kind):
    source = emoji.EmojiSource("unseen_style", kind)
    again = pickle.loads(pickle.dumps(emoji.EmojiSource("unseen_style", kind)))
    assert [source[i] for i in (5, 0, 5)] == [again[5], again[0], again[5]]
    drawn = [source.example(3, np.random.default_rng(s)) for s in (1, 1, 2, 3, 4, 5, 6)]
    assert drawn[0] == drawn[1]
    assert {e.meta["concept"] for e in drawn} == {source[3].meta["concept"]}
    if kind != "caption":
        assert len({question(e) for e in drawn}) > 1
        other = emoji.EmojiSource("unseen_style", kind, seed=1)
        assert [question(source[i]) for i in range(20)] != [question(other[i]) for i in range(20)]


@pytest.mark.parametrize("kind", emoji.KINDS)
def test_held_out_pictures_are_what_a_held_out_split_asks_about(kind):
    for split in emoji.SPLITS[1:]:
        pictures = {r.image for r in records() if r.split == split}
        trained = {r.image for r in records() if r.split == "train"}
        for example in examples(split, kind):
            if kind == "scene":
                assert not trained & set(example.images)
            elif kind == "compare" and split != "unseen_concept":
                assert sum(data in pictures for data in example.images) == 1
                assert sum(data in trained for data in example.images) == 1
            else:
                assert set(example.images) <= pictures


def test_training_text_never_names_an_unseen_concept():
    hidden = unseen_captions()
    for kind in emoji.KINDS:
        for example in examples("train", kind):
            named = {answer(example), *example.image_texts, *example.meta.get("captions", ())}
            named |= {*example.meta.get("options", ()), example.meta.get("named", "")}
            assert not hidden & set(map(plain, named))


def test_the_tokenizer_is_trained_on_the_questions_but_on_no_unseen_concept(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("tok", TOOLS / "embedded_tokenizer.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    texts = tool.training_texts([vars(record) for record in records()])
    assert not unseen_captions() & set(map(plain, texts))
    assert tool.train(texts).get_vocab() == tokenizer().get_vocab()


# answers


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def many(split: str, kind: str, count: int) -> list[Example]:
    """`count` Examples of a split, with fresh questions once its anchors are used up."""
    source = emoji.EmojiSource(split, kind)
    rng = np.random.default_rng(0)
    return [source.example(i % len(source), rng) for i in range(count)]


# Shares of 3,000 draws have a standard deviation below 0.01; 0.04 is more than four of them.
def test_yes_and_no_are_balanced_and_half_the_wrong_names_are_close():
    subgroups = collections.defaultdict(set)
    for record in load_records("emoji"):
        subgroups[record.caption].add(record.subgroup)
    for split in emoji.SPLITS:
        made = many(split, "yes_no", 3000)
        assert abs(share([answer(e) == "yes" for e in made]) - 0.5) < 0.04
        wrong = [e for e in made if answer(e) == "no"]
        for example in made:
            assert (example.meta["named"] == example.image_texts[0]) == (answer(example) == "yes")
            assert example.meta["named"] in question(example)
        close = [bool(subgroups[e.meta["named"]] & subgroups[e.image_texts[0]]) for e in wrong]
        assert 0.4 < share(close) < 0.65


def test_choices_hold_the_answer_once_in_any_place():
    for split in emoji.SPLITS:
        made = many(split, "choice", 3000)
        places = collections.Counter()
        for example in made:
            options = example.meta["options"]
            assert len(set(options)) == 4
            assert "; ".join(options) in question(example)
            places[options.index(answer(example))] += 1
        assert all(abs(places[i] / 3000 - 0.25) < 0.04 for i in range(4))


def test_wrong_names_are_drawn_like_right_ones_so_text_alone_says_nothing():
    # Names of concepts that train shows twice must not be answered "no" more often than others.
    shown = collections.Counter(r.caption for r in load_records("emoji") if r.split == "train")
    for times in (2, 3):
        made = [e for e in many("train", "yes_no", 9000) if shown[e.meta["named"]] == times]
        assert abs(share([answer(e) == "yes" for e in made]) - 0.5) < 0.04


def test_comparisons_are_balanced_and_true():
    shown = {r.image: r for r in load_records("emoji")}  # joined concepts share a picture
    for split in emoji.SPLITS:
        made = many(split, "compare", 3000)
        for form, right in (("same", "yes"), ("which", "first")):
            mine = [e for e in made if e.meta["form"] == form]
            assert abs(share([answer(e) == right for e in mine]) - 0.5) < 0.05
        for example in made:
            one, other = (shown[data] for data in example.images)
            assert one.style != other.style
            if example.meta["form"] == "same":
                assert (one.root == other.root) == (answer(example) == "yes")
            else:
                assert one.root != other.root
                assert example.image_texts[emoji.ORDINALS.index(answer(example))] in question(
                    example
                )
        which = [e for e in made if e.meta["form"] == "which"]
        asked = [shown[e.images[emoji.ORDINALS.index(answer(e))]].style for e in which]
        if split in ("validation", "unseen_style"):
            assert abs(share([style == "fluent" for style in asked]) - 0.5) < 0.05


def painted(example: Example) -> np.ndarray:
    """Which pixels of a scene are not fully transparent."""
    return decode(example.images[0])[..., 3] > 0


def test_scenes_say_the_truth():
    for split in emoji.SPLITS:
        for example in many(split, "scene", 600):
            boxes = [scenes.Box(*box) for box in example.meta["boxes"]]
            outside = painted(example)
            for box in boxes:
                window = np.s_[box.top : box.top + box.size, box.left : box.left + box.size]
                assert outside[window].any()
                outside[window] = False
            assert not outside.any()
            check_scene_answer(example, boxes)


def check_scene_answer(example: Example, boxes: list[scenes.Box]) -> None:
    meta, captions = example.meta, example.meta["captions"]
    if meta["form"] == "count":
        assert answer(example) == ("one", "two", "three", "four", "five")[len(boxes) - 1]
        return
    first, second = boxes
    dx, dy = second.left - first.left, second.top - first.top
    true = {"left of": dx > 0, "right of": dx < 0, "above": dy > 0, "below": dy < 0}
    if meta["form"] == "relation":
        assert answer(example) == ("yes" if true[meta["relation"]] else "no")
        assert f"{meta['relation']} {captions[1]}" in question(example)
    else:
        assert true[scenes.OPPOSITE[meta["relation"]]]
        assert answer(example) == captions[1]
        assert f"{meta['relation']} {captions[0]}" in question(example)


def test_scene_pictures_are_the_ones_the_captions_name():
    by_key = {(r.key, r.style): r for r in load_records("emoji")}
    for example in examples("unseen_style", "scene"):
        record = by_key[example.meta["concept"], example.meta["style"]]
        top, left, size = example.meta["boxes"][0]
        got = decode(example.images[0])[top : top + size, left : left + size].astype(int)
        want = scenes.thumbnail(record.image, size).astype(int)
        assert record.caption == example.meta["captions"][0]
        np.testing.assert_array_equal(got[..., 3], want[..., 3])
        # un-premultiplied in 8 bits, so premultiplying again is exact to about a level
        again = got[..., :3] * got[..., 3:] / 255
        assert np.abs(again - want[..., :3]).max() <= 2


def test_scenes_balance_forms_counts_and_relations():
    made = many("train", "scene", 4000)
    forms = collections.Counter(e.meta["form"] for e in made)
    assert abs(forms["count"] / 4000 - 0.5) < 0.04
    counts = collections.Counter(answer(e) for e in made if e.meta["form"] == "count")
    assert all(abs(counts[word] / forms["count"] - 0.2) < 0.04 for word in emoji.COUNTS)
    asked = [e for e in made if e.meta["form"] == "relation"]
    assert abs(share([answer(e) == "yes" for e in asked]) - 0.5) < 0.06
    relations = collections.Counter(e.meta["relation"] for e in asked)
    assert all(abs(relations[r] / len(asked) - 0.25) < 0.06 for r in scenes.RELATIONS)


def test_unknown_splits_and_kinds_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"'test'.*unseen_style"):
        emoji.EmojiSource("test", "caption")
    with pytest.raises(ConfigError, match=r"'counting'.*scene"):
        emoji.EmojiSource("train", "counting")


# the tokenizer


def test_special_tokens_come_first():
    names = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")
    assert tuple(tokenizer().id_to_token(i) for i in range(6)) == names


@pytest.mark.parametrize(
    "text",
    ["is it cat face?", " two  spaces ", "Ünïcödé – “quotes”", "日本語 🙂\n\ttab", "\x00\x7f"],
)
def test_any_text_round_trips(text):
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_captions_are_few_tokens():
    captions = sorted({r.caption for r in records() if r.split == "train"})
    lengths = [len(tokenizer().encode(c, add_special_tokens=False).ids) for c in captions]
    assert np.mean(lengths) < 3.5
    assert max(lengths) <= 16
