"""What of a config contradicts itself, and what was expected."""

import itertools
import math
import typing
from collections.abc import Iterator
from typing import Any

from vlm_jax.config.tree import BASES, FIELDS, MODES, Augment, Config, Data, Model, Rule
from vlm_jax.errors import ConfigError

CHOICES = {
    "data.attention": ("causal", "prefix"),
    "data.overlong": ("reject", "truncate"),
    "train.optimizer": ("adamw", "adafactor", "lion", "muon"),
    "train.schedule": ("cosine", "linear", "constant", "wsd", "rsqrt"),
    "train.decay_shape": ("linear", "cosine", "sqrt"),
    "train.pairs": ("sigmoid", "softmax"),
    "data.augment.background": ("white", "random"),
}


def check(config: Config) -> None:
    """Raises ConfigError where values contradict each other."""
    for path, choices in CHOICES.items():
        value = config
        for name in path.split("."):
            value = getattr(value, name)
        _require(value in choices, path, value, f"one of {', '.join(choices)}")
    check_model(config.model, config.data.tokens)
    data, model = config.data, config.model
    reads = model.decoder is not None or model.pair
    _require(reads, "model.decoder", None, "a decoder, or a text tower beside an encoder")
    if model.pair:
        _check_pair(config)
    else:
        _check_beside(config)
    _check_mixtures(data)
    divides = data.lanes > 0 and data.rows % data.lanes == 0
    _require(divides, "data.lanes", data.lanes, f"a divisor of data.rows, {data.rows}")
    square = all(len(set(e.size)) == 1 and e.resize.fixed for e in model.encoders)
    _require(
        square or not data.augment.repaints,
        "data.augment",
        data.augment,
        "crop, flip and upscale only, where images are no squares or several of a picture",
    )
    _check_augment(data.augment)
    _check_views(model, data)
    _check_patches(data.patches_per_row, getattr(model.encoder, "max_patches", 0))
    _require(data.views >= 1, "data.views", data.views, "at least 1")
    _require(
        model.fusion is None
        or model.visual_width == model.decoder.width
        or not config.train.bag_of_words,
        "train.bag_of_words",
        config.train.bag_of_words,
        "0 where visual tokens are not as wide as the decoder, whose output matrix it reads with",
    )
    if model.instructed:
        for name in ("bag_of_words", "contrastive"):
            weight = getattr(config.train, name)
            expected = "0 beside a connector that reads instructions: the batch has one second text"
            _require(weight == 0, f"train.{name}", weight, expected)
        longest = model.connector.positions
        fits = data.text_tokens <= longest
        expected = f"at most the {longest} positions of the connector"
        _require(fits, "data.text_tokens", data.text_tokens, expected)
    _check_accumulation(config)
    _check_feature_cache(config)
    for name, least in (
        ("sigmas", 0),
        ("floor", 0),
        ("window", 2),
        ("patience", 1),
        ("rollbacks", 0),
    ):
        value = getattr(config.guard, name)
        _require(least <= value < math.inf, f"guard.{name}", value, f"at least {least}")
    for name in ("z_loss", "neftune"):
        value = getattr(config.train, name)
        _require(0 <= value < math.inf, f"train.{name}", value, "at least 0")
    temperature = config.train.temperature
    _require(temperature > 0, "train.temperature", temperature, "more than 0")
    for i, rule in enumerate(config.adaptation):
        _check_rule(rule, f"adaptation[{i}]")
    if data.images:
        _require(model.encoder is not None, "model.encoder", None, "an encoder, with data.images")
        _require(
            model.image_positions < data.tokens,
            "data.tokens",
            data.tokens,
            f"room for an image's {model.image_positions} visual tokens and text",
        )


def _check_pair(config: Config) -> None:
    data, train = config.data, config.train
    _require(data.images, "data.images", False, "True: a text tower compares texts with images")
    _require(data.images_per_row == 1, "data.images_per_row", data.images_per_row, "1 of a pair")
    length = config.model.text.length
    _require(data.tokens == length, "data.tokens", data.tokens, f"the text tower's {length}")
    unused = ["bag_of_words", "contrastive", "z_loss", "neftune", "pairs_weight", "masked"]
    if config.model.matched:
        heads = config.model.text
        _require(heads.generates, "model.text.generates", False, "True in training")
        _require(heads.temperature > 0, "model.text.temperature", 0, "more than 0 in training")
        _require(train.pairs == "softmax", "train.pairs", train.pairs, "softmax of a Q-Former")
    else:
        unused.append("label_smoothing")
    for name in unused:
        _require(not getattr(train, name), f"train.{name}", getattr(train, name), "0 of pairs")
    steps = config.eval.text_only_steps
    _require(not steps, "eval.text_only_steps", steps, "0 of pairs")
    expected = "1 of pairs, which compare the whole batch"
    _require(train.accumulate == 1, "train.accumulate", train.accumulate, expected)


