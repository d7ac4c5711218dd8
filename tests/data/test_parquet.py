"""Rows of parquet files: in whatever order they are asked for, and whatever is wrong with them."""

import concurrent.futures

import corpora
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from vlm_jax import config as configs
from vlm_jax.data import formats, parquet, rows
from vlm_jax.data.example import BadExample, ImageRef, Turn
from vlm_jax.errors import DataError

BOTH = lambda names: ["id", "image"]  # noqa: E731


@pytest.fixture
def shards(tmp_path):
    """Three files of rows of different sizes, in groups of different sizes, one of them empty."""
    rng = np.random.default_rng(0)
    for number, (count, group) in enumerate(((50, 7), (0, 1), (33, 33))):
        made = [
            {"id": 100 * number + i, "image": rng.bytes(int(rng.integers(1, 3000)))}
            for i in range(count)
        ]
        schema = pa.schema([("id", pa.int64()), ("image", pa.binary()), ("other", pa.string())])
        corpora.table(tmp_path / f"part-{number}.parquet", made, schema, row_group_size=group)
    return tmp_path


def whole(folder):
    """All rows, as pyarrow reads them."""
    return pa.parquet.read_table(folder, columns=["id", "image"]).to_pylist()


@pytest.mark.parametrize("size", [1, 5000, parquet.PART_BYTES])
def test_rows_are_those_of_a_full_read_in_any_order_and_by_any_threads(shards, monkeypatch, size):
    monkeypatch.setattr(parquet, "PART_BYTES", size)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3 * size)
    found, expected = parquet.ParquetRecords(shards, BOTH), whole(shards)
    assert [found[i] for i in range(len(found))] == expected
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(expected)), 3)).tolist()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(found.__getitem__, order)) == [expected[i] for i in order]
    kept = list(found._cache.values())
    assert len(kept) == 1 or sum(part.nbytes for part in kept) <= 3 * size
    assert max(part.num_rows for part in kept) * 1500 < 3 * size + 6000
    assert found.where(51) == f"{shards}/part-2.parquet, row 1"


def test_rows_in_their_order_are_one_pass(shards, monkeypatch):
    monkeypatch.setattr(parquet, "PART_BYTES", 5000)
    found = parquet.ParquetRecords(shards / "part-2.parquet", BOTH)
    opened = []
    batches = found._batches
    monkeypatch.setattr(found, "_batches", lambda *a: opened.append(a) or batches(*a))
    assert [found[i] for i in range(33)] == whole(shards / "part-2.parquet")
    assert len(opened) == 1 and len(found._cache) > 5


def test_one_value_that_repeats_fills_no_memory(tmp_path, monkeypatch):
    # A dictionary page holds it once: the footer says little of what it unpacks to.
    monkeypatch.setattr(parquet, "CACHE_BYTES", 2**20)
    big = [{"id": i, "image": b"x" * 10_000} for i in range(4 * parquet.PART_ROWS)]
    path = corpora.table(tmp_path / "a.parquet", big, row_group_size=len(big))
    assert path.stat().st_size < 2**20
    found = parquet.ParquetRecords(path, BOTH)
    assert [found[i] for i in range(3, len(big), 7)] == big[3::7]
    assert [part.num_rows for part in found._cache.values()] == [parquet.PART_ROWS]


def test_parts_are_whole_however_short_arrows_batches_are(shards, monkeypatch):
    read = pa.parquet.ParquetFile.iter_batches
    sizes = lambda rows: np.random.default_rng(rows).integers(1, 4)  # noqa: E731
    monkeypatch.setattr(
        pa.parquet.ParquetFile,
        "iter_batches",
        lambda self, rows, **options: read(self, int(sizes(rows)), **options),
    )
    monkeypatch.setattr(parquet, "PART_BYTES", 9000)
    found, expected = parquet.ParquetRecords(shards, BOTH), whole(shards)
    assert [found[i] for i in range(len(found))] == expected
    assert [found[i] for i in range(0, len(found), 11)] == expected[::11]


