"""big_vision's npz: the same bits in and out, and features and logits as transformers has them."""

import io
import math
import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from npz_cases import CASES, PIXELS, TOKENS, arrays
from towers import assert_close, assert_whole, features, logits, shapes

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit
from vlm_jax.weights import npz, tables
from vlm_jax.weights.families import big_vision

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "weights_npz.npz"


def opened(name: str, folder: pathlib.Path) -> npz.Npz:
    """The case as a file that numpy wrote."""
    np.savez(folder / "model.npz", **arrays(name))
    return npz.Npz(folder / "model.npz")


@pytest.fixture(scope="module", params=CASES)
def read(request, tmp_path_factory):
    """Name of a case, its file, its model and its leaves."""
    file = opened(request.param, tmp_path_factory.mktemp("npz"))
    model = big_vision.read(file.shapes)
    rows = big_vision.rows(model, big_vision.root(file.shapes))
    leaves = assert_whole(rows, file, shapes(model), big_vision.CARRIED)
    return request.param, file, model, leaves


def test_a_file_goes_in_and_out_with_the_same_names_and_bits(read, tmp_path):
    name, file, model, leaves = read
    found = tables.scatter(big_vision.rows(model, big_vision.root(file.shapes)), leaves)
    carried = file.shapes.keys() - found.keys()
    assert bool(carried) == name.startswith("siglip")
    npz.write(tmp_path / "again.npz", found | {n: file.read(n) for n in carried}, file.form)
    wanted = arrays(name)
    with np.load(tmp_path / "again.npz", allow_pickle=False) as found:
        assert set(found) == set(wanted)
        for key, array in wanted.items():
            assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
            assert found[key].tobytes() == array.tobytes(), key
    assert npz.Npz(tmp_path / "again.npz").form == file.form


def test_features_and_logits_equal_those_of_transformers(read):
    name, _, model, leaves = read
    if CASES[name][2] != "float32":
        return
    goldens = np.load(GOLDENS)
    assert_close(features(model, leaves, PIXELS), goldens[f"{name}/features"])
    if model.decoder is not None:
        below = {p.removeprefix("decoder/"): a for p, a in leaves.items() if "decoder/" in p}
        found = logits(Model(decoder=model.decoder), below, TOKENS)
        assert_close(found, goldens[f"{name}/logits"])


@pytest.mark.slow
def test_the_kept_outputs_are_those_that_transformers_gives_today():
    pytest.importorskip("torch")
    import npz_theirs

    kept = np.load(GOLDENS)
    for name in {key.partition("/")[0] for key in kept}:
        for output, array in npz_theirs.outputs(name).items():
            assert_close(kept[f"{name}/{output}"], array, 1e-6)


def test_bfloat16_without_a_type_is_known_and_is_the_upper_half_of_float32(tmp_path):
    file = opened("paligemma_bfloat16", tmp_path)
    assert set(file.dtypes.values()) == {np.dtype(jnp.bfloat16)}
    raw = arrays("paligemma_bfloat16")["params/img/embedding/kernel"]
    wanted = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    found = file.read("img/embedding/kernel").astype(np.float32)
    np.testing.assert_array_equal(found, wanted)


def test_an_optimizers_state_is_left_and_named(tmp_path):
    made = {"params/" + n: a for n, a in arrays("vit").items()}
    np.savez(tmp_path / "m.npz", **made, **{"opt/0/mu": np.ones(3), "chrono/steps": np.ones(())})
    file = npz.Npz(tmp_path / "m.npz")
    assert file.left == ["chrono/steps", "opt/0/mu"] and set(file.shapes) == set(arrays("vit"))


# Published checkpoints by the names of big_vision's tables; shapes only, nothing is allocated.
@pytest.mark.parametrize("wanted", [decoder("gemma-2b"), decoder("gemma2-2b")], ids=str)
def test_shapes_of_published_sizes_give_their_presets(wanted):
    model = Model(
        vit("So400m/14", image_size=224), Connector("linear", dtype="bfloat16"), decoder=wanted
    )
    ours = shapes(model)
    shown = {}
    for row in big_vision.rows(model, "img/"):
        stacked = "{}" in row.theirs
        leaf = ours[row.ours][1:] if stacked else ours[row.ours]
        empty = tables.LAYOUTS[row.layout].theirs(np.broadcast_to(np.float32(0), leaf))
        parts = row.part[1]
        shape = (parts, *empty.shape[1:]) if parts > 1 else empty.shape
        shown |= dict.fromkeys(row.names(ours[row.ours][0]), shape)
    found = big_vision.read(shown)
    # big_vision looks back without a window; within 4,096 tokens it is the same.
    plain = {"window": 0, "pattern": ("global",)}
    assert found.encoder == model.encoder
    assert found.decoder == decoder("gemma2-2b" if wanted.post_norms else "gemma-2b", **plain)
    total = sum(math.prod(shape) for shape in shown.values())
    # So400m/14 with 256 positions, a matrix with bias, and the decoder (see test_params.py).
    trunk, connector = 412_442_352, 1152 * wanted.width + wanted.width
    language = {18: 2_506_172_416, 26: 2_614_341_888}[wanted.depth]
    assert total == trunk + connector + language


