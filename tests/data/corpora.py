"""A corpus in the real layout of each source: some good records, and some with one mistake each."""

import dataclasses
import io
import json
import tarfile

import PIL.Image
import pyarrow as pa
import pyarrow.parquet

from vlm_jax.config import Corpus
from vlm_jax.data.example import ImageRef, Turn


@dataclasses.dataclass
class Made:
    """A corpus and what is to be found in it.

    Attributes:
      corpus: with its one split, "all".
      good: red values of the pictures and turns, by number of record.
      bad: reason and the end of the place, by number of record.
    """

    corpus: Corpus
    good: dict[int, tuple[list[int], tuple[Turn, ...]]]
    bad: dict[int, tuple[str, str]]


def png(red: int) -> bytes:
    """A small picture of one colour."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def told(*pairs: tuple[str, str], images: int = 1) -> tuple[Turn, ...]:
    """Questions and answers, the images at the start of the first."""
    turns = []
    for asked, answer in pairs:
        shown = tuple(map(ImageRef, range(images))) if not turns else ()
        turns += [Turn("user", (*shown, asked) if asked else shown), Turn("assistant", (answer,))]
    return tuple(turns)


def embedded(*reds: int) -> list[dict]:
    """Pictures as Hugging Face embeds them."""
    return [{"bytes": png(red), "path": None} for red in reds]


def said(*pairs: tuple[str, str]) -> list[dict]:
    """Turns of The Cauldron."""
    return [{"user": asked, "assistant": answer, "source": "tqa"} for asked, answer in pairs]


def table(path, rows: list[dict], schema: pa.Schema | None = None, **options):
    """A parquet file of rows."""
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SAID = pa.list_(pa.struct([(name, pa.string()) for name in ("user", "assistant", "source")]))
CAULDRON = pa.schema([("images", pa.list_(IMAGE)), ("texts", SAID)])


def cauldron(folder) -> Made:
    """Two shards in a folder, as a data set of The Cauldron has them; row groups of two rows."""
    rows = [
        {"images": embedded(10), "texts": said(("What?", "A fox."), ("Where?", "In snow."))},
        {"images": embedded(20, 21), "texts": said(("Same?", "No."))},
        {"images": embedded(30), "texts": said(("What?", ""))},
        {"images": embedded(40), "texts": [*said(("A?", "B")), None]},
        {"images": embedded(50), "texts": []},
        {"images": [{"bytes": None, "path": None}], "texts": said(("A?", "B"))},
        {"images": [{"bytes": b"<html>", "path": None}], "texts": said(("A?", "B"))},
        {"images": embedded(80), "texts": said(("Text of <image> inline?", "Yes."))},
        {"images": embedded(90), "texts": said(("<image> and <image>?", "Yes."))},
    ]
    names = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"
    for name, part in zip(names, (rows[:5], rows[5:])):
        table(folder / name, part, CAULDRON, row_group_size=2)
    inline = (Turn("user", ("Text of ", ImageRef(0), " inline?")), Turn("assistant", ("Yes.",)))
    first, second = (f"{name}, row " for name in names)
    return Made(
        Corpus("parquet", {"all": str(folder)}),
        {
            0: ([10], told(("What?", "A fox."), ("Where?", "In snow."))),
            1: ([20, 21], told(("Same?", "No."), images=2)),
            7: ([80], inline),
        },
        {
            2: ("empty_answer", first + "2"),
            3: ("bad_turn", first + "3"),
            4: ("no_turns", first + "4"),
            5: ("no_image", second + "0"),
            6: ("not_an_image", second + "1"),
            8: ("image_count", second + "3"),
        },
    )


def captions(folder) -> Made:
    """A data set of Hugging Face: a picture and its caption, or the path of one."""
    (folder / "p.png").write_bytes(png(60))
    rows = [
        {"id": "a", "image": embedded(10)[0], "caption": "A fox."},
        {"id": "b", "image": {"bytes": None, "path": "p.png"}, "caption": "A path."},
        {"id": "c", "image": None, "caption": "Nothing."},
        {"id": "d", "image": {"bytes": None, "path": "../p.png"}, "caption": "Out."},
        {"id": "e", "image": {"bytes": None, "path": "https://a.b/c.png"}, "caption": "Web."},
        {"id": "f", "image": embedded(20)[0], "caption": None},
        {"id": "a", "image": embedded(30)[0], "caption": "Twice."},
    ]
    return Made(
        Corpus("parquet", {"all": str(table(folder / "c.parquet", rows))}),
        {0: ([10], told(("", "A fox."))), 1: ([60], told(("", "A path.")))},
        {
            2: ("no_image", "c.parquet, row 2"),
            3: ("path_outside", "c.parquet, row 3"),
            4: ("not_downloaded", "c.parquet, row 4"),
            5: ("no_caption", "c.parquet, row 5"),
            6: ("duplicate_id", "c.parquet, row 6"),
        },
    )


# What users read in order; a page that starts with text has an empty first question.
PAGE = (
    Turn("user", ()),
    Turn("assistant", ("One.\n\nTwo.",)),
    Turn("user", (ImageRef(0), ImageRef(1))),
    Turn("assistant", ("Three.",)),
)


def _pages(image) -> list[dict]:
    return [
        {
            "images": [None, None, image(10), image(11), None, image(12)],
            "texts": ["One.", "Two.", None, None, "Three.", None],
        },
        {"images": [image(20), None], "texts": [None, "Under it."]},
        {"images": [image(30)], "texts": [None]},
        {"images": [None], "texts": ["A", "B"]},
        {"images": [image(40), image(41)], "texts": [None, "Both."]},
    ]


def _interleaved(corpus: Corpus, place) -> Made:
    return Made(
        corpus,
        {0: ([10, 11], PAGE), 1: ([20], told(("", "Under it.")))},
        {
            2: ("no_text", place(2)),
            3: ("unequal_lists", place(3)),
            4: ("image_and_text", place(4)),
            5: ("not_downloaded", place(5)),
        },
    )


def obelics_parquet(folder) -> Made:
    """OBELICS once its images were fetched: bytes stand where URLs did."""
    rows = [row | {"metadata": "[]"} for row in _pages(lambda red: embedded(red)[0])]
    url = {"bytes": None, "path": "https://a.b/c.jpg"}
    rows.append({"images": [url, None], "texts": [None, "x"], "metadata": "[]"})
    path = table(folder / "obelics.parquet", rows)
    return _interleaved(
        Corpus("obelics", {"all": str(path)}), lambda i: f"obelics.parquet, row {i}"
    )


def obelics_jsonl(folder) -> Made:
    """The same as lines of JSON beside a folder of images."""

    def image(red):
        (folder / f"{red}.png").write_bytes(png(red))
        return f"{red}.png"

    rows = [*_pages(image), {"images": ["https://a.b/c.jpg", None], "texts": [None, "x"]}]
    path = folder / "obelics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return _interleaved(Corpus("obelics", {"all": str(path)}), lambda i: f"obelics.jsonl:{i + 1}")


def mmc4(folder) -> Made:
    """A shard of MMC4 and its images."""
    for red in (10, 11):
        (folder / f"{red}.png").write_bytes(png(red))
    info = lambda name, at: {"image_name": name, "matched_text_index": at, "raw_url": "x"}  # noqa: E731
    rows = [
        {
            "url": "a.b",
            "text_list": ["One.", "Two.", "Three."],
            "image_info": [info("11.png", 2), info("10.png", 0)],
        },
        {"text_list": ["One."], "image_info": [info("10.png", 1)]},
        {"text_list": [None], "image_info": []},
    ]
    path = folder / "docs_shard_0_v2.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    turns = (
        Turn("user", (ImageRef(0),)),
        Turn("assistant", ("One. Two.",)),
        Turn("user", (ImageRef(1),)),
        Turn("assistant", ("Three.",)),
    )
    return Made(
        Corpus("mmc4", {"all": str(path)}),
        {0: ([10, 11], turns)},
        {1: ("bad_image_info", "v2.jsonl:2"), 2: ("bad_content", "v2.jsonl:3")},
    )


def vqa(folder) -> Made:
    """OK-VQA's two files and its folder of COCO's images, answers in another order."""
    (folder / "train2014").mkdir()
    (folder / "train2014" / "COCO_train2014_000000000009.jpg").write_bytes(png(10))
    question = lambda n, **fields: {  # noqa: E731
        "image_id": 9, "question": f"What is {n}?", "question_id": 90 + n, **fields,
    }  # fmt: skip
    answers = lambda *given: [  # noqa: E731
        {"answer": a, "answer_id": i + 1, "answer_confidence": "yes"} for i, a in enumerate(given)
    ]
    annotation = lambda n, **fields: {  # noqa: E731
        "question_id": 90 + n, "image_id": 9, "answer_type": "other", **fields,
    }  # fmt: skip
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    questions = [*map(question, range(4)), question(4, image_id=8), question(5, question="")]
    questions.append(question(6, image_id="9"))
    annotations = [
        annotation(0, multiple_choice_answer="net", answers=answers("nets", "net", "net")),
        annotation(2, answers=answers("red", "blue", "blue", "red", "green")),
        annotation(1, multiple_choice_answer="pony", answers=answers("pony")),
        *(annotation(n, multiple_choice_answer="x") for n in (4, 5, 6)),
    ]
    path = folder / "OpenEnded_mscoco_train2014_questions.json"
    path.write_text(
        json.dumps({**head, "questions": questions, "data_subtype": "train2014"}, indent=0)
    )
    (folder / "mscoco_train2014_annotations.json").write_text(
        json.dumps({**head, "data_subtype": "train2014", "annotations": annotations})
    )
    ask = lambda n, answer: ([10], told((f"What is {n}?", answer)))  # noqa: E731
    first = path.read_text().splitlines().index("{", 1) + 1
    at = lambda n: f"questions.json:{first + 5 * n}"  # noqa: E731 - five lines each
    return Made(
        Corpus("vqa", {"all": str(path)}, str(folder / "train2014")),
        {0: ask(0, "net"), 1: ask(1, "pony"), 2: ask(2, "red")},
        {
            3: ("no_annotation", at(3)),
            4: ("missing", at(4)),
            5: ("no_question", at(5)),
            6: ("bad_image_id", at(6)),
        },
    )


def text_vqa(folder) -> Made:
    """TextVQA's file, beside its folder train_images."""
    (folder / "train_images").mkdir()
    (folder / "train_images" / "0054c91397f2fe05.jpg").write_bytes(png(10))
    question = lambda n, answers, **fields: {  # noqa: E731
        "question": f"what is {n}?", "image_id": "0054c91397f2fe05", "question_id": n,
        "image_classes": ["Sign"], "answers": answers, "set_name": "train", **fields,
    }  # fmt: skip
    data = [
        question(0, ["nous les gosses"] * 4 + ["dakota"] * 6),
        question(1, []),
        question(2, ["x"], image_id=None),
    ]
    path = folder / "TextVQA_0.5.1_train.json"
    path.write_text(json.dumps({"dataset_type": "train", "dataset_version": "0.5.1", "data": data}))
    return Made(
        Corpus("textvqa", {"all": str(path)}, str(folder / "train_images")),
        {0: ([10], told(("what is 0?", "dakota")))},
        {1: ("no_answer", ":1, record 1"), 2: ("bad_image_id", ":1, record 2")},
    )


