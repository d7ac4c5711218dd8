"""Records left out for the sake of others: what is planted is found, whatever interrupts it."""

import json

import numpy as np
import PIL.Image
import pytest

from vlm_jax import config as configs
from vlm_jax.data import filters, plans, preparation, screening, shards
from vlm_jax.errors import ConfigError, DataError, StorageError

LIMITS = filters.Limits(min_side=30)
# Of records: a letter is a picture, a small one a changed copy of it; "!" is one that cannot be
# read, "0" one that is too small, and "-" is text alone.
RECORDS = "A B C D a E AB ab BA 0 F - ! - f G g G aC H I J K L M N".split()  # noqa: SIM905
DUPLICATES = {4: 0, 7: 6, 14: 10, 16: 15, 17: 15}
EVALUATED = {3: 0, 19: 2}  # of EVALUATIONS
EVALUATIONS = ["d", "!", "Hz"]


def picture(letter):
    """A made photograph of 80 x 60; copies have another size and are darker."""
    rng = np.random.default_rng(ord(letter.upper()))
    coarse, fine = (rng.integers(0, 256, (n, n, 3), np.uint8) for n in (4, 12))
    size = (100, 74) if letter.islower() else (80, 60)
    layers = [
        PIL.Image.fromarray(a).resize(size, PIL.Image.Resampling.BICUBIC) for a in (coarse, fine)
    ]
    blend = PIL.Image.blend(*layers, 0.4)
    return blend.point(lambda value: int(0.93 * value)) if letter.islower() else blend


def write(folder, records):
    """A corpus of such records."""
    folder.mkdir()
    for letter in {letter for record in records for letter in record} - set("-0!"):
        picture(letter).save(folder / f"{letter}.jpg", quality=70 if letter.islower() else 95)
    picture("F").resize((20, 15)).save(folder / "0.jpg")
    (folder / "!.jpg").write_bytes(b"none")
    lines = []
    for i, record in enumerate(records):
        names = [f"{letter}.jpg" for letter in record if letter != "-"]
        said = ["<image>" * len(names) + "What?", f"It is {i}."]
        turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said)]
        lines.append(json.dumps({"images": names, "messages": turns}))
    (folder / "all.jsonl").write_text("\n".join(lines))
    return configs.Corpus("messages", {"all": str(folder / "all.jsonl")})


@pytest.fixture
def asked(tmp_path):
    """What a run is asked for, without its folder."""
    return {
        "corpus": write(tmp_path / "in", RECORDS),
        "against": [write(tmp_path / "eval", EVALUATIONS)],
        "deduplicate": True,
        "limits": LIMITS,
        "shard_bytes": 12_000,
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_duplicates_and_pictures_of_evaluations_are_left_out_by_name(asked, tmp_path):
    out = tmp_path / "out"
    manifest = preparation.run(out=out, **asked)
    assert len(manifest["shards"]) > 3
    assert manifest["rejects"] == {
        "evaluation_image": 2, "near_duplicate": 5, "not_an_image": 1, "too_small": 1,
    }  # fmt: skip
    assert manifest["records"] == len(RECORDS) - 9
    assert list(manifest["unread"].values()) == [1]
    lacking = {int(r["where"].rpartition(":")[2]) - 1: r for r in preparation.rejected(out)}
    assert lacking.keys() == {*DUPLICATES, *EVALUATED, 9, 12}
    for index, kept in DUPLICATES.items():
        assert f"in/all.jsonl:{kept + 1}," in lacking[index]["detail"]
    for index, evaluated in EVALUATED.items():
        assert lacking[index]["detail"].endswith(f"eval/all.jsonl:{evaluated + 1}")
    records = shards.ShardRecords(out)
    said = [shards.unpack(records[i])[2][-1].parts[0] for i in range(len(records))]
    assert said == [f"It is {i}." for i in range(len(RECORDS)) if i not in lacking]


def test_each_step_is_asked_for_by_itself(asked, tmp_path):
    only = preparation.run(out=tmp_path / "a", **asked | {"deduplicate": False})
    assert only["rejects"] == {"evaluation_image": 2, "not_an_image": 1, "too_small": 1}
    only = preparation.run(out=tmp_path / "b", **asked | {"against": ()})
    assert only["rejects"]["near_duplicate"] == 5 and "evaluation_image" not in only["rejects"]
    assert "unread" not in only
    with pytest.raises(ConfigError, match="was begun with near 4, not 0"):
        preparation.run(out=tmp_path / "b", **asked | {"against": (), "near": 0})
    exact = preparation.run(out=tmp_path / "c", **asked | {"against": (), "near": 0})
    assert 1 <= exact["rejects"]["near_duplicate"] <= 5  # "G" stands twice


def test_no_record_is_left_out_for_one_that_is_left_out(tmp_path):
    """The first has a picture of the evaluation beside its own; the second is no copy of it."""
    corpus, against = write(tmp_path / "in", ["AB", "ab", "b"]), write(tmp_path / "eval", ["A"])
    asked = {"against": [against], "deduplicate": True, "shard_bytes": 10**6}
    manifest = preparation.run(corpus, tmp_path / "out", **asked)
    assert manifest["rejects"] == {"evaluation_image": 2} and manifest["records"] == 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_runs_give_the_same_bytes(asked, tmp_path, workers):
    preparation.run(out=tmp_path / "one", **asked)
    expected, out = contents(tmp_path / "one"), tmp_path / "two"
    preparation.run(out=out, workers=workers, **asked)
    assert contents(out) == expected
    looks = sorted(path.name for path in out.glob("look-*"))
    for gone, damaged in ([looks[0], looks[2]], [looks[1]]), ([], looks[-1:]):
        for name in (*gone, screening.DROPPED, shards.MANIFEST):
            (out / name).unlink()
        for name in damaged:
            (out / name).write_bytes(expected[name][:9])
        for path in sorted(out.glob("shard-*.json"))[1:]:
            path.unlink()
        preparation.run(out=out, workers=workers, **asked)
        assert contents(out) == expected


def test_shards_are_not_made_without_what_was_found(asked, tmp_path):
    out = tmp_path / "out"
    preparation.run(out=out, **asked)
    said = json.loads((out / plans.PLAN).read_text())
    corpora = [plans.Known(**known) for known in (said["corpus"], *said["against"])]
    plan = plans.Plan(corpora[0], said["per_shard"], LIMITS, True, tuple(corpora[1:]))
    (out / "look-0-00001.msgpack").unlink()
    with pytest.raises(StorageError, match="look-0-00001"):
        preparation.make_shard(plan, out, 1)
    (out / screening.DROPPED).write_text("[")
    screening._known.cache_clear()
    with pytest.raises(StorageError, match=r"dropped\.json is missing or damaged"):
        preparation.make_shard(plan, out, 0)


def test_an_evaluation_without_any_picture_is_refused(tmp_path):
    corpus, against = write(tmp_path / "in", "AB"), write(tmp_path / "eval", "!-")
    with pytest.raises(DataError, match=r"eval/all\.jsonl has no picture that can be read"):
        preparation.run(corpus, tmp_path / "out", against=[against], shard_bytes=10**6)