def _check_beside(config: Config) -> None:
    """Of what a captioner learns besides telling one token after the other."""
    model, train = config.model, config.train
    share = train.masked
    _require(0 <= share <= 1, "train.masked", share, "a share from 0 to 1")
    masked = model.decoder.masked or not share
    _require(masked, "model.decoder.masked", False, "True beside train.masked")
    weight, text = train.pairs_weight, model.text
    _require(0 <= weight < math.inf, "train.pairs_weight", weight, "at least 0")
    _require(text is not None or not weight, "train.pairs_weight", weight, "0 without model.text")
    if text is None:
        return
    expected = "more than 0, or no model.text, which nothing else trains"
    _require(weight > 0, "train.pairs_weight", weight, expected)
    _require(text.pool == "last", "model.text.pool", text.pool, "last of an image's own text")
    length, size = config.data.text_tokens, text.length
    _require(length <= size, "data.text_tokens", length, f"at most the text tower's {size}")
    vocab, expected = model.decoder.tokens, "as many as the decoder has, whose tokenizer it shares"
    _require(text.vocab >= vocab, "model.text.vocab", text.vocab, f"{expected}: {vocab}")
    asked = "one that reads no second text, as those are the images' own"
    _require(not model.instructed, "model.connector", model.connector, asked)
    expected = "1 beside train.pairs_weight, which compares the images of the whole batch"
    _require(train.accumulate == 1, "train.accumulate", train.accumulate, expected)


def _check_rule(rule: Rule, path: str) -> None:
    _require(rule.mode in MODES, f"{path}.mode", rule.mode, f"one of {', '.join(MODES)}")
    read = FIELDS.get(rule.mode, ())
    for field in sorted({field for fields in FIELDS.values() for field in fields}):
        value = getattr(rule, field)
        expected = f"0: the rule is {rule.mode}"
        _require(field in read or not value, f"{path}.{field}", value, expected)
    _require("rank" not in read or rule.rank > 0, f"{path}.rank", rule.rank, "at least 1")
    scaled = "alpha" not in read or 0 < rule.alpha < math.inf
    _require(scaled, f"{path}.alpha", rule.alpha, "more than 0")
    _require(rule.hidden >= 0, f"{path}.hidden", rule.hidden, "at least 0")
    _require(rule.base in BASES, f"{path}.base", rule.base, f"one of {', '.join(BASES)}")
    still = rule.mode != "full" or not rule.quantises
    _require(still, f"{path}.base", rule.base, "float: the rule is full, so kernels train")
    _require(0 <= rule.dropout < 1, f"{path}.dropout", rule.dropout, "at least 0 and less than 1")


def _check_accumulation(config: Config) -> None:
    count, rows = config.train.accumulate, config.data.rows
    divides = count > 0 and rows % count == 0
    _require(divides, "train.accumulate", count, f"a divisor of data.rows, {rows}")
    _require(
        count == 1 or not config.train.contrastive,
        "train.accumulate",
        count,
        "1 beside train.contrastive, which compares the images of the whole batch",
    )


def _check_feature_cache(config: Config) -> None:
    size, data = config.train.feature_cache, config.data
    _require(0 <= size < math.inf, "train.feature_cache", size, "at least 0")
    if not size:
        return
    expected = "the defaults beside train.feature_cache: changed pictures do not come again"
    _require(data.augment == Augment(), "data.augment", data.augment, expected)
    shared = data.patches_per_row
    _require(not shared, "data.patches_per_row", shared, "0 beside train.feature_cache")
    for path, encoder in _encoders(config.model):
        for name in ("dropout", "drop_path"):
            rate = getattr(encoder, name, 0.0)
            expected = "0 beside train.feature_cache: what is dropped differs at every step"
            _require(rate == 0, f"{path}.{name}", rate, expected)


def _check_mixtures(data: Data) -> None:
    mixtures = {"data.mixture": data.mixture} | {
        f"data.schedule[{i}].mixture": stage.mixture for i, stage in enumerate(data.schedule)
    }
    for path, mixture in mixtures.items():
        weights, given = mixture.values(), dict(mixture)
        _require(
            any(w > 0 for w in weights), path, given, "at least one source with a positive weight"
        )
        finite = all(0 <= w < math.inf for w in weights)
        _require(finite, path, given, "finite weights of at least 0")
    starts = [0, *(stage.start for stage in data.schedule)]
    rising = all(a < b for a, b in itertools.pairwise(starts))
    _require(rising, "data.schedule", starts[1:], "starts above 0, each later than the one before")
    known = {name for mixture in mixtures.values() for name in mixture}
    for field, least in ("caps", 1), ("loss_weights", 0):
        for name, value in getattr(data, field).items():
            path = f"data.{field}.{name}"
            _require(name in known, path, value, f"a source of a mixture: {', '.join(known)}")
            _require(least <= value < math.inf, path, value, f"at least {least}")


def _check_patches(shared: int, most: int) -> None:
    """Of rows whose images share patches."""
    if shared:
        expected = "0, as all images of an encoder without max_patches have one size"
        _require(most > 0, "data.patches_per_row", shared, expected)
        expected = f"0, or room for an image's {most} patches"
        _require(shared >= most, "data.patches_per_row", shared, expected)


