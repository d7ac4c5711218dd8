"""Users' own corpora: what makes an Example, what is counted, and what `validate` says of it."""

import json
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest

from vlm_jax import config as configs
from vlm_jax.data import formats, heldout, pipeline, records, scanning, sources, validation
from vlm_jax.data.example import BadExample, ImageRef, Turn
from vlm_jax.errors import ConfigError, DataError

GOOD = {
    "id": "7",
    "images": ["a.png", "sub/b.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat is new in <image>?"},
        {"role": "assistant", "content": "A cat. \u20ac"},
    ],
}
LLAVA = {
    "id": 7,
    "image": ["a.png", "sub/b.png"],
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat is new in <image>?"},
        {"from": "gpt", "value": "A cat. \u20ac"},
    ],
}
PARTS = [
    {"type": "image"},
    {"type": "text", "text": "\nWhat is new in "},
    {"type": "image"},
    {"type": "text", "text": "?"},
]
TURNS = (
    Turn("system", ("Be brief.",)),
    Turn("user", (ImageRef(0), "\nWhat is new in ", ImageRef(1), "?")),
    Turn("assistant", ("A cat. \u20ac",)),
)


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures."""
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("a.png", "sub/b.png")):
        PIL.Image.new("RGB", (9 + i, 5), (i, 2, 3)).save(tmp_path / name)
    return tmp_path


def written(folder, *rows, name="corpus.jsonl"):
    """A file of rows: strings and bytes as they are, others as JSON."""
    raw = [
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path = folder / name
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def opened(path, format="messages"):
    return formats.CorpusSource("own", configs.Corpus(format, {"train": str(path)}), "train")


def said(role="user", content="hello"):
    return {"role": role, "content": content}


def changed(**fields):
    return GOOD | fields


@pytest.mark.parametrize(
    "format, row",
    [
        ("messages", GOOD),
        (
            "messages",
            changed(messages=[GOOD["messages"][0], said(content=PARTS), GOOD["messages"][2]]),
        ),
        ("llava", LLAVA),
    ],
)
def test_every_way_to_write_it_is_one_example(folder, format, row):
    source = opened(written(folder, row), format)
    example = source.example(0, np.random.default_rng(0))
    assert example.turns == TURNS
    assert example.images == (folder / "a.png", folder / "sub/b.png")
    assert (example.key, example.source, example.meta) == ("own/train/0", "own", {"id": "7"})


def test_text_alone_and_one_image_as_a_string(folder):
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    shown = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "ho"}]
    source = opened(
        written(folder, {"conversations": talk}, {"image": "a.png", "conversations": shown}),
        "llava",
    )
    first, second = (source.example(i, np.random.default_rng(0)) for i in range(2))
    assert first.images == () and first.key == "own/train/0"
    assert second.turns[0].parts == (ImageRef(0),) and second.images == (folder / "a.png",)


BAD = {
    "not_json": '{"messages": [}',
    "not_json twice": '{"id": "1", "id": "2"}',
    "not_json nan": '{"id": NaN}',
    "not_utf8": b'{"id": "\xff"}',
    "not_utf8 half": '{"id": "\\ud800"}',
    "too_deep": "[" * 100_000,
    "not_an_object": "[1, 2]",
    "bad_id": changed(id=[1]),
    "no_turns": {"id": "1"},
    "no_turns empty": changed(messages=[]),
    "bad_turn": changed(messages=["hello"]),
    "unknown_role": changed(messages=[said("robot")]),
    "bad_content": changed(messages=[said(content=3)]),
    "bad_content part": changed(messages=[said(content=[{"type": "video"}])]),
    "bad_image_path": changed(images=[None, "a.png"]),
    "image_count": changed(images=["a.png"]),
    "image_in_answer": changed(images=["a.png"], messages=[said(), said("assistant", "<image>x")]),
    "empty_answer": changed(images=[], messages=[said(), said("assistant", " ")]),
    "roles_out_of_turn": changed(images=[], messages=[said(), said()]),
    "roles_out_of_turn no answer": changed(images=[], messages=[said()]),
    "path_outside": changed(images=["a.png", "../../etc/passwd"]),
    "path_outside absolute": changed(images=["a.png", "/etc/passwd"]),
    "path_outside nul": changed(images=["a.png", "b\0.png"]),
    "missing": changed(id="9", images=["a.png", "c.png"]),
}


@pytest.mark.parametrize("name", BAD)
def test_validate_names_line_and_reason(folder, name):
    path = written(folder, GOOD, "", BAD[name], changed(id="8"))
    (problem,) = validation.problems(opened(path))
    assert (problem.where, problem.reason) == (f"{path}:3", name.split()[0])


def test_validate_finds_ids_that_stand_twice_and_damage_behind_headers(folder):
    whole = (folder / "a.png").read_bytes()
    at = whole.index(b"IDAT")
    length = int.from_bytes(whole[at - 4 : at])
    data = b"IDAT" + b"\1" * length  # no zlib stream, under a right checksum
    checksum = zlib.crc32(data).to_bytes(4)
    (folder / "odd.png").write_bytes(whole[:at] + data + checksum + whole[at + 8 + length :])
    path = written(folder, GOOD, GOOD, changed(id="8", images=["a.png", "odd.png"]))
    (twice,) = validation.problems(opened(path))
    assert twice[:2] == (f"{path}:2", "duplicate_id") and f"at {path}:1 as well" in twice.detail
    found = list(validation.problems(opened(path), decode=True))
    assert [p.reason for p in found] == ["duplicate_id", "corrupt"]
    assert "image 2" in found[1].detail and "odd.png" in found[1].detail


def test_the_door_prints_what_is_wrong_and_exits_65(folder):
    def run(path):
        command = [sys.executable, "-m", "vlm_jax.prepare", "validate", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    odd = changed(id="8", images=["a.png", "\x1b[31m\n.png"])
    bad = run(written(folder, GOOD, odd))
    assert r"\x1b[31m\n.png" in bad.stdout and "\x1b" not in bad.stdout
    bad = run(written(folder, GOOD, BAD["image_count"]))
    assert bad.returncode == 65
    assert ":2: image_count: 1 images for 2 places" in bad.stdout
    assert "1 of 2 records have problems: image_count 1" in bad.stderr
    good = run(written(folder, GOOD))
    assert good.returncode == 0 and "1 records, nothing wrong" in good.stdout


@pytest.mark.parametrize("chunk", [1, 7, 64, scanning._CHUNK])
@pytest.mark.parametrize("separator", [",", " ,\n\n  "])
def test_an_array_is_cut_where_its_elements_end(tmp_path, monkeypatch, chunk, separator):
    monkeypatch.setattr(scanning, "_CHUNK", chunk)
    rows = [{"a": '}],[{ \\ " \u20ac'}, {"b": [1.5e3, {"c": None}]}, {}, {"d": "x" * 40}]
    text = "\ufeff [" + separator.join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n"
    path = tmp_path / "all.json"
    path.write_text(text, encoding="utf-8")
    found = records.JsonRecords(path)
    assert [found[i] for i in range(len(found))] == rows
    lines = [text[: text.index(json.dumps(r, ensure_ascii=False))].count("\n") + 1 for r in rows]
    numbers = [f", record {i}" if separator == "," else "" for i in range(4)]
    assert [found.where(i) for i in range(4)] == [
        f"{path}:{line}{number}" for line, number in zip(lines, numbers, strict=True)
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_numbers_go_on_behind_the_end_of_a_chunk(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(scanning, "_CHUNK", chunk)
    path = tmp_path / "all.json"
    path.write_text('{"version": 1.5e-7, "images": [-1.25, 2e+30, 0]}')
    with open(path, "rb") as file:
        assert scanning.sections(file, path)["images"].tolist() == [[31, 36], [38, 43], [45, 46]]


def test_a_mark_of_byte_order_belongs_to_no_record(tmp_path):
    path = written(tmp_path, b'\xef\xbb\xbf{"a": 1}', {"b": 2})
    assert [records.JsonRecords(path)[i] for i in range(2)] == [{"a": 1}, {"b": 2}]


def test_no_path_leads_out_of_the_folder_one_stands_in(folder, monkeypatch):
    written(folder, changed(images=["../a.png", "../../a.png"]), changed(id="8"), name="own.jsonl")
    monkeypatch.chdir(folder / "sub")
    for images in ("", "..", "../sub/.."):
        corpus = configs.Corpus("messages", {"train": "../own.jsonl"}, images)
        (problem,) = validation.problems(formats.CorpusSource("own", corpus, "train"))
        assert problem.reason == "path_outside"


@pytest.mark.parametrize("chunk", [3, scanning._CHUNK])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n \n"])
def test_lines_are_records_and_blank_ones_are_not(tmp_path, monkeypatch, chunk, end):
    monkeypatch.setattr(scanning, "_CHUNK", chunk)
    path = tmp_path / "all.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n  \n{"b": 2}' + end.encode())
    found = records.JsonRecords(path)
    assert [found[i] for i in range(len(found))] == [{"a": 1}, {"b": 2}]
    assert [found.where(i) for i in range(2)] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no record"),
        ("[]", "holds no record"),
        ('[\n{"a": 1},\n{"b": }]', "line 3: not JSON"),
        ('[\n{"a": 1}\n{"b": 1}]', "line 3: '{' stands where one of ,"),
        ('[\n{"a": 1},', "line 2: not JSON"),
        ('[\n{"a": 1}', "line 2: the file ends behind it"),
        ('[\n{"a": 1}\n', "line 3: the end stands where one of ,"),
        ('[{"a": 1}]\n[{"b": 1}]', r"line 2: '\[' stands where the file should end"),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        records.JsonRecords(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        records.JsonRecords(tmp_path / "none.json")


def test_a_record_too_large_is_counted_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD", 20)
    found = records.JsonRecords(written(tmp_path, {"a": "x" * 30}, {"b": 1}))
    with pytest.raises(BadExample, match="record_too_large"):
        found[0]
    assert found[1] == {"b": 1}


def test_a_corpus_is_named_by_the_config(folder, small):
    corpora = {"own": configs.Corpus("messages", {"train": str(written(folder, GOOD))})}
    assert len(sources.open_source("own", "train", 0, corpora)) == 1
    with pytest.raises(ConfigError, match="own has no split 'test'; it has train"):
        sources.open_source("own", "test", 0, corpora)
    with pytest.raises(ConfigError, match="did you mean own"):
        sources.open_source("owm", "train", 0, corpora)
    odd = {"own": configs.Corpus("message", corpora["own"].paths)}
    with pytest.raises(ConfigError, match=r"format of data\.corpora\.own message; did you mean"):
        sources.open_source("own", "train", 0, odd)
    with_corpus = small(corpora=corpora, mixture={"own": 1.0})
    assert configs.resolve(configs.default(**vars(with_corpus)).to_dict()).data.corpora == corpora


def rows_of(count):
    talk = lambda i: [said(content=f"<image> number {i}?"), said("assistant", f"it is {i}")]  # noqa: E731
    return [{"id": str(i), "images": ["a.png"], "messages": talk(i)} for i in range(count)]


def batches(config, count):
    with pipeline.train_stream(config) as stream:
        return [next(stream) for _ in range(count)]


def test_a_bad_record_is_counted_and_moves_nothing(folder, small):
    rows = rows_of(12)
    corpus = lambda name, made: configs.Corpus(  # noqa: E731
        "messages", {"train": str(written(folder, *made, name=name))}
    )
    spoiled = [*rows[:5], "nonsense", *rows[6:]]
    made = [
        small(corpora={"own": corpus(name, lines)}, mixture={"own": 1.0}, bad_samples=0.5, pool=1)
        for name, lines in (("good.jsonl", rows), ("bad.jsonl", spoiled))
    ]
    good, bad = (batches(config, 12) for config in made)
    keys = [
        [key for _, info in found for row in info.documents for key, _ in row]
        for found in (good, bad)
    ]
    kept = [key for key in keys[0] if not key.endswith("/5")]
    shared = min(len(kept), len(keys[1]))
    assert kept[:shared] == keys[1][:shared] and shared > 30
    rejects = sum(info.rejects.get(("own", "not_json"), 0) for _, info in bad)
    assert rejects >= 3 and not any(key.endswith("/5") for key in keys[1])
    assert heldout.eval_examples(made[1], "train", "own")[5].key == "own/train/6"


def test_the_position_belongs_to_the_file(folder, small):
    def stream(rows, name):
        corpus = configs.Corpus("messages", {"train": str(written(folder, *rows, name=name))})
        return pipeline.train_stream(small(corpora={"own": corpus}, mixture={"own": 1.0}))

    with stream(rows_of(8), "one.jsonl") as one, stream(rows_of(8), "two.jsonl") as two:
        two.set_state(json.loads(json.dumps(one.get_state())))  # a copy
    longer = rows_of(8)
    longer[3]["messages"][1]["content"] += "!"
    for other in (longer, rows_of(8)[::-1]):  # whose rows are as long as these
        with stream(rows_of(8), "one.jsonl") as one, stream(other, "two.jsonl") as two:
            with pytest.raises(ConfigError, match="corpora"):
                two.set_state(json.loads(json.dumps(one.get_state())))


def test_held_out_turns_without_a_place_in_the_template_are_counted(folder, small):
    path = str(written(folder, GOOD, *rows_of(3)))
    corpora = {"own": configs.Corpus("messages", {"validation": path})}
    config = small(corpora=corpora, mixture={"own": 1.0}, template="mistral")
    ((_, info),) = heldout.eval_batches(config, "validation", "own")
    assert info.rejects == {("own", "no_place_for_turn"): 1}


COCO = {
    "info": {"year": 2017, "images": [1]},
    "images": [{"id": 9, "file_name": "sub/b.png"}, {"id": -4, "file_name": "a.png"}],
    "licenses": [],
    "annotations": [
        {"image_id": -4, "id": 1, "caption": "a"},
        {"image_id": 9, "id": 2, "caption": "b \u20ac"},
        {"image_id": 9, "id": 3, "caption": "c"},
    ],
}


@pytest.mark.parametrize("chunk", [5, scanning._CHUNK])
@pytest.mark.parametrize("indent", [None, 1])
def test_coco_annotations_find_their_images(folder, monkeypatch, chunk, indent):
    monkeypatch.setattr(scanning, "_CHUNK", chunk)
    path = folder / "captions.json"
    path.write_text(json.dumps(COCO, indent=indent, ensure_ascii=False), encoding="utf-8")
    source = opened(path, "coco")
    made = [source.example(i, np.random.default_rng(0)) for i in range(len(source))]
    assert [example.images[0].name for example in made] == ["a.png", "b.png", "b.png"]
    assert [example.turns[1].parts[0] for example in made] == ["a", "b \u20ac", "c"]
    assert [example.meta["id"] for example in made] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"image_id": 5}, "no_such_image"),
        ({"image_id": "9"}, "no_such_image"),
        ({"caption": 3}, "no_caption"),
    ],
)
def test_coco_annotations_that_are_wrong_are_counted(folder, change, reason):
    annotations = [COCO["annotations"][0] | change, *COCO["annotations"][1:]]
    path = folder / "captions.json"
    path.write_text(json.dumps(COCO | {"annotations": annotations}))
    (problem,) = validation.problems(opened(path, "coco"))
    assert problem.reason == reason


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "no list 'images'"),
        ('{"images": []', "line 1: the end stands"),
        ('{"images": {}, "annotations": []}', "no list 'images'"),
        ("{3: []}", "a name is expected"),
        ('{"images": [{"id": 1}], "annotations": [{}]}', "image 0 lacks"),
        ("[]", "line 1"),
        ('{"images": ["x"], "annotations": [{}]}', "image 0 cannot be used: not_an_object"),
        ('{"images": [], "annotations": []} {}', "'{' stands where the file should end"),
    ],
)
def test_files_that_are_none_of_cocos_are_refused(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        records.CocoRecords(path)
