"""The page of `prepare show`: it says of every row what the Batch holds, and nothing runs in it."""

import base64
import collections
import dataclasses
import io
import itertools
import json
import pathlib
import subprocess
import sys

import browsing
import numpy as np
import PIL.Image
import pytest
from trees import Element, parsed

from tools import browser
from vlm_jax import config as configs
from vlm_jax.batch import Images
from vlm_jax.data import drawing, images, pipeline, showing, tokenizer
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.fusion import CrossAttention

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = tokenizer.load("embedded")
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&lt;\u202e"""


def shown(config, count: int = 2, rows: int = 99):
    """The page of a config, parsed, and the batches that it is about."""
    with pipeline.train_stream(config) as stream:
        batches = list(itertools.islice(stream, count))
    return parsed(showing.page(config, batches, rows)), batches


def rows_of(page: Element) -> list[Element]:
    return page.all("section", "row")


def documents_of(row: Element) -> list[Element]:
    return [each for each in row.all("div", "document") if "data-tokens" in each.attributes]


def pieces_of(document: Element) -> list[tuple[Element, int]]:
    """What stands for its tokens, and for how many each."""
    pieces = document.all(kind="text")[0].all(kind="t")
    return [(each, int(each.attributes.get("data-count", 1))) for each in pieces]


def pixels_of(image: Element) -> np.ndarray:
    kind, data = image.attributes["src"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))


def spread(document: Element, value) -> np.ndarray:
    """Of every position of a document, what `value` says of the piece that stands there."""
    return np.array([value(piece) for piece, count in pieces_of(document) for _ in range(count)])


def shade_of(piece: Element) -> int:
    (name,) = [c for c in piece.classes if c[0] == "s" and c[1:].isdigit()]
    return int(name[1:])


def image_of(piece: Element) -> int:
    link = piece.attributes.get("href")
    return int(link.rpartition("i")[2]) if link else -1


def total(page: Element, name: str) -> str:
    (found,) = [e for e in page.all("b") if e.attributes.get("data-total") == name]
    return found.text.replace(",", "")


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_every_token_weight_image_and_block_on_the_page_is_the_batch_s(small, spoiled, attention):
    config = small(attention=attention)
    page, batches = shown(config)
    rows = iter(rows_of(page))
    for batch, info in batches:
        for row, names in enumerate(info.documents):
            drawn = next(rows)
            assert len(documents_of(drawn)) == len(names) > 0
            for segment, document in enumerate(documents_of(drawn), start=1):
                here = (row, batch.segments[row] == segment)
                weights = batch.loss_weights[here]
                np.testing.assert_array_equal(spread(document, shade_of), 8 * weights)
                slots = batch.visual_index[here] // config.model.visual_tokens
                np.testing.assert_array_equal(spread(document, image_of), slots)
                assert document.attributes["data-tokens"] == str(len(weights))
                assert document.attributes["data-supervised"] == str((weights > 0).sum())
                key, source = names[segment - 1]
                assert f"{source} · {key} · " in document.all(kind="head")[0].text
                blocks = [b for b in document.all(kind="block") for _ in pieces_of_block(b)]
                marked = [int(b.attributes["data-block"]) for b in blocks]
                held = batch.blocks[here]
                assert marked == held[held > 0].tolist()
            used = [i.attributes["title"] for i in drawn.all("i") if "padding" in i.classes]
            empty = int((batch.segments[row] == 0).sum())
            assert used == ([f"{empty} padding"] if empty else [])
    assert next(rows, None) is None


def pieces_of_block(block: Element) -> range:
    return range(sum(int(t.attributes.get("data-count", 1)) for t in block.all(kind="t")))


def test_tokens_read_as_the_text_that_was_rendered(small, spoiled):
    config = small()
    page, batches = shown(config)
    batch, _ = batches[0]
    for row, drawn in enumerate(rows_of(page)[: config.data.rows]):
        for segment, document in enumerate(documents_of(drawn), start=1):
            tokens = batch.tokens[row, batch.segments[row] == segment]
            words = [p for p, _ in pieces_of(document) if "word" in p.classes]
            assert "".join(p.text for p in words).strip() == TOKENIZER.decode(tokens).strip()
            special = [p.text for p, _ in pieces_of(document) if "special" in p.classes]
            assert special[0] == "<bos>" and special[-1] == "<eos>"


def test_totals_are_those_of_all_rows_whichever_are_drawn(small, spoiled):
    spoiled[3] = b"no picture"
    config = small(bad_samples=0.5)
    page, batches = shown(config, count=9, rows=1)
    assert len(rows_of(page)) == 9
    there = np.concatenate([batch.segments > 0 for batch, _ in batches])
    weights = np.concatenate([batch.loss_weights for batch, _ in batches])
    assert total(page, "tokens") == str(there.sum())
    assert total(page, "supervised") == str((weights > 0).sum())
    padding = [e for e in page.all("b") if e.attributes.get("data-padding") == "tokens"]
    assert padding[0].text == f"{100 * (1 - there.mean()):.1f} %"
    sources = collections.Counter(s for _, i in batches for row in i.documents for _, s in row)
    rejects = sum((collections.Counter(i.rejects) for _, i in batches), collections.Counter())
    cells = {}
    for line in page.all("tr"):
        if "data-source" in line.attributes:
            cells[line.attributes["data-source"]] = [cell.text for cell in line.all("td")]
    assert {source: int(found[1]) for source, found in cells.items()} == dict(sources)
    assert rejects and set(rejects) == {("one", "not_an_image")}
    assert cells["one"][-1] == f"not_an_image {rejects['one', 'not_an_image']}"
    # The spoiled document keeps its place, and is the only one that nothing is learned from.
    spoiled_ones = [1 for _, i in batches for row in i.documents for k, _ in row if k == "one/3"]
    assert [cells["one"][2], cells["two"][2]] == [str(len(spoiled_ones)), "0"]


def test_a_picture_is_put_together_from_its_patches_exactly():
    encoder = Encoder(16, 1, 32, 2, patch=4, image_size=8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 2))
    rng = np.random.default_rng(0)
    # Three images of their own sizes share a row, their patches in any order, some room left.
    made = [rng.random((4 * r, 4 * c, 3), np.float32) for r, c in ((2, 3), (5, 1), (1, 1))]
    normalised = [(p - np.float32(encoder.mean)) / np.float32(encoder.std) for p in made]
    grids = np.array([[(2, 3), (5, 1), (0, 0), (1, 1)]], np.int32)
    owners = np.repeat([0, 1, 3, -1], [6, 5, 1, 4])
    places = np.concatenate([np.indices(g).reshape(2, -1).T for g in grids[0]] + [[(0, 0)] * 4])
    patches = np.concatenate([images.patchify(p, 4) for p in normalised] + [np.ones((4, 48))])
    order = rng.permutation(len(owners))
    packed = Images(
        grids,
        patches=patches[order][None].astype(np.float32),
        patch_positions=places[order][None].astype(np.int32),
        patch_images=owners[order][None].astype(np.int32),
    )
    assert drawing.slots(packed, 0) == [0, 1, 3]
    for slot, pixels, seen in zip([0, 1, 3], normalised, made):
        own = packed.patch_images[0] == slot
        parts = packed.patches[0][own], packed.patch_positions[0][own]
        np.testing.assert_array_equal(drawing.unpatchify(*parts, grids[0, slot], 4), pixels)
        found = drawing.picture(packed, 0, slot, encoder)
        assert found.dtype == np.uint8 and np.abs(found - 255.0 * seen).max() <= 0.5 + 1e-3
    packed.patch_images[packed.patch_images == 3] = -1
    lost = drawing.picture(packed, 0, 3, encoder)
    assert (lost == drawing.MISSING).all()


def test_a_picture_of_bytes_is_shown_as_it_is():
    encoder = Encoder(16, 1, 32, 2, patch=4, image_size=8, mean=(0.1, 0.2, 0.3))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    places = np.indices((2, 2), np.int32).reshape(1, 2, 4).swapaxes(1, 2)
    packed = Images(
        np.full((1, 1, 2), 2, np.int32),
        patches=images.patchify(pixels, 4)[None],
        patch_positions=places,
        patch_images=np.zeros((1, 4), np.int32),
    )
    whole = Images(packed.grids, pixels=pixels[None, None])
    for seen in (packed, whole):
        np.testing.assert_array_equal(drawing.picture(seen, 0, 0, encoder), pixels)


def test_pictures_are_those_of_pixels_whatever_the_encoder_takes(small, spoiled):
    pages = {}
    for stem, stages in (("patch", ()), ("conv", ((4, 8, 1),))):
        encoder = {"stem": stem, "stem_stages": stages, "mean": (0.2, 0.3, 0.4)}
        pages[stem], batches = shown(small(encoder=encoder))
    by_patches, by_pixels = (
        [pixels_of(image) for figure in page.all("figure") for image in figure.all("img")]
        for page in pages.values()
    )
    count = sum(int((batch.images.grids[..., 0] > 0).sum()) for batch, _ in batches)
    assert len(by_patches) == len(by_pixels) == count > 5
    for one, other in zip(by_patches, by_pixels):
        np.testing.assert_array_equal(one, other)
    batch, _ = batches[0]
    pixels = batch.images.pixels[0, 0] * np.float32(0.5) + np.float32((0.2, 0.3, 0.4))
    assert np.abs(by_pixels[0] - 255 * pixels).max() <= 0.5 + 1e-3


def test_every_encoder_s_picture_is_shown(small, spoiled):
    config = small()
    extra = (Encoder(16, 1, 32, 2, patch=4, image_size=12),)
    model = dataclasses.replace(config.model, extra_encoders=extra)
    page, _ = shown(dataclasses.replace(config, model=model), 1)
    assert page.all("figure")
    for figure in page.all("figure"):
        sizes = [pixels_of(image).shape for image in figure.all("img")]
        assert sizes == [(8, 8, 3), (12, 12, 3)]


def test_an_image_that_is_only_looked_at_is_one_placeholder(small, spoiled):
    config = small()
    fusion = CrossAttention(24, heads=3, kv_heads=1, head_dim=6, every=2)
    model = dataclasses.replace(config.model, fusion=fusion)
    page, batches = shown(dataclasses.replace(config, model=model), 1)
    for row, drawn in enumerate(rows_of(page)):
        links = drawn.all("a", "image")
        stand = batches[0][0].tokens[row] == TOKENIZER.image
        assert [image_of(link) for link in links] == list(range(stand.sum()))
        ids = {figure.attributes["id"] for figure in drawn.all("figure")}
        assert {link.attributes["href"][1:] for link in links} == ids


def test_rows_without_images_have_a_page(small, spoiled):
    page, _ = shown(small(images=False), 1)
    assert rows_of(page) and not page.all("figure")
    assert not any(row.all("a", "image") for row in rows_of(page))


def test_an_image_that_no_token_stands_for_is_called_out(small, spoiled):
    config = small()
    with pipeline.train_stream(config) as stream:
        batch, info = next(stream)
    batch.visual_index[0], batch.image_index[0] = -1, -1
    first = rows_of(parsed(showing.page(config, [(batch, info)], 1)))[0]
    assert "no token stands for these images" in first.text
    assert len(first.all("figure")) == (batch.images.grids[0, :, 0] > 0).sum()


@pytest.fixture
def folder(tmp_path):
    """A config like configs/forkme.py, of a corpus that means harm."""
    name = "a'\"<b>& .png"
    PIL.Image.effect_noise((40, 30), 90).save(tmp_path / name)
    rows = [
        {
            "id": f"{i} {HOSTILE}",
            "images": [name] * (i % 3),
            "messages": [
                {"role": "user", "content": "<image>" * (i % 3) + f"What is {i}? {HOSTILE}"},
                {"role": "assistant", "content": f"It is {HOSTILE}\n\tnumber {i}."},
            ],
        }
        for i in range(12)
    ]
    rows[4]["images"] = ["none.png"]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def forked(config, folder):
    source = f"mine {HOSTILE}".replace(":", "")
    corpora = {source: configs.Corpus("messages", {"train": str(folder / "train.jsonl")})}
    changes = {"corpora": corpora, "mixture": {source: 1.0}, "tokens": 512, "bad_samples": 0.5}
    return dataclasses.replace(
        config, name=HOSTILE, data=dataclasses.replace(config.data, **changes)
    )


def test_what_a_corpus_says_stays_text(small, folder):
    page, batches = shown(forked(small(), folder))
    allowed = {"a", "b", "body", "br", "div", "figcaption", "figure", "h1", "h2", "h3", "head"}
    allowed |= {"html", "i", "img", "main", "meta", "p", "q", "section", "small", "span", "style"}
    allowed |= {"table", "tbody", "td", "th", "thead", "title", "tr", "wbr"}
    assert {element.tag for element in page.all()} <= allowed
    names = {name for element in page.all() for name in element.attributes}
    assert not {name for name in names if name.startswith("on")}
    for image in page.all("img"):
        assert image.attributes["src"].startswith("data:image/png;base64,")
    links = {link.attributes["href"] for link in page.all("a") if "href" in link.attributes}
    assert links and all(link.startswith("#b") for link in links)
    visible = HOSTILE.replace("\u202e", "\\u202e")
    assert page.all("h1")[0].text == page.all("title")[0].text.split(": ")[0] == visible
    document = documents_of(rows_of(page)[0])[0]
    said = "".join(piece.text for piece, _ in pieces_of(document) if piece.text != "·")
    assert visible in said and "↵\n⇥\tnumber" in said
    assert any(visible in head.text for head in page.all(kind="head"))
    rejects = sum((collections.Counter(i.rejects) for _, i in batches), collections.Counter())
    [((_, reason), count)] = rejects.items()
    assert f"{reason} {count}" in [cell.text for cell in page.all("td")]


def test_weights_between_are_shaded_between(small, spoiled):
    assert [showing.shade(w, 2.0) for w in (0.0, 0.01, 0.5, 1.0, 2.0)] == [0, 1, 2, 4, 8]
    config = small()
    with pipeline.train_stream(config) as stream:
        batch, info = next(stream)
    batch.loss_weights[0] *= np.float32(0.25)
    page = parsed(showing.page(config, [(batch, info)], 9))
    shades = [{shade_of(t) for t in row.all(kind="t")} for row in rows_of(page)]
    assert shades == [{0, 2}, {0, 8}, {0, 8}]
    legend = page.all(kind="legend")[0].text.split()
    assert {"learned", "0.25"} <= set(legend)


def command(*flags: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "vlm_jax.prepare", "show", *flags]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_writes_the_page_or_says_what_is_wrong(tmp_path):
    tiny = "--config=configs/tiny.py"
    done = command(tiny, "--batches=2", "--rows=3", f"--out={tmp_path}/page.html")
    assert done.returncode == 0, done.stderr
    assert "2 batches of 16 rows" in done.stdout
    assert len(rows_of(parsed((tmp_path / "page.html").read_text("utf-8")))) == 6
    assert command().returncode == 78
    assert command(tiny, "word").returncode == 78
    assert command(tiny, f"--out={tmp_path}/none/page.html").returncode == 74


@pytest.mark.slow
def test_a_browser_draws_the_page_without_complaint(small, folder, tmp_path):
    chromium = browser.find()
    if not chromium:
        pytest.skip("no Chromium is installed: `make browser` tries to")
    config = forked(small(attention="prefix"), folder)
    with pipeline.train_stream(config) as stream:
        batches = list(itertools.islice(stream, 3))
    path = tmp_path / "page.html"
    path.write_text(showing.page(config, batches, 99), "utf-8")
    (tmp_path / "profile").mkdir()
    with browsing.opened(chromium, path, tmp_path / "profile") as page:
        assert not page.complaints
        loaded = "[...document.images].map(i => i.complete && i.naturalWidth > 0)"
        count = sum(int((batch.images.grids[..., 0] > 0).sum()) for batch, _ in batches)
        assert page.evaluate(loaded) == [True] * (count + 1)  # and the histograms
        tokens = sum(int((batch.segments > 0).sum()) for batch, _ in batches)
        learned = sum(int((batch.loss_weights > 0).sum()) for batch, _ in batches)
        pieces = "[...document.querySelectorAll('.text .t')]"
        many = "(found) => found.reduce((sum, t) => sum + Number(t.dataset.count || 1), 0)"
        assert page.evaluate(f"({many})({pieces})") == tokens
        green = f"{pieces}.filter(t => !t.classList.contains('s0'))"
        assert page.evaluate(f"({many})({green})") == learned
        assert page.evaluate("document.querySelector('[data-total=tokens]').innerText") == (
            f"{tokens:,}"
        )
        # What is learned is drawn in another colour than what is not.
        colour = "getComputedStyle(document.querySelector('.text .s{}')).backgroundColor"
        assert page.evaluate(colour.format(8)) == "rgba(34, 197, 94, 0.7)"
        assert page.evaluate(colour.format(0)) != "rgba(34, 197, 94, 0.7)"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.querySelectorAll('script, iframe, object').length") == 0
        for scroll in ("0", "document.querySelector('.row').offsetTop"):
            page.evaluate(f"scrollTo(0, {scroll})")
            drawn = np.asarray(PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
            assert drawn.shape[:2] == (1600, 1280)
            assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 500