def _encoders(model: Model) -> Iterator[tuple[str, Any]]:
    """Every encoder's preset by its path in the config."""
    for i, encoder in enumerate(model.encoders):
        yield (f"model.extra_encoders[{i - 1}]" if i else "model.encoder"), encoder


def _check_views(model: Model, data: Data) -> None:
    """Whether there is room for what pictures become, and whether the connector takes it."""
    for path, encoder in _encoders(model):
        how = encoder.resize
        room, native = getattr(encoder, "max_patches", 0), how.mode in how.NATIVE
        _require(
            native or room in (0, math.prod(encoder.grid)),
            f"{path}.max_patches",
            room,
            f"0 or {math.prod(encoder.grid) if room else 0}: its resize mode makes images of "
            "image_size only",
        )
        fewest = how.fewest(encoder)
        _require(
            len(model.encoders) == 1 or (how.mode not in how.TILES and fewest == 1),
            f"{path}.resize.mode",
            how.mode,
            "one that makes one view of a picture, as several encoders look at it",
        )
        _require(
            fewest <= data.images_per_row or not data.images,
            "data.images_per_row",
            data.images_per_row,
            f"at least the {fewest} images that a picture becomes",
        )
        gridded = getattr(model.connector, "pool", "none") != "none"
        lines = getattr(model.connector, "newline", "none") == "row"
        kind = getattr(model.connector, "kind", "")
        _require(
            not native or not (gridded or lines or kind in ("flat", "sva")),
            f"{path}.resize.mode",
            how.mode,
            "one that makes images of one size, as the connector needs their grid",
        )


def _check_augment(augment: Augment) -> None:
    (small, large), (low, high) = augment.crop, augment.upscale
    expected = "two shares of the area above 0 and up to 1, the smaller first"
    _require(0 < small <= large <= 1, "data.augment.crop", augment.crop, expected)
    _require(0 <= augment.flip <= 1, "data.augment.flip", augment.flip, "a chance from 0 to 1")
    expected = "two lengths in pixels, the smaller first"
    _require(0 <= low <= high, "data.augment.upscale", augment.upscale, expected)


def check_model(model: Model, longest: int = 0) -> None:
    """Raises ConfigError where a model's presets contradict each other.

    Args:
      model: any of its towers may be absent.
      longest: text positions that the decoder must have room for.
    """
    for path, encoder in _encoders(model):
        _check_preset(encoder, path, encoder.problems())
        _check_preset(encoder.resize, f"{path}.resize", encoder.resize.problems(encoder))
    if model.connector is not None:
        _require(model.encoder is not None, "model.encoder", None, "what the connector looks at")
        spoken = model.decoder is not None or model.matched
        _require(spoken, "model.decoder", None, "what the connector speaks to")
        problems = model.connector.problems(model.visual_width, model.encoders)
        _check_preset(model.connector, "model.connector", problems)
        width = model.visual_width
        out = model.connector.output(width)
        _require(out == width, "model.connector.out", out, f"the {width} of the decoder or fusion")
    if model.decoder is not None:
        _check_preset(model.decoder, "model.decoder", model.decoder.problems(longest))
    if model.fusion is not None:
        _require(model.decoder is not None, "model.decoder", None, "what stands around the fusion")
        problems = model.fusion.problems(model.decoder.width, model.decoder.depth)
        _check_preset(model.fusion, "model.fusion", problems)
    if model.samplers is not None:
        _check_samplers(model)
    if model.text is not None:
        _require(model.encoder is not None, "model.encoder", None, "what texts are compared with")
        compared = model.connector if model.matched else model.encoder.features
        _check_preset(model.text, "model.text", model.text.problems(compared))
        if not model.matched and model.text.image_pool == "map":
            encoder = model.encoder
            plain = encoder.kind == "vit" and encoder.features[1] == encoder.width
            expected = "a transformer whose features are as wide as itself, as the text pools them"
            _require(plain, "model.encoder.kind", encoder.kind, expected)
        alone = not model.matched or model.decoder is None
        _require(alone, "model.decoder", model.decoder, "None beside heads of the first stage")


def _check_samplers(model: Model) -> None:
    kind = None if model.connector is None else model.connector.kind
    _require(kind == "sva", "model.connector.kind", kind, "sva, whose windows samplers look at")
    _require(model.fusion is None, "model.fusion", model.fusion, "None beside samplers")
    problems = model.samplers.problems(model.decoder.depth)
    _check_preset(model.samplers, "model.samplers", problems)


def _check_preset(preset: Any, path: str, problems: typing.Iterable[tuple[str, str]]) -> None:
    """Raises ConfigError where a preset's field is none of its choices, or contradicts others."""
    for field, choices in preset.CHOICES.items():
        value = getattr(preset, field)
        _require(value in choices, f"{path}.{field}", value, f"one of {', '.join(choices)}")
    for field, expected in problems:
        _require(False, f"{path}.{field}", getattr(preset, field), expected)


def _require(holds: bool, path: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"config.{path} is {value!r}; expected {expected}")
