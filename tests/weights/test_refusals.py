"""Sources that are wrong, damaged, or would have to be executed: refused by name, never run."""

import dataclasses
import json
import pathlib

import goldens
import ml_dtypes
import numpy as np
import pytest

from vlm_jax.errors import ConfigError, DataError, VlmError
from vlm_jax.weights import checking, conversion, files, store
from vlm_jax.weights.families import llama

NORM = "model.layers.1.input_layernorm.weight"


def publish(folder: pathlib.Path, **changes) -> pathlib.Path:
    """A Llama's folder; tensors by name are replaced, or dropped where None."""
    golden = goldens.read("llama")
    tensors = {n: t for n, t in (golden.tensors | changes).items() if t is not None}
    return goldens.publish(golden._replace(tensors=tensors), folder)


def edit(folder: pathlib.Path, **fields) -> pathlib.Path:
    """Changes config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def refusal(folder: pathlib.Path, kind: type[VlmError]) -> str:
    """The message with which a folder is refused; nothing that looks like a model is left."""
    target = folder.parent / "model"
    with pytest.raises(kind) as caught:
        conversion.import_folder(folder, target)
    assert not store.is_model(target)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, "missing, the first of them " + NORM),
        ({"model.layers.7.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}, "left over"),
        ({NORM: np.zeros(13, np.float32)}, f"{NORM} has shape (13,); by config.json it is (12,)"),
        # As many numbers in another shape would otherwise be read as nonsense.
        ({"lm_head.weight": np.zeros((12, 41), np.float32)}, "(12, 41); by config.json it is"),
        ({NORM: np.zeros(12, np.complex64)}, "C64"),
    ],
)
def test_tensors_that_config_json_does_not_speak_of(changes, message, tmp_path, monkeypatch):
    monkeypatch.setitem(files.CODES, np.dtype(np.complex64), "C64")
    assert message in refusal(publish(tmp_path / "source", **changes), DataError)


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_truncated_file(cut, tmp_path):
    source = publish(tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "model.safetensors is no whole safetensors file" in refusal(source, DataError)


def test_a_part_that_the_index_names_but_is_missing(tmp_path):
    source = goldens.publish(goldens.read("llama"), tmp_path / "source", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(source, DataError)


def test_an_index_that_leads_out_of_the_folder(tmp_path):
    source = goldens.publish(goldens.read("llama"), tmp_path / "source", shards=2)
    index = {"weight_map": {NORM: "../secret.safetensors"}}
    (source / files.INDEX).write_text(json.dumps(index))
    assert "expected a file beside it" in refusal(source, DataError)


def test_a_pickle_is_never_opened(tmp_path):
    source = publish(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(source, DataError)


def test_code_of_its_own_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    source = edit(publish(tmp_path / "source"), auto_map={"AutoModel": "modeling.Model"})
    (source / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    assert "auto_map" in refusal(source, DataError)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'"),
        ({"model_type": None}, "unknown model_type None"),
        ({"model_type": ["llama"]}, "unknown model_type ['llama']"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"num_hidden_layers": 10**9}, "speaks of 1000000000 layers"),
        ({"hidden_size": 0}, "not of a llama"),
        ({"intermediate_size": -3}, "not of a llama"),
        ({"vocab_size": "many"}, "not of a llama"),
    ],
)
def test_settings_that_no_preset_has(fields, message, tmp_path):
    assert message in refusal(edit(publish(tmp_path / "source"), **fields), ConfigError)


def test_what_is_no_folder_of_transformers(tmp_path):
    (tmp_path / "source").mkdir()
    assert "no config.json" in refusal(tmp_path / "source", DataError)
    (tmp_path / "source" / "config.json").write_text("{")
    assert "cannot be read" in refusal(tmp_path / "source", DataError)


def test_a_folder_that_holds_something_else_is_not_written_to(tmp_path):
    source = publish(tmp_path / "source")
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(ConfigError, match="holds something else"):
        conversion.import_weights(source, source)
    stored = conversion.import_weights(source, tmp_path / "model")
    with pytest.raises(ConfigError, match="own folder"):
        conversion.export_folder(stored, tmp_path / "model")
    assert sorted(path.name for path in source.iterdir()) == before
    assert store.open_model(tmp_path / "model").model == stored.model
    conversion.import_weights(source, tmp_path / "model")  # a model's folder is written anew


def test_a_tied_output_matrix_of_its_own_is_kept(tmp_path):
    """As transformers does, which ties only what is equal."""
    source = edit(publish(tmp_path / "source"), tie_word_embeddings=True)
    stored = conversion.import_folder(source, tmp_path / "model")
    assert not stored.model.decoder.tied
    golden = goldens.read("llama")
    same = {"lm_head.weight": golden.tensors["model.embed_tokens.weight"]}
    source = edit(publish(tmp_path / "tied", **same), tie_word_embeddings=True)
    assert conversion.import_folder(source, tmp_path / "again").model.decoder.tied


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        # What transformers does not look at in a Llama.
        ({"query_pre_attn_scalar": 3, "attn_logit_softcapping": 2.0}, {}),
        ({"sliding_window": 3, "layer_types": ["sliding_attention"] * 2}, {}),
        ({"pretraining_tp": 2}, {}),
        # As GPT-NeoX-20B calls it.
        ({"hidden_act": "gelu_fast"}, {"activation": "gelu_tanh"}),
        # The older field wins.
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_factor": 2.0}),
    ],
)
def test_fields_of_other_families_and_times(fields, changes, tmp_path):
    plain = conversion.import_folder(publish(tmp_path / "a"), tmp_path / "model").model.decoder
    source = edit(publish(tmp_path / "b"), **fields)
    found = conversion.import_folder(source, tmp_path / "other").model.decoder
    assert found == dataclasses.replace(plain, **changes)


_GEMMA3 = {"model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window": 2}


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        # Only Gemma 3 had this field.
        (_GEMMA3 | {"sliding_window_pattern": 3}, ("local", "local", "global")),
        (_GEMMA3 | {"model_type": "gemma2", "sliding_window_pattern": 3}, ("local", "global")),
    ],
)
def test_which_layers_of_gemma_are_local(config, pattern):
    assert llama.read(config).pattern == pattern


@pytest.mark.parametrize(
    ("rope", "thetas"),
    [
        ({"sliding_attention": {"rope_theta": 30.0}}, (1e6, 30.0)),
        ({"full_attention": {"rope_theta": 70.0}}, (70.0, 1e4)),
        # transformers looks for no others.
        ({"rope_type": "default", "rope_theta": 55.0}, (1e6, 1e4)),
    ],
)
def test_gemma3_rope_parameters_that_speak_of_one_kind_of_layer_or_of_none(rope, thetas):
    decoder = llama.read(_GEMMA3 | {"rope_parameters": rope})
    assert (decoder.rope_theta, decoder.local_theta) == thetas


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": None}, "sliding_window is null"),
        ({"layer_types": ["sliding_attention"]}, "expected 3 times"),
        ({"layer_types": ["chunked_attention"] * 3}, "expected 3 times sliding_attention"),
    ],
)
def test_layers_that_transformers_could_not_run(fields, message):
    # Qwen2 takes its window only with `use_sliding_window`.
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    config = {"model_type": "gemma2", "num_hidden_layers": 3} | kinds
    with pytest.raises(ConfigError, match=message):
        llama.read(config | fields)
    with pytest.raises(ConfigError, match="use_sliding_window false"):
        llama.read(config | {"model_type": "qwen2"})


def test_a_gemma_without_local_layers_goes_out_with_a_window():
    """Or transformers could not run it: it makes both masks."""
    decoder = llama.read(_GEMMA3 | {"layer_types": ["full_attention"] * 3})
    assert "sliding_window" not in llama.write(decoder, "gemma3_text")


@pytest.mark.parametrize(("model_type", "context"), [("llama", 2048), ("mistral", 131_072)])
def test_the_context_that_scaled_frequencies_start_from(model_type, context):
    rope = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    config = {"model_type": model_type, "rope_scaling": rope}
    assert llama.read(config).rope_original == context
    assert llama.read(config | {"original_max_position_embeddings": 77}).rope_original == 77


def test_layers_of_different_dtypes_keep_every_bit(tmp_path):
    wide = np.full(12, 1 + 2**-20, np.float32)
    names = ["model.layers.0.input_layernorm.weight", NORM]
    narrow = np.ones(12, ml_dtypes.bfloat16)
    source = publish(tmp_path / "source", **dict(zip(names, (narrow, wide))))
    stored = conversion.import_folder(source, tmp_path / "model")
    leaf = stored.parameters.read("decoder/stack/blocks/norm1/scale")
    np.testing.assert_array_equal(leaf, np.stack([narrow.astype(np.float32), wide]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "lack input_ids"),
        ({"input_ids": np.zeros(3, np.int64)}, "expected 2 axes"),
        ({"input_ids": np.array([["a"]])}, "expected 2 axes of numbers"),
        ({"input_ids": np.array([[41]])}, "reach 41; the model has 41 tokens"),
        (
            {"input_ids": np.ones((1, 4), int), "attention_mask": np.array([[1, 0, 1, 1]])},
            "has holes",
        ),
        ({"input_ids": np.zeros((1, 3), np.int64), "pixel_values": np.zeros(1)}, "pixel_values"),
    ],
)
def test_inputs_that_a_model_does_not_take(arrays, message, tmp_path):
    stored = conversion.import_folder(publish(tmp_path / "source"), tmp_path / "model")
    with pytest.raises((ConfigError, DataError), match=message):
        checking.run(stored, arrays)
