"""The official files of visual questions: how questions find their answers, and what is refused."""

import json

import numpy as np
import pytest

from vlm_jax.data import records, rows, scanning, vqa
from vlm_jax.errors import DataError


def written(folder, questions, annotations, name="v2_OpenEnded_mscoco_val2014_questions.json"):
    """VQAv2's two files, of question and annotation ids."""
    path = folder / name
    path.write_text(
        json.dumps(
            {"questions": [{"question_id": i, "image_id": 2, "question": "?"} for i in questions]}
        )
    )
    (folder / "v2_mscoco_val2014_annotations.json").write_text(
        json.dumps(
            {
                "annotations": [
                    {"question_id": i, "multiple_choice_answer": str(i)} for i in annotations
                ]
            }
        )
    )
    return path


def test_answers_are_found_in_whatever_order_they_stand(tmp_path):
    ids = np.random.default_rng(0).permutation(200).tolist()
    for order in (ids, sorted(ids), ids[::-1]):
        found = vqa.VqaRecords(written(tmp_path, ids, order))
        assert [rows.answer(found[i]) for i in range(200)] == list(map(str, ids))
        assert found[0]["image"] == "COCO_val2014_000000000002.jpg"  # from the name of the file
        assert ("_ids" in found._answers.__dict__) == (order != ids)


@pytest.mark.parametrize(
    "given, answer",
    [
        ({"answers": ["a", "b", "b", "a"]}, "a"),  # of several the first
        ({"answers": ["a", "b", "b"]}, "b"),
        ({"answers": [{"answer": "a"}, {"answer": "b"}, {"answer": "b"}]}, "b"),
        ({"answers": ["", " ", "b"]}, "b"),
        ({"multiple_choice_answer": "c", "answers": ["a"]}, "c"),
        ({"multiple_choice_answer": "", "answers": ["a"]}, "a"),
    ],
)
def test_the_answer_given_most_is_learned(given, answer):
    assert rows.answer(given) == answer


def test_a_change_of_either_file_is_another_corpus(tmp_path):
    first = vqa.VqaRecords(written(tmp_path, [1, 2], [1, 2])).fingerprint
    assert vqa.VqaRecords(written(tmp_path, [1, 2], [1, 2])).fingerprint == first
    assert vqa.VqaRecords(written(tmp_path, [1, 2], [1, 3])).fingerprint != first
    assert vqa.VqaRecords(written(tmp_path, [1, 3], [1, 2])).fingerprint != first


def test_files_that_are_none_of_vqas_are_refused(tmp_path):
    path = written(tmp_path, [1], [1])
    with pytest.raises(DataError, match="not named as files of questions are"):
        vqa.VqaRecords(written(tmp_path, [1], [1], "val2014.json"))
    with pytest.raises(DataError, match="says no data_subtype"):
        vqa.VqaRecords(written(tmp_path, [1], [1], "my_questions.json"))
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    annotations.write_text("{}")
    with pytest.raises(DataError, match="has no list 'annotations'"):
        vqa.VqaRecords(path)
    annotations.unlink()
    with pytest.raises(DataError, match=r"annotations\.json cannot be read"):
        vqa.VqaRecords(path)
    path.write_text("{}")
    for kind, name in ((vqa.VqaRecords, "questions"), (vqa.TextVqaRecords, "data")):
        with pytest.raises(DataError, match=f"has no list '{name}'"):
            kind(path)
    with pytest.raises(DataError, match="holds no record"):
        vqa.GqaRecords(path)


@pytest.mark.parametrize("chunk", [1, 7, scanning._CHUNK])
def test_members_of_an_object_are_records(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(scanning, "_CHUNK", chunk)
    said = {"0": {"a": [1.5e3, "}"]}, '\\"1': {}, "\u20ac": {"imageId": {"deep": [{}]}}}
    path = tmp_path / "all.json"
    for indent in (None, 2):
        path.write_text(json.dumps(said, indent=indent, ensure_ascii=False), encoding="utf-8")
        found = vqa.GqaRecords(path)
        assert [found[i] for i in range(3)] == [v | {"question_id": k} for k, v in said.items()]


def test_a_large_file_replaced_in_place_is_another_corpus(tmp_path):
    path = tmp_path / "all.jsonl"
    rng = np.random.default_rng(0)
    made = []
    for _ in range(2):
        numbers = rng.integers(10**8, 10**9, 400_000)
        path.write_text("\n".join(f'{{"a": {n}}}' for n in numbers))
        made.append(records.JsonRecords(path))
        assert made[-1].fingerprint == records.JsonRecords(path).fingerprint
    np.testing.assert_array_equal(made[0].spans, made[1].spans)
    assert made[0].fingerprint != made[1].fingerprint
