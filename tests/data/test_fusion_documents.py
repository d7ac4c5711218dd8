"""Documents of models that look at images by cross-attention."""

import dataclasses

import numpy as np
import pytest

from vlm_jax import config as configs
from vlm_jax import schema
from vlm_jax.data import documents, sources, tokenizer
from vlm_jax.errors import ConfigError
from vlm_jax.presets.fusion import CrossAttention

TOKENIZER = tokenizer.load("embedded")
CROSS = CrossAttention(24, heads=3, kv_heads=1, head_dim=6, every=2)


def fused(config: configs.Config, **fields) -> configs.Config:
    fusion = dataclasses.replace(CROSS, **fields)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, fusion=fusion))


def test_an_image_takes_one_placeholder_where_no_visual_token_stands(small, spoiled):
    example = sources.open_source("made:one", "train").example(3, np.random.default_rng(3))
    read = documents.document(example, small(), TOKENIZER)
    seen = documents.document(example, fused(small()), TOKENIZER)
    both = documents.document(example, fused(small(), both=True), TOKENIZER)
    np.testing.assert_array_equal(both.visual_index, read.visual_index)
    placeholder = seen.tokens == TOKENIZER.image
    assert placeholder.sum() == len(seen.pixels) == 3 and (seen.visual_index == -1).all()
    np.testing.assert_array_equal(seen.image_index, np.cumsum(placeholder) - 1)
    words = read.tokens != TOKENIZER.image
    np.testing.assert_array_equal(seen.tokens[~placeholder], read.tokens[words])
    np.testing.assert_array_equal(seen.image_index[~placeholder], read.image_index[words])
    np.testing.assert_array_equal(seen.loss_weights[~placeholder], read.loss_weights[words])


def test_a_config_with_fusion_survives_config_json(small):
    config = fused(small(), gate="vector", width=48)
    assert configs.resolve(schema.plain(config)) == config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 4, "kv_heads": 3}, "model.fusion.heads is 4; expected a multiple of its 3"),
        ({"every": 0}, "model.fusion.every is 0; expected at least 1"),
        ({"start": 99}, "model.fusion.start is 99; expected one of the decoder's"),
        ({"count": 99}, "model.fusion.count is 99; expected no block after the last"),
        ({"both": True, "width": 7}, "model.fusion.width is 7; expected the decoder's width"),
        ({"gate": "row"}, "model.fusion.gate is 'row'; expected one of number, vector, none"),
    ],
)
def test_fusion_that_fits_no_decoder_is_refused_by_name(small, fields, message):
    with pytest.raises(ConfigError, match=message):
        configs.resolve(schema.plain(fused(small(), **fields)))


def test_words_are_not_read_from_visual_tokens_of_another_width(small):
    config = fused(small(), width=7)
    train = dataclasses.replace(config.train, bag_of_words=0.5)
    with pytest.raises(ConfigError, match="expected 0 where visual tokens"):
        configs.check(dataclasses.replace(config, train=train))
