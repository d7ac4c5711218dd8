"""Pictures as several images of a row: their places in the sequence, markers and limits."""

import dataclasses
import io
import zlib

import numpy as np
import pytest
import tokenizers
from PIL import Image
from resizing_theirs import CLIP_MEAN, PINPOINTS, picture, processor
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlm_jax import config as c
from vlm_jax.data import documents, packing, pipeline, templates, tokenizer
from vlm_jax.data.example import Example, ImageRef, Turn
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.resizing import Resize

SIDE, PATCH = 12, 2
MEAN, STD = CLIP_MEAN, (0.26862954, 0.26130258, 0.27577711)
SPECIALS = (
    *("<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"),
    *("<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<|global_image|>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)),
)
SIZES = ((37, 61), (83, 20), (5, 7), (12, 12), (24, 12), (11, 100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of one token per byte, with the special tokens of all templates."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=0, initial_alphabet=sorted(alphabet))
    made.train_from_iterator([], trainer)
    made.add_special_tokens(list(SPECIALS))
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def fixed(mode: str, **fields) -> Encoder:
    how = Resize(mode, **fields)
    return Encoder(16, 1, 32, 2, patch=PATCH, image_size=SIDE, mean=MEAN, std=STD, resize=how)


def native(mode: str, **fields) -> Encoder:
    return dataclasses.replace(
        fixed(mode, filter="bilinear", **fields), image_size=40, max_patches=400
    )


SHUFFLE = Connector("linear", pool="shuffle", factor=2)  # 9 visual tokens
TILES = tuple((SIDE * down, SIDE * across) for down, across in PINPOINTS)
# Encoder, connector and template of each published way to lay out pictures.
SYSTEMS = {
    "llava_next": (
        fixed("pinpoints", pinpoints=TILES),
        Connector("mlp", newline="token"),
        "vicuna_v1",
    ),
    "idefics2": (
        native("bounds", shortest=11),
        Connector("perceiver", queries=4, heads=2, kv_heads=2),
        "idefics2",
    ),
    "idefics2_split": (
        native("quarters", shortest=11),
        Connector("perceiver", queries=4, heads=2, kv_heads=2),
        "idefics2",
    ),
    "idefics3": (fixed("grid", filter="lanczos", longest=4 * SIDE), SHUFFLE, "idefics3"),
    "smolvlm": (fixed("grid", filter="lanczos", longest=2 * SIDE), SHUFFLE, "smolvlm"),
    "smolvlm_whole": (fixed("grid", filter="lanczos", longest=SIDE), SHUFFLE, "smolvlm"),
    "nanovlm": (fixed("whole_and_grid", longest=3 * SIDE), SHUFFLE, "nanovlm"),
}


def config_of(name: str, folder, **data) -> c.Config:
    encoder, connector, template = SYSTEMS[name]
    model = c.Model(encoder, connector, decoder("1m", vocab=512))
    fields = {"tokens": 4096, "images_per_row": 64, "tokenizer": str(folder), "template": template}
    found = c.Config(name, model, c.Data({"emoji:caption": 1.0}, **fields | data))
    c.check(found)
    return found


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def talk(*sizes: tuple[int, int]) -> Example:
    """A question after the first picture, further pictures in the second turn.

    Words behind a picture start with a space: Idefics2's processor puts one where they do not, for
    tokenizers that put none behind special tokens themselves.
    """
    shown = tuple(png(picture(*size)) for size in sizes)
    turns = (
        Turn("user", (ImageRef(0), " What is it?")),
        Turn("assistant", ("A fox.",)),
        Turn("user", (*map(ImageRef, range(1, len(sizes))), " And now?")),
        Turn("assistant", ("Snow.",)),
    )
    return Example("one", "made", shown, turns)


def without_pixels(height: int, width: int) -> bytes:
    """A PNG whose header is right and whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4)
        return len(data).to_bytes(4) + kind + data + check

    header = width.to_bytes(4) + height.to_bytes(4) + bytes((8, 2, 0, 0, 0))
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def made(name: str, folder, example: Example, **data) -> documents.Document:
    config = config_of(name, folder, **data)
    return documents.document(example, config, tokenizer.load(str(folder)))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_visual_token_is_of_an_image_that_is_there_and_stands_once(name, folder):
    document = made(name, folder, talk(*SIZES[:3]))
    per_image = config_of(name, folder).model.visual_tokens
    ids = tokenizer.load(str(folder))
    there = document.visual_index >= 0
    assert not document.rejects and document.loss_weights.any()
    np.testing.assert_array_equal(there, document.tokens == ids.image)
    owners = document.visual_index[there] // per_image
    assert set(owners) == set(range(len(document.pixels)))
    own = document.image_index[there]
    if name != "llava_next":  # whose tiles are put together line by line, with one newline
        assert len(set(document.visual_index[there])) == there.sum()
        np.testing.assert_array_equal(owners, own)
    assert (np.diff(document.image_index) >= 0).all() and document.image_index[0] in (-1, 0)
    # Packed behind another document, the same visual tokens.
    shape = packing.shape_of(config_of(name, folder), ids.pad, rows=1)
    batch = packing.assemble([[document, document]], shape)
    again = batch.visual_index[0, len(document) : 2 * len(document)]
    moved = document.visual_index + per_image * len(document.pixels)
    np.testing.assert_array_equal(again, np.where(there, moved, -1))


def spelled(folder, document) -> str:
    backend = tokenizer.load(str(folder)).backend
    return backend.decode(document.tokens.tolist(), skip_special_tokens=False)


def test_nanovlm_numbers_pictures_and_marks_the_whole_and_each_tile(folder):
    one = "<image>" * 9
    tiles = f"<row_1_col_1>{one}<row_1_col_2>{one}<row_1_col_3>{one}"
    single = f"<|im_start|>user\n<|global_image|>{one}{tiles} What is it?<|im_end|>\n"
    assert spelled(folder, made("nanovlm", folder, talk((5, 30)))).startswith(single)
    two = spelled(folder, made("nanovlm", folder, talk((5, 30), (30, 5))))
    down = f"<row_1_col_1>{one}<row_2_col_1>{one}<row_3_col_1>{one}"
    assert f"user\n<image: 0><|global_image|>{one}{tiles} What" in two
    assert f"user\n<image: 1><|global_image|>{one}{down} And" in two


def test_a_bad_picture_with_a_header_keeps_the_shape_that_it_would_have_had(folder):
    for name in SYSTEMS:
        good = talk((37, 61), (83, 20))
        bad = dataclasses.replace(good, images=(good.images[0], without_pixels(83, 20)))
        one, other = made(name, folder, good), made(name, folder, bad)
        assert not one.rejects and other.rejects and not other.loss_weights.any()
        for field in ("tokens", "visual_index", "image_index", "blocks"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert [p.shape for p in one.pixels] == [p.shape for p in other.pixels]
        first = len(made(name, folder, talk((37, 61))).pixels)
        for n, (mine, theirs) in enumerate(zip(one.pixels, other.pixels, strict=True)):
            np.testing.assert_array_equal(theirs, mine if n < first else np.zeros_like(mine))


def test_a_picture_without_a_header_stands_as_one_of_the_encoders_size(folder):
    example = dataclasses.replace(talk((5, 5)), images=(b"nothing",))
    document = made("idefics2_split", folder, example)
    expected = made("idefics2_split", folder, talk((40, 40)))
    assert document.rejects == ("not_an_image",)
    np.testing.assert_array_equal(document.tokens, expected.tokens)
    assert [p.shape for p in document.pixels] == [p.shape for p in expected.pixels]


def test_more_tiles_than_a_row_holds_are_refused_by_name(folder):
    example = talk((48, 48))
    count = len(made("idefics3", folder, example).pixels)
    assert count == 17 and not made("idefics3", folder, example, images_per_row=17).rejects
    assert made("idefics3", folder, example, images_per_row=16).rejects == ("too_many_images",)
    config = config_of("idefics3", folder, images_per_row=16)
    with pytest.raises(DataError, match="17 images"):
        ids = tokenizer.load(str(folder))
        documents.prompt_document(example.turns[:1], example.images, config, ids)


def test_a_prompt_is_laid_out_as_the_start_of_its_document(folder):
    for name in SYSTEMS:
        example, ids = talk((37, 61)), tokenizer.load(str(folder))
        config = config_of(name, folder)
        prompt = documents.prompt_document(example.turns[:1], example.images, config, ids)
        whole = documents.document(example, config, ids)
        size = len(prompt)
        np.testing.assert_array_equal(prompt.tokens, whole.tokens[:size])
        np.testing.assert_array_equal(prompt.visual_index, whole.visual_index[:size])
        for mine, other in zip(prompt.pixels, whole.pixels, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_the_connector_of_one_token_per_feature_shows_only_patches_that_there_are(folder):
    encoder = native("bounds", shortest=11)
    model = c.Model(encoder, Connector("mlp"), decoder("1m", vocab=512))
    data = dataclasses.replace(config_of("idefics2", folder).data, template="vicuna_v1")
    config = c.Config("native", model, data)
    c.check(config)
    example = talk((20, 31), (13, 40))
    document = documents.document(example, config, tokenizer.load(str(folder)))
    grids = [(p.shape[0] // PATCH, p.shape[1] // PATCH) for p in document.pixels]
    assert grids == [(10, 15), (6, 20)]
    visual = document.visual_index[document.visual_index >= 0]
    np.testing.assert_array_equal(visual, [*range(150), *range(400, 520)])
    batch = packing.assemble([[document]], packing.shape_of(config, 0, rows=1))
    np.testing.assert_array_equal(batch.images.grids[0, :3], [(10, 15), (6, 20), (0, 0)])
    for slot, (rows, columns) in enumerate(grids):
        mine = batch.images.patch_images[0] == slot
        np.testing.assert_array_equal(
            batch.images.patch_positions[0][mine], np.indices((rows, columns)).reshape(2, -1).T
        )


def test_up_scaling_is_drawn_before_a_picture_is_cut(folder):
    encoder = fixed("whole_and_grid", longest=3 * SIDE, enlarge=False)
    config = config_of("nanovlm", folder, augment=c.Augment(upscale=(13, 36)))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))
    ids, counts = tokenizer.load(str(folder)), set()
    for seed in range(20):
        document = documents.document(talk((9, 9)), config, ids, np.random.default_rng(seed))
        again = documents.document(talk((9, 9)), config, ids, np.random.default_rng(seed))
        np.testing.assert_array_equal(document.tokens, again.tokens)
        np.testing.assert_array_equal(document.pixels, again.pixels)
        counts.add(len(document.pixels))
    assert counts == {5, 10}  # 2 x 2 and 3 x 3 tiles and the whole


def test_a_position_of_another_resize_mode_is_refused(small, spoiled):
    state = pipeline.train_stream(small()).get_state()
    cropped = small(encoder={"resize": Resize("crop")})
    assert pipeline.train_stream(cropped).get_state() != state
    with pytest.raises(ConfigError, match="resize"):
        pipeline.train_stream(cropped).set_state(state)


BAD = (
    ({"images_per_row": 4}, "idefics2_split", "images_per_row is 4; expected at least the 5"),
    ({"images_per_row": 2}, "llava_next", "images_per_row is 2; expected at least the 3"),
    ({"augment": c.Augment(rotate=3.0)}, "idefics3", "crop, flip and upscale only"),
    ({"augment": c.Augment(crop=(0.0, 1.0))}, "idefics3", "augment.crop"),
)


@pytest.mark.parametrize("data, name, message", BAD)
def test_what_leaves_no_room_for_the_views_is_refused(data, name, message, folder):
    with pytest.raises(ConfigError, match=message):
        config_of(name, folder, **data)


# Fields of a Resize, and of the encoder, that contradict each other.
WRONG = (
    (Resize("patches"), {}, "resize.mode"),
    (Resize("pad"), {"image_size": (12, 24)}, "resize.mode"),
    (Resize("stretch"), {}, "resize.mode"),
    (Resize(side=14), {}, "resize.side"),
    (Resize("crop", shortest=11), {}, "resize.shortest"),
    (Resize("grid", longest=30), {}, "resize.longest"),
    (Resize("pinpoints"), {}, "resize.pinpoints"),
    (Resize("pinpoints", pinpoints=((12, 30),)), {}, "resize.pinpoints"),
    (Resize("bounds", longest=42), {"max_patches": 36}, "resize.longest"),
    (Resize(filter="box"), {}, "resize.filter"),
)


@pytest.mark.parametrize("how, fields, named", WRONG)
def test_fields_of_a_resize_that_contradict_others_are_refused_by_name(how, fields, named):
    encoder = dataclasses.replace(fixed("squash"), resize=how, **fields)
    with pytest.raises(ConfigError, match=rf"model.encoder.{named} "):
        c.check_model(c.Model(encoder))


# Against transformers ---------------------------------------------------------------------------


def theirs(name: str, folder):
    """The processor of transformers that does the same, without a chat template."""
    import transformers

    backend = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    norm = {"image_mean": MEAN, "image_std": STD, "do_rescale": True, "do_normalize": True}
    if name == "llava_next":
        images = processor(
            "llava_next",
            "LlavaNextImageProcessorPil",
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=list(map(list, TILES)),
            **norm,
        )
        # The encoder has no class token, so that all its features are taken.
        return transformers.LlavaNextProcessor(
            images, backend, patch_size=PATCH, vision_feature_select_strategy="full"
        )
    if name.startswith("idefics2"):
        images = processor(
            "idefics2",
            "Idefics2ImageProcessorPil",
            size={"shortest_edge": 11, "longest_edge": 40},
            do_image_splitting=name.endswith("split"),
            **norm,
        )
        return transformers.Idefics2Processor(images, backend, image_seq_len=4)
    longest = SYSTEMS[name][0].resize.longest
    sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": SIDE}}
    # SmolVLM's own needs packages for films; it spells pictures as Idefics3's does.
    module, kind = ("idefics3", "Idefics3") if name == "idefics3" else ("smolvlm", "SmolVLM")
    images = processor(module, f"{kind}ImageProcessorPil", **sizes, **norm)
    return transformers.Idefics3Processor(images, backend, image_seq_len=9)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "nanovlm"])
def test_tokens_and_pixels_are_what_the_processor_of_transformers_makes(name, folder):
    published, config = theirs(name, folder), config_of(name, folder)
    ids, template = tokenizer.load(str(folder)), templates.template(config.data.template)
    alone = [(size,) for size in SIZES]
    for group in (*alone, SIZES[:2], SIZES[2:4], SIZES[3:]):
        example = talk(*group)
        document = documents.document(example, config, ids)
        text, shown = one_token_each(example, template), [picture(*size) for size in group]
        found = published(text=text, images=[shown], add_special_tokens=False)
        assert document.tokens.tolist() == found["input_ids"][0]
        _assert_same_pixels(name, document, found)


def one_token_each(example: Example, row: templates.Template) -> str:
    """The conversation with `<image>` for each picture, which processors replace."""
    said = "".join((row.system[0], row.system_text, row.system[1])) if row.system_text else ""
    for turn in example.turns:
        seen = "<image>" + (row.image[1] if row.images == "turn" else "")
        words = [seen if isinstance(part, ImageRef) else part for part in turn.parts]
        if row.images == "turn" and isinstance(turn.parts[0], ImageRef):
            words[-1] = words[-1].strip()
        if turn.role == "assistant":
            end = "</s>" if row.eos else ""
            said += row.assistant + row.answer[0] + words[0] + row.answer[1] + end + row.after
        else:
            lead = "" if isinstance(turn.parts[0], ImageRef) else row.user_lead
            said += row.user[0] + lead + "".join(words) + row.user[1]
    return ("<s>" if row.bos else "") + row.start + said


def _assert_same_pixels(name: str, document, found) -> None:
    """Views without what their processor puts around them for a common shape."""
    pixels = [np.asarray(views) for views in found["pixel_values"]]
    if name == "llava_next":
        views = [view for shown in pixels for view in shown if view.any()]
    else:
        views = list(pixels[0])
    masks = found.get("pixel_attention_mask")
    masks = None if masks is None else list(np.asarray(masks[0]))
    assert len(views) == len(document.pixels)
    for n, (mine, view) in enumerate(zip(document.pixels, views, strict=True)):
        if masks is not None:
            height, width = masks[n][:, 0].sum(), masks[n][0].sum()
            assert mine.shape[:2] == (height // PATCH * PATCH, width // PATCH * PATCH)
        height, width = mine.shape[:2]
        if mine.dtype == np.uint8:
            mine = (mine / 255 - MEAN) / STD
        levels = np.abs(mine - np.moveaxis(view, 0, -1)[:height, :width]) * STD * 255
        assert levels.max() <= 1.01