def test_files_that_are_none_or_do_not_fit_are_refused(shards):
    make = lambda path: parquet.ParquetRecords(path, rows.columns)  # noqa: E731
    (shards / "part-1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"part-1\.parquet is no parquet file"):
        parquet.ParquetRecords(shards, BOTH)
    corpora.table(shards / "part-1.parquet", [{"id": 1}])
    with pytest.raises(DataError, match=r"part-1\.parquet lacks \['image'\], which others have"):
        parquet.ParquetRecords(shards, BOTH)
    with pytest.raises(DataError, match=r"has columns id, image, other; expected.*caption or"):
        make(shards)
    with pytest.raises(DataError, match="no such file"):
        make(shards / "x-*.parquet")
    empty = pa.schema([("caption", pa.string())])
    with pytest.raises(DataError, match="holds no row"):
        make(corpora.table(shards / "empty.parquet", [], empty))


def test_damage_is_a_bad_row_and_nothing_else(shards):
    path, expected = shards / "part-0.parquet", whole(shards / "part-0.parquet")
    data = path.read_bytes()
    rng, bad = np.random.default_rng(0), 0
    for _ in range(60):
        at = int(rng.integers(4, len(data) - 8))
        path.write_bytes(data[:at] + rng.bytes(4) + data[at + 4 :])
        try:
            found = parquet.ParquetRecords(path, BOTH)
        except DataError:
            continue
        for i in range(min(len(found), 50)):
            try:
                assert isinstance(found[i], dict)
            except BadExample as reason:
                assert reason.reason in ("damaged", "not_utf8")
                bad += 1
    path.write_bytes(data)
    assert bad and [parquet.ParquetRecords(path, BOTH)[i] for i in range(50)] == expected


def test_another_file_of_the_same_rows_is_another_corpus(tmp_path):
    make = lambda red: parquet.ParquetRecords(  # noqa: E731
        corpora.table(tmp_path / "a.parquet", [{"id": 1, "image": corpora.png(red)}]), BOTH
    )
    assert make(1).fingerprint == make(1).fingerprint != make(2).fingerprint


PICTURE = corpora.embedded(10)[0]
ASKED = corpora.told(("What?", "A fox."))
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A fox."}]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "See "}, {"type": "image", "text": None}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
]
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A fox."}]
LAYOUTS = {
    "caption": ({"image": PICTURE, "caption": "A fox."}, corpora.told(("", "A fox."))),
    "several captions": ({"image": PICTURE, "captions": ["A", "B"]}, corpora.told(("", "A"))),
    "bytes": ({"image": PICTURE["bytes"], "text": "A fox."}, corpora.told(("", "A fox."))),
    "messages": ({"images": [PICTURE], "messages": CHAT}, ASKED),
    "parts": (
        {"images": [PICTURE], "messages": PARTS},
        (Turn("user", ("See ", ImageRef(0))), Turn("assistant", ("Yes.",))),
    ),
    "conversations": (
        {"image": PICTURE, "conversations": TALK},
        (Turn("user", (ImageRef(0), "\nWhat?")), Turn("assistant", ("A fox.",))),
    ),
    "answer": ({"image": PICTURE, "question": "What?", "answer": "A fox."}, ASKED),
    "answers": ({"image": PICTURE, "question": "What?", "answers": ["B", *["A fox."] * 2]}, ASKED),
    "VQAv2": (
        {
            "image": PICTURE,
            "question": "What?",
            "question_id": 7,
            "multiple_choice_answer": "A fox.",
            "answers": [{"answer": "B", "answer_id": 1}],
        },
        ASKED,
    ),
    "text alone": ({"text": "A page."}, corpora.told(("", "A page."), images=0)),
    "no image": (
        {"image": None, "messages": CHAT},
        corpora.told(("What?", "A fox."), images=0),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_columns_say_what_a_row_is(tmp_path, name):
    row, turns = LAYOUTS[name]
    path = str(corpora.table(tmp_path / "a.parquet", [row]))
    source = formats.CorpusSource("own", configs.Corpus("parquet", {"all": path}), "all")
    example = source.example(0, np.random.default_rng(0))
    assert example.turns == turns and set(example.images) <= {PICTURE["bytes"]}
    assert example.meta == ({"id": "7"} if "question_id" in row else {})