def test_the_largest_gemma_2_divides_scores_by_the_width_of_its_heads():
    heads = {"attn/q_einsum/w": (32, 4608, 128), "attn/kv_einsum/w": (2, 16, 4608, 128)}
    norms = ("pre_attention_norm", "pre_ffw_norm", "post_attention_norm", "post_ffw_norm")
    block = heads | {f"{name}/scale": (4608,) for name in norms} | {"mlp/linear": (36_864, 4608)}
    shown = {f"layers/{i}/{name}": shape for i in range(46) for name, shape in block.items()}
    shown["embedder/input_embedding"] = (256_000, 4608)
    found = big_vision.read_decoder(shown, logit_cap=0.0)
    assert (found.query_scale, found.attention_cap, found.logit_cap) == (144.0, 50.0, 0.0)


def test_what_a_checkpoint_does_not_say_must_be_given(tmp_path):
    shown = dict(opened("vit", tmp_path).shapes)
    with pytest.raises(ConfigError, match="has 9 positions, images of 8 have 16 patches"):
        big_vision.read(shown, image_size=8)
    assert big_vision.read(shown, image_size=(18, 2)).encoder.grid == (9, 1)
    fixed = {name: shape for name, shape in shown.items() if name != "pos_embedding"}
    with pytest.raises(ConfigError, match="give its image size"):
        big_vision.read(fixed)
    assert big_vision.read(fixed, image_size=6).encoder.position == "sincos2d"
    with pytest.raises(ConfigError, match="class token"):
        big_vision.read(shown | {"cls": (1, 1, 24)})
    with pytest.raises(ConfigError, match="no ViT of big_vision"):
        big_vision.read({"conv/kernel": (3, 3)})


def member(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def refused(folder: pathlib.Path, words: str, members, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(folder / "bad.npz", "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    with pytest.raises(DataError, match=words):
        npz.Npz(folder / "bad.npz")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    good = member(np.ones(4, np.float32))
    objects = member(np.array([{"a": 1}], object), allow_pickle=True)
    refused(tmp_path, "a.npy holds object, not numbers", [("a.npy", objects)])
    refused(tmp_path, "holds .*, not numbers", [("a.npy", member(np.zeros(2, "V3")))])
    refused(tmp_path, "a.txt is no array", [("a.txt", good)])
    refused(tmp_path, "not as long as its shape", [("a.npy", good[:-4])])
    refused(tmp_path, "not as long as its shape", [("a.npy", good.replace(b"(4,)", b"(5,)"))])
    bomb = member(np.zeros(20 << 20, np.float32))
    refused(tmp_path, "a zip bomb", [("a.npy", bomb)], zipfile.ZIP_DEFLATED)
    twice = [("layers/w.npy", good), ("layers/0/w.npy", member(np.ones(())))]
    refused(tmp_path, "holds layers/0/w twice", twice)
    with pytest.raises(DataError, match="layers are"):
        npz.write(
            tmp_path / "m.npz",
            {"layers/1/w": np.ones(2)},
            npz.Form("params/", frozenset({""})),
        )


def test_a_checkpoint_cut_short_or_damaged_is_refused(tmp_path):
    np.savez(tmp_path / "model.npz", **arrays("vit"))
    whole = (tmp_path / "model.npz").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "bad.npz").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"bad\.npz cannot be read as npz"):
            npz.Npz(tmp_path / "bad.npz")
    damaged = bytearray(whole)
    damaged[whole.index(arrays("vit")["pos_embedding"].tobytes())] ^= 1
    (tmp_path / "bad.npz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"cannot be read.*Bad CRC-32 for file 'pos_embedding.npy'"):
        npz.Npz(tmp_path / "bad.npz").read("pos_embedding")
