"""What decides the stream of training batches: a position of another stream is refused by name."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.config import Config
from vlm_jax.data import formats, order, packing, sources
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import ConfigError
from vlm_jax.presets.resizing import SQUASH
from vlm_jax.schema import plain

_VERSION = 2  # of the state; raise it when the same state would lead to other batches


def require_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """That a saved position belongs to this stream.

    Raises:
      ConfigError: it does not, naming what differs.
    """
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"the saved position of the data has {name} {old.get(name)!r}, this config "
                f"{new.get(name)!r}: go on with the old value, or start in another workdir"
            )


def of(
    config: Config, split: str, opened: Mapping[str, sources.Source], tokenizer: Tokenizer
) -> dict[str, Any]:
    """All that decides which documents come in which order, as plain JSON.

    Args:
      config, split: of the stream.
      opened: its sources by name.
      tokenizer: of the run.
    """
    data = config.data
    return {
        "version": _VERSION,
        "seed": config.seed,
        "split": split,
        "mixture": {name: weight for name, weight in data.mixture.items() if weight > 0},
        "schedule": [plain(stage) for stage in data.schedule],
        "size_power": data.size_power,
        "caps": dict(data.caps),
        "loss_weights": dict(data.loss_weights),
        "examples": {name: len(source) for name, source in opened.items()},
        "tokenizer": tokenizer.fingerprint,
        "template": data.template,
        "attention": data.attention,
        "images": data.images,
        "rows": data.rows,
        "tokens": data.tokens,
        "overlong": data.overlong,
        "images_per_row": data.images_per_row,
        **({"patches_per_row": data.patches_per_row} if data.patches_per_row else {}),
        "visual_tokens": config.model.image_positions,
        **_sizes(config),
        **_instructions(config),
        "packer": packing.VERSION,
        "pool": data.pool,
        "lanes": data.lanes,
        "views": data.views,
        **order.fingerprint(opened, data.views),
        **_corpora(opened),
    }


def _corpora(opened: Mapping[str, sources.Source]) -> dict[str, Any]:
    """Of the files of the user's own corpora; nothing where there are none."""
    found = {n: s.fingerprint for n, s in opened.items() if isinstance(s, formats.CorpusSource)}
    return {"corpora": found} if found else {}


def _instructions(config: Config) -> dict[str, Any]:
    """Of what the connector reads; nothing where it reads none."""
    if not config.model.instructed:
        return {}
    reader = tokenizers.for_instructions(config)
    return {"instructions": [reader.fingerprint, config.data.text_tokens]}


def _sizes(config: Config) -> dict[str, Any]:
    """Of the images of all encoders; with one alone as positions were saved at first."""
    # Lists, as JSON gives them back.
    size = config.model.encoder.image_size
    found = {"image_size": size if isinstance(size, int) else list(size)}
    extra = [list(encoder.size) for encoder in config.model.extra_encoders]
    resize = [encoder.resize for encoder in config.model.encoders]
    others = {"resize": list(map(repr, resize))} if any(how != SQUASH for how in resize) else {}
    return found | ({"extra_image_sizes": extra} if extra else {}) | others
