"""LLaVA 1.0 and 1.5: names of published LlavaForConditionalGeneration folders."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.weights import fields, towers
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import llava_projector
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "LlavaForConditionalGeneration"
# From the names that transformers 5 gives in memory, and writes for a tower alone.
RENAMES = (
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
# The other way.
LOADED = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^(multi_modal_projector|image_newline)", r"model.\1"),
)
SELECT = {"default": False, "full": True}  # whether the class token is kept
VISION, TEXT = "vision_tower.", "language_model."
# Where config.json has none: CLIP ViT-L/14 at 336 pixels.
VISION_CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}


def renames(model: Model) -> tuple[tuple[str, str], ...]:
    """How names of folders become those of the table."""
    tower = towers.kind(towers.ENCODERS, model.encoder)
    if tower in ("clip_vision_model", "siglip_vision_model"):
        return (*RENAMES, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."))
    return RENAMES


def loaded(model: Model) -> tuple[tuple[str, str], ...]:
    """How names of folders become those in memory."""
    return LOADED


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    select = hf.get("vision_feature_select_strategy", "default")
    fields.expect(
        {"vision_feature_select_strategy": select}, vision_feature_select_strategy=tuple(SELECT)
    )
    vision = fields.part(hf, "vision_config", VISION_CONFIG)
    encoder = towers.read(towers.ENCODERS, vision, "clip_vision_model")
    taps = _taps(hf, encoder.depth)
    if not SELECT[select] and not encoder.class_token:
        raise ConfigError(
            "vision_feature_select_strategy of config.json is 'default', which drops the first "
            "feature; expected 'full', as the encoder has no class token"
        )
    encoder = dataclasses.replace(
        encoder,
        layer=max(taps),
        taps=taps if len(taps) > 1 else (),
        final_norm=False,
        keep_class=SELECT[select] and encoder.class_token,
    )
    text = fields.part(hf, "text_config")
    # Either level may say so; that an output matrix comes all the same is seen when it is read.
    tied = hf.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    decoder = towers.read(towers.DECODERS, {**text, "tie_word_embeddings": tied}, "llama")
    return Model(encoder, llava_projector.read(hf), towers.uncapped(decoder))


def _taps(hf: Mapping[str, Any], depth: int) -> tuple[int, ...]:
    """Blocks whose outputs are the features, before the last norm, counted from the last one."""
    given = hf.get("vision_feature_layer", -2)
    layers = given if isinstance(given, list) else [given]
    if not layers or not all(type(layer) is int for layer in layers):
        raise ConfigError(
            f"vision_feature_layer of config.json is {given!r}; expected a number or several"
        )
    # Theirs count from 0, what the first block reads, or from the end.
    return tuple(layer if layer < 0 else layer - depth - 1 for layer in layers)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    encoder = model.encoder
    select = "default" if encoder.class_token and not encoder.keep_class else "full"
    return {
        "model_type": "llava",
        "vision_config": towers.write(towers.ENCODERS, encoder),
        "text_config": towers.write(towers.DECODERS, model.decoder),
        "vision_feature_layer": list(encoder.taps) or encoder.layer,
        "vision_feature_select_strategy": select,
        "image_seq_length": model.visual_tokens,
        "tie_word_embeddings": model.decoder.tied,
        **llava_projector.write(model.connector),
    }


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    encoder = towers.ENCODERS[towers.kind(towers.ENCODERS, model.encoder)]
    return [
        *placed(encoder.rows(model.encoder), "encoder/", VISION),
        *placed(llava_projector.rows(model.connector), "connector/"),
        *placed(towers.decoder_rows(model.decoder), "decoder/", TEXT),
    ]


def carried(model: Model) -> tuple[str, ...]:
    """Names of what the system does not compute: blocks after the features, heads."""
    encoder = towers.ENCODERS[towers.kind(towers.ENCODERS, model.encoder)]
    return tuple(VISION.replace(".", r"\.") + pattern for pattern in encoder.CARRIED)


def image_token(hf: Mapping[str, Any]) -> int:
    """Id of the token that stands where a visual token will."""
    return fields.image_token(hf, 32_000)


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [n, 3, H, W], in the order of their placeholders."""
    prompts = inputs_.text(arrays, ("pixel_values",))
    if "pixel_values" not in arrays:
        return prompts
    pictures = inputs_.pictures(model.encoder, inputs_.array(arrays, "pixel_values", 4))
    return inputs_.in_sequence(prompts, model, image_token(hf), pictures)