def gqa(folder) -> Made:
    """GQA's file of questions by their ids, and its images."""
    (folder / "2354786.jpg").write_bytes(png(10))
    question = lambda **fields: {  # noqa: E731
        "imageId": "2354786", "question": "Is the sky dark?", "answer": "yes",
        "fullAnswer": "Yes, the sky is dark.", "isBalanced": True, "semantic": [], **fields,
    }  # fmt: skip
    questions = {
        "02930152": question(),
        "02": question(answer=None),
        "03": 3,
        "04": question(imageId="../2354786"),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in questions.items()]
    path = folder / "train_balanced_questions.json"
    path.write_text("{\n" + ",\n".join(lines) + "}")
    return Made(
        Corpus("gqa", {"all": str(path)}),
        {0: ([10], told(("Is the sky dark?", "yes")))},
        {
            1: ("no_answer", "questions.json:3"),
            2: ("not_an_object", "questions.json:4"),
            3: ("path_outside", "questions.json:5"),
        },
    )


def pdf(*contents: bytes, box: bytes = b"0 0 595 842") -> bytes:
    """A PDF of one page for each stream of PDF's operators; its font is called F."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(contents)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(contents), kids),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    for i, content in enumerate(contents):
        page = b"<</Type/Page/Parent 2 0 R/MediaBox[%s]/Resources<</Font<</F 3 0 R>>>>"
        objects.append(page % box + b"/Contents %d 0 R>>" % (5 + 2 * i))
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(content), content))
    whole, places = b"%PDF-1.4\n", []
    for i, each in enumerate(objects, 1):
        places.append(len(whole))
        whole += b"%d 0 obj\n%s\nendobj\n" % (i, each)
    table = b"".join(b"%010d 00000 n \n" % at for at in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1,
        len(whole),
    )
    return whole + head + table + tail


def red_page(red: int, text: bytes = b"") -> bytes:
    """A page of one colour with text on it."""
    return b"%.4f 0 0 rg 0 0 9999 9999 re f 0 g BT /F 24 Tf 50 700 Td (%s) Tj ET" % (
        red / 255,
        text,
    )


def pages(folder) -> Made:
    """A shard with documents of PDFA and of OCR-IDL, and some without JSON."""
    pdfa = [
        {"words": {"text": ["Hello", "there"], "bbox": []}, "lines": {"text": ["Hello", "there"]}},
        {"words": {"text": ["words", "alone"], "bbox": []}},
    ]
    idl = [{"text": ["FIRST LINE", "second"], "bbox": [], "poly": [], "score": [0.9, 0.8]}]
    members = {
        "pdfa.pdf": pdf(red_page(10), red_page(20)),
        "pdfa.json": json.dumps({"pages": pdfa}).encode(),
        "idl.json": json.dumps({"pages": idl}).encode(),
        "idl.ocr": b"other",
        "idl.pdf": pdf(red_page(30)),
        "layer.pdf": pdf(red_page(40, b"In the file."), red_page(50)),
        "alone.json": json.dumps({"pages": idl}).encode(),
        "broken.pdf": b"%PDF-1.4 and no more",
        "odd.json": b'{"pages": [{"lines": {"text": [1]}}]}',
        "odd.pdf": pdf(red_page(60)),
        "short.json": json.dumps({"pages": idl + idl}).encode(),
        "short.pdf": pdf(red_page(70)),
    }
    path = folder / "pdfa-eng-train-0000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    place = lambda sample, page: f"0000.tar, sample {sample}, page {page}"  # noqa: E731
    return Made(
        Corpus("pages", {"all": str(folder / "*.tar")}),
        {
            0: ([10], told(("", "Hello\nthere"))),
            1: ([20], told(("", "words alone"))),
            2: ([30], told(("", "FIRST LINE\nsecond"))),
            3: ([40], told(("", "In the file."))),
            8: ([70], told(("", "FIRST LINE\nsecond"))),
        },
        {
            4: ("no_text", place(4, 2)),
            5: ("no_pdf", place(5, 1)),
            6: ("not_a_pdf", place(6, 1)),
            7: ("bad_page", place(7, 1)),
            9: ("no_such_page", place(9, 2)),
        },
    )


MADE = {
    made.__name__: made
    for made in (
        cauldron, captions, obelics_parquet, obelics_jsonl, mmc4, vqa, text_vqa, gqa, pages,
    )
}  # fmt: skip
