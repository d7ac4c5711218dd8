"""What PEFT's folders may say, and what is refused by name."""

import json

import numpy as np
import pytest

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import params
from vlm_jax.presets.decoders import Decoder
from vlm_jax.weights import files, peft

MODEL = Model(decoder=Decoder(31, 12, 2, 20, 3, 1, 4))
QUERY = "base_model.model.model.layers.{}.self_attn.q_proj."
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


def tensors(rank: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"lora_A.weight": (rank, 12), "lora_B.weight": (12, rank)}
    return {
        QUERY.format(i) + name: rng.normal(size=shape).astype(np.float32)
        for i in range(2)
        for name, shape in shapes.items()
    }


def read(folder, settings, arrays):
    folder.mkdir()
    (folder / peft.CONFIG).write_text(json.dumps(settings))
    files.write(folder / peft.TENSORS, arrays, lambda name: [arrays[name]])
    return peft.read(folder, MODEL, "llama")


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, [3, 3]),
        ({"use_rslora": True}, [6 / 2**0.5] * 2),
        ({"alpha_pattern": {"q_proj": 8}}, [4, 4]),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 5}}, [3, 1]),
    ],
)
def test_scales_are_alpha_over_rank_as_patterns_say(changes, scales, tmp_path):
    arrays = tensors()
    found = read(tmp_path / "adapter", SETTINGS | changes, arrays)
    layer = "decoder/stack/blocks/attention/query/"
    np.testing.assert_allclose(found[f"{layer}lora_scale"], scales, rtol=1e-6)
    for i in range(2):
        np.testing.assert_array_equal(
            found[f"{layer}lora_a"][i], arrays[QUERY.format(i) + "lora_A.weight"].T
        )


def test_the_base_layer_that_peft_saves_beside_an_adapter_is_read(tmp_path):
    arrays = tensors()
    for i in range(2):
        arrays[QUERY.format(i) + "base_layer.weight"] = np.full((12, 12), i, np.float32)
    found = read(tmp_path / "adapter", SETTINGS, arrays)
    kernel = found["decoder/stack/blocks/attention/query/kernel"]
    assert (
        kernel.shape == params.abstract(MODEL)["decoder/stack/blocks/attention/query/kernel"].shape
    )
    assert (kernel[0] == 0).all() and (kernel[1] == 1).all()


def without(name: str) -> dict[str, np.ndarray]:
    return {other: array for other, array in tensors().items() if other != QUERY.format(1) + name}


FIRST = QUERY.format(0) + "lora_A.weight"


@pytest.mark.parametrize(
    ("settings", "arrays", "error", "message"),
    [
        ({"peft_type": "IA3"}, tensors(), ConfigError, "peft_type is 'IA3'; expected 'LORA'"),
        ({"bias": "all"}, tensors(), ConfigError, "bias is 'all'"),
        ({"fan_in_fan_out": True}, tensors(), ConfigError, "fan_in_fan_out is True"),
        ({}, without("lora_A.weight"), DataError, "1 of 2 layers"),
        ({}, tensors() | {FIRST: np.ones((3, 12), np.float32)}, DataError, "of one rank"),
        ({}, {n: x for n, x in tensors().items() if "_B" in n}, DataError, "nothing for .*lora_a"),
        ({}, {n: x[:, :7] for n, x in tensors().items()}, DataError, "is it another model's"),
        (
            {},
            tensors() | {"base_model.model.x.lora_A.weight": np.ones(2)},
            DataError,
            "of no layer",
        ),
        ({"lora_alpha": "many"}, tensors(), DataError, "cannot be read"),
        ({"lora_alpha": float("nan")}, tensors(), DataError, "alpha of .* is nan"),
        ({"alpha_pattern": {"(": 2}}, tensors(), DataError, "cannot be read"),
        ({"alpha_pattern": 7}, tensors(), DataError, "cannot be read"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused(settings, arrays, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read(tmp_path / "adapter", SETTINGS | settings, arrays)


def test_pickled_adapters_are_never_opened(tmp_path):
    (tmp_path / peft.CONFIG).write_text(json.dumps(SETTINGS))
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(DataError, match="never opened"):
        peft.read(tmp_path, MODEL, "llama")


def test_what_peft_has_no_place_for_is_refused(tmp_path):
    layer = "decoder/stack/blocks/attention/query/"
    leaves = {path: np.zeros(leaf.shape) for path, leaf in params.abstract(MODEL).items()}
    with pytest.raises(ConfigError, match="nothing to write"):
        peft.write(tmp_path, MODEL, "llama", leaves)
    rng = np.random.default_rng(0)
    own = {f"{layer}lora_a": (2, 12, 3), f"{layer}lora_b": (2, 3, 12), f"{layer}lora_scale": (2,)}
    leaves |= {path: rng.normal(size=shape) for path, shape in own.items()}
    with pytest.raises(ConfigError, match="2 of 4 modules"):
        both = {
            path.replace("query", "out"): leaf for path, leaf in leaves.items() if "lora" in path
        }
        rescaled = {f"{layer}magnitude": np.ones((2, 12))}
        peft.write(tmp_path, MODEL, "llama", leaves | both | rescaled)


PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "num_transformer_submodules": 1}


def embeddings(*shape: int) -> dict[str, np.ndarray]:
    return {"prompt_embeddings": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def test_a_prefix_is_a_key_and_a_value_per_layer(tmp_path):
    arrays, heads = embeddings(5, 2 * 2 * 1 * 4), "decoder/stack/blocks/attention/key/prefix_"
    found = read(tmp_path / "prefix", PREFIX, arrays)
    assert found.keys() == {f"{heads}keys", f"{heads}values"}
    for layer, token in np.ndindex(2, 5):
        row = arrays["prompt_embeddings"][token].reshape(2, 2, 1, 4)[layer]
        for name, one in zip(("keys", "values"), row, strict=True):
            np.testing.assert_array_equal(found[heads + name][layer, token], one)
    peft.write(tmp_path / "again", MODEL, "llama", found)
    again = files.Safetensors([tmp_path / "again" / peft.TENSORS]).read("prompt_embeddings")
    np.testing.assert_array_equal(again, arrays["prompt_embeddings"])


@pytest.mark.parametrize(
    ("changes", "arrays", "error", "message"),
    [
        ({"num_transformer_submodules": 2}, embeddings(5, 16), ConfigError, "expected a decoder's"),
        ({}, embeddings(5, 12), DataError, "of 2 layers, 2 and 1 heads of 4: is it another"),
        ({}, embeddings(0, 16), DataError, "expected one row per virtual token"),
        ({}, embeddings(5, 16) | tensors(), DataError, "expected prompt_embeddings alone"),
    ],
)
def test_what_is_no_prefix_of_this_decoder_is_refused(changes, arrays, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read(tmp_path / "prefix", PREFIX | changes, arrays)
