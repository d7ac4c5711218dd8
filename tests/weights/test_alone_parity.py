"""Pairs' losses and gradients, and classes with heads that we carry, against transformers."""

import dataclasses

import goldens
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import alone_cases  # noqa: E402
import published  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from vlm_jax.models import params  # noqa: E402
from vlm_jax.training import objectives  # noqa: E402
from vlm_jax.weights import checking, conversion, registry, tables  # noqa: E402

pytestmark = pytest.mark.slow
LOSSES = {
    "clip": objectives.softmax_pairs,
    "siglip": objectives.sigmoid_pairs,
    "siglip2": objectives.sigmoid_pairs,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_the_gradient_of_every_leaf_equal_those_of_transformers(name, tmp_path):
    case = published.CASES[name]
    module, arrays = published.make(case, seed=2), published.case_inputs(case, seed=2)
    # As many texts as pictures, so that each has its own.
    count = len(arrays["pixel_values"])
    arrays |= {key: arrays[key][:count] for key in ("input_ids", "attention_mask") if key in arrays}
    given = {key: torch.from_numpy(array) for key, array in arrays.items()}
    loss = module(**given, return_loss=True).loss
    loss.backward()
    weights = _saved(module, tmp_path / "weights")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)
    wanted = _saved(module, tmp_path / "gradients")

    known = registry.family(name)
    model = checking.exact(known.read(case.config.to_dict()))
    seen = known.inputs(model, {}, arrays)
    fitted = dataclasses.replace(model, encoder=seen.encoder)
    shapes = {path: leaf.shape for path, leaf in params.abstract(model).items()}
    rows = known.rows(model)

    def ours(leaves):
        vlm = params.build(fitted, leaves)
        return LOSSES[name](vlm.similarity(seen.images, seen.tokens, seen.mask))

    value, gradients = jax.jit(jax.value_and_grad(ours))(tables.gather(rows, shapes, weights))
    np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-4)
    wanted = tables.gather(rows, shapes, wanted)
    assert gradients.keys() == wanted.keys()
    # Those of key biases are rounding errors of 0, for a softmax does not feel them.
    floor = 1e-6 * max(np.linalg.norm(gradient) for gradient in wanted.values())
    for path, gradient in wanted.items():
        error = np.linalg.norm(gradients[path] - gradient)
        assert error <= max(1e-4 * np.linalg.norm(gradient), floor), (path, error)


def _saved(module, folder) -> dict[str, np.ndarray]:
    module.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


SAM = alone_cases.CASES["sam_vision"]["config"].to_dict()
DINO = alone_cases.RATIO | {"image_size": 12, "patch_size": 3, "num_labels": 3}
CARRYING = {
    "dinov2": (
        transformers.Dinov2ForImageClassification,
        transformers.Dinov2Config(**DINO),
        alone_cases.pictures(10, 15),
        lambda module, x: module.dinov2(x).last_hidden_state,
    ),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=0),
        alone_cases.pictures(9, 14),
        lambda module, x: module.dinov2_with_registers(x).last_hidden_state,
    ),
    "convnext": (
        transformers.ConvNextForImageClassification,
        transformers.ConvNextConfig(**alone_cases.STAGES, num_labels=3),
        alone_cases.pictures(14, 17),
        lambda module, x: module.convnext(x).last_hidden_state,
    ),
    "convnextv2": (
        transformers.ConvNextV2ForImageClassification,
        transformers.ConvNextV2Config(**alone_cases.STAGES, num_labels=3),
        alone_cases.pictures(15, 13),
        lambda module, x: module.convnextv2(x).last_hidden_state,
    ),
    "sam": (
        transformers.SamModel,
        transformers.SamConfig(
            vision_config=SAM | {"output_channels": 8},
            prompt_encoder_config={"hidden_size": 8, "image_size": 20, "patch_size": 4},
            mask_decoder_config={
                "hidden_size": 8,
                "mlp_dim": 6,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "iou_head_hidden_dim": 5,
            },
        ),
        alone_cases.pictures(20, 20),
        lambda module, x: module.get_image_embeddings(x),
    ),
}


@pytest.mark.parametrize("name", CARRYING)
def test_a_class_with_more_than_its_encoder_goes_out_as_it_came(name, tmp_path):
    kind, config, inputs, state = CARRYING[name]
    case = published.Case(config, inputs, kind, generates=False)
    module, arrays = published.make(case), published.case_inputs(case)
    published.save(tmp_path / "source", module)
    stored = conversion.import_folder(tmp_path / "source", tmp_path / "model")
    with torch.no_grad():
        wanted = state(module, torch.from_numpy(arrays["pixel_values"])).numpy()
    found = checking.run(stored, arrays)["last_hidden_state"]
    assert found.shape == wanted.shape
    assert goldens.relative_error(found, wanted, {}) <= 1e-4

    conversion.export_folder(stored, tmp_path / "exported")
    loaded, report = kind.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.architectures == [kind.__name__]
    again = dict(loaded.state_dict())
    for key, tensor in module.state_dict().items():
        np.testing.assert_array_equal(again[key].numpy(), tensor.numpy(), err_msg=key)
