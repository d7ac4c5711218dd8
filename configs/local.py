"""The word `local` behind all others of a variant: a system's recipe at sizes for a CPU.

    python -m vlm_jax.main --config=configs/llava15.py:align-local --workdir=runs/llava15

Kinds of encoders, connector, decoder and fusion, resize modes, template, what trains at which share
of the rate, schedule, optimizer and decays are those of the recipe. Widths, depths, pictures, rows,
steps and the rate are small. Not a config itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import ml_collections

from configs import common
from vlm_jax import config as c
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.convnets import ConvNet, convnext_stages
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.presets.qformer import QFormer
from vlm_jax.presets.sam import Sam
from vlm_jax.presets.sva import Samplers, Sva

WORD = "local"
GetConfig = Callable[[str], ml_collections.ConfigDict]

# float32: matrix products in bfloat16 are no faster on CPUs without AMX.
FLOAT32 = {"dtype": "float32", "remat": False}
# The embedded tokenizer's 3,072 ids and the special tokens of any chat template.
VOCAB = 3168
WIDTH, MLP, HEADS = 48, 75, 3  # of encoders and what reads their features
DECODER, DECODER_MLP, HEAD_DIM = 60, 135, 16
DEPTH, FUSED_DEPTH = 2, 4  # of decoders; blocks between layers stand up to four apart
GRID = 4  # rows and columns of patches
QUERIES = 5
TEXT = 256  # tokens of a row beside its images: the longest system text, question and answer
STEPS = 20


def variant(get_config: GetConfig) -> GetConfig:
    """A config file's `get_config`, whose variants may end in `local`."""

    @functools.wraps(get_config)
    def with_local(variant: str = ""):
        *words, last = variant.split("-")
        return shrink(get_config("-".join(words))) if last == WORD else get_config(variant)

    return with_local


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same recipe at small sizes, in as many stages; one without stages is changed in place."""
    whole = c.resolve(config)
    if whole.stages:
        stages = zip(whole.stages, c.walked(whole), strict=True)
        made = {stage.name: shrink(c.default(**_fields(each))) for stage, each in stages}
        return c.in_stages(f"{whole.name}-{WORD}", **made)
    model = small(whole.model)
    common.put(config, **_fields(model))
    config.name += f"-{WORD}"
    _shrink_data(config, whole, model)
    _shrink_train(config.train)
    config.checkpoint.update(every=STEPS // 2, milestones=())
    config.eval.update(every=STEPS, examples=16, final_examples=16, rows=8, max_new_tokens=8)
    config.eval.splits = ("validation",)
    return config


def _fields(tree: Any) -> dict[str, Any]:
    return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}


def _shrink_data(config, whole: c.Config, model: c.Model) -> None:
    data, old = config.data, whole.model
    data.update(rows=8, pool=32, threads=2, text_tokens=min(data.text_tokens, 48))
    if not model.pair:
        text = min(data.tokens - old.image_positions, TEXT)
        data.tokens = data.images_per_row * model.image_positions + text
    scale = max(model.encoder.size) / max(old.encoder.size)
    data.augment.upscale = tuple(round(scale * length) for length in data.augment.upscale)


def _shrink_train(train) -> None:
    share = STEPS / train.steps
    for name in ("warmup_steps", "decay_steps"):
        train[name] = min(train[name], max(1, round(share * train[name])))
    # Of the papers' rates, which are for trained towers, twenty steps would show nothing.
    train.update(steps=STEPS, lr=3e-3, log_every=5)


def small(model: c.Model) -> c.Model:
    """The same parts, narrow and shallow."""
    encoders = tuple(_ENCODERS[type(e)](e, model.connector) for e in model.encoders)
    first, *others = encoders
    depth = FUSED_DEPTH if model.fusion or model.samplers else DEPTH
    return c.Model(
        encoder=first,
        connector=_CONNECTORS[type(model.connector)](model, encoders),
        decoder=model.decoder and _decoder(model.decoder, depth),
        extra_encoders=tuple(others),
        fusion=model.fusion and _fusion(model.fusion, first.width),
        samplers=model.samplers and _samplers(model.samplers, depth),
        # The id that starts a text is none of the tokenizer's.
        text=model.text and dataclasses.replace(model.text, out=WIDTH, start=VOCAB - 1),
    )


def _encoder(encoder: Encoder, connector: Any) -> Encoder:
    """Pictures of few patches, in which pixels shuffle as they did; two blocks that run."""
    factor = connector.factor if getattr(connector, "pool", "none") == "shuffle" else 1
    grid = factor * max(1, round(GRID / factor))
    # Where each picture has a grid of its own, the largest ones are so small.
    scale = grid / (math.isqrt(encoder.max_patches) or encoder.grid[0])
    rows = round(scale * encoder.grid[0])
    made = dataclasses.replace(
        encoder,
        width=WIDTH,
        depth=1 - encoder.layer,
        mlp=MLP,
        heads=HEADS,
        head_dim=encoder.head_dim and WIDTH // HEADS,
        image_size=rows * encoder.patch,
        max_patches=encoder.max_patches and grid**2,
        position_grid=tuple(math.ceil(scale * n) for n in encoder.position_grid),
        **FLOAT32,
    )
    return dataclasses.replace(made, resize=_resize(encoder, made))


def _resize(encoder: Any, made: Any):
    """Its lengths grow and shrink with the views, so that as many tiles fit as before."""
    how = encoder.resize
    side = math.ceil(how.side * made.size[0] / encoder.size[0])
    old, new = how.size(encoder)[0], side or made.size[0]
    scaled = lambda length: round(length * new / old)  # noqa: E731
    return dataclasses.replace(
        how,
        side=side,
        shortest=scaled(how.shortest),
        longest=scaled(how.longest),
        pinpoints=tuple(tuple(map(scaled, size)) for size in how.pinpoints),
    )


def _convnet(encoder: ConvNet, connector: Any) -> ConvNet:
    widths = (12, 20, 28, 36)
    made = dataclasses.replace(
        encoder,
        stages=convnext_stages((1,) * len(widths), widths),
        stem_width=widths[0],
        image_size=64,
        resize_to=encoder.resize_to and GRID * encoder.resize_to // connector.side,
        **FLOAT32,
    )
    return dataclasses.replace(made, resize=_resize(encoder, made))


def _sam(encoder: Sam, connector: Any) -> Sam:
    """A layer of windows that do not fill its grid, and one that sees all of it."""
    made = dataclasses.replace(
        encoder,
        width=WIDTH,
        depth=2,
        mlp=MLP,
        heads=HEADS,
        global_layers=(1,),
        window=GRID - 1,
        image_size=GRID * encoder.patch,
        trained_size=None,
        out=36,
        **FLOAT32,
    )
    return dataclasses.replace(made, resize=_resize(encoder, made))


_ENCODERS = {Encoder: _encoder, ConvNet: _convnet, Sam: _sam}


def _heads(heads: int, kv_heads: int) -> dict[str, int]:
    """One or two key/value heads, and up to three others for each."""
    kv = min(kv_heads, 2)
    return {"heads": kv * min(heads // kv_heads, 3), "kv_heads": kv}


def _decoder(decoder: Decoder, depth: int) -> Decoder:
    return dataclasses.replace(
        decoder,
        vocab=VOCAB,
        width=DECODER,
        depth=depth,
        mlp=DECODER_MLP,
        head_dim=HEAD_DIM,
        window=min(decoder.window, 32),
        **_heads(decoder.heads, decoder.kv_heads),
        **FLOAT32,
    )


def _fusion(fusion: CrossAttention, width: int) -> CrossAttention:
    heads = _heads(fusion.heads, fusion.kv_heads)
    width = fusion.width and width
    return dataclasses.replace(fusion, mlp=DECODER_MLP, head_dim=HEAD_DIM, width=width, **heads)


def _samplers(samplers: Samplers, depth: int) -> Samplers:
    """As many as there is room for."""
    room = 1 + (depth - 1 - samplers.start) // samplers.stride
    return dataclasses.replace(samplers, count=min(samplers.count, room))


def _connector(model: c.Model, encoders: tuple) -> Connector:
    """Widths that were those of features or of the decoder are so again."""
    connector = model.connector
    joined, now = (sum(e.features[1] for e in towers) for towers in (model.encoders, encoders))
    same = {0: 0, 4 * joined: 4 * now, model.decoder.width: DECODER, joined: now}
    width = lambda value: same.get(value, MLP)  # noqa: E731
    hidden = connector.hidden
    perceiver = connector.kind == "perceiver"
    return dataclasses.replace(
        connector,
        queries=min(connector.queries, QUERIES),
        layers=min(connector.layers, 2) if perceiver else connector.layers,
        width=width(connector.width),
        hidden=tuple(map(width, hidden)) if isinstance(hidden, tuple) else width(hidden),
        out=width(connector.out),
        head_dim=connector.head_dim and HEAD_DIM,
        embed_hidden=connector.embed_hidden and DECODER_MLP,
        resize=(GRID, GRID) if any(connector.resize) else (0, 0),
        **_heads(connector.heads, connector.kv_heads),
        **FLOAT32,
    )


def _qformer(model: c.Model, encoders: tuple) -> QFormer:
    connector = model.connector
    return dataclasses.replace(
        connector,
        queries=QUERIES,
        width=WIDTH,
        depth=connector.every,
        mlp=MLP,
        heads=HEADS,
        vocab=connector.vocab and VOCAB,
        **FLOAT32,
    )


def _sva(model: c.Model, encoders: tuple) -> Sva:
    connector = model.connector
    sides = tuple(GRID * window for window in connector.windows)
    return dataclasses.replace(
        connector, side=GRID, sides=sides, width=WIDTH, layers=2, heads=HEADS, **FLOAT32
    )


_CONNECTORS = {Connector: _connector, QFormer: _qformer, Sva: _sva}
