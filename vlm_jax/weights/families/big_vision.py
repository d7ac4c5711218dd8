"""Models of big_vision by the names of its checkpoints: ViT, SigLIP and PaliGemma (1 and 2).

A ViT's names start at the root, those of SigLIP's and PaliGemma's at "img/"; PaliGemma's Gemma is
at "llm/", and its connector is the head of the ViT. From models/vit.py, models/ppp/gemma.py,
models/proj/paligemma/paligemma.py and models/proj/image_text/two_towers.py; `weights.npz` shows
stacked layers one by one. A checkpoint holds no config: what shapes do not tell are constants of
big_vision's code, and what may differ all the same is an argument.
"""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.tables import Row, placed

# A classifier's head, SigLIP's other tower, temperature and bias.
FAMILY = "big_vision"  # its name among the model_types of transformers
CARRIED = (r"(img/)?(head|pre_logits)/.*", r"txt/.*", r"[tb]")
BLOCK = "stack/blocks/"
Shapes = Mapping[str, tuple[int, ...]]


def read(shapes: Shapes, image_size: int | tuple[int, int] | None = None, **decoder: Any) -> Model:
    """The model of a checkpoint.

    Args:
      shapes: of its parameters, as `weights.npz` shows them.
      image_size: of its encoder; by default images are squares, which learned positions count.
      **decoder: fields of its decoder, where they are not those of the published sizes
        (PaliGemma 2 was tuned on some tasks with `logit_cap=0.0`).

    Raises:
      ConfigError: it is another kind of model, or the image size is not known.
    """
    before = root(shapes)
    tower = {n.removeprefix(before): s for n, s in shapes.items() if n.startswith(before)}
    language = {n.removeprefix("llm/"): s for n, s in shapes.items() if n.startswith("llm/")}
    encoder = read_encoder(tower, image_size)
    if not language:
        return Model(encoder=encoder)
    gemma = read_decoder(language, **decoder)
    if shapes.get("img/head/kernel") != (encoder.width, gemma.width):
        raise ConfigError("the checkpoint has an llm/ but no img/head between its widths")
    return Model(encoder, Connector("linear"), gemma)


def root(shapes: Shapes) -> str:
    """What stands before the names of the encoder: "img/" where it is one of several towers."""
    return "img/" if any(name.startswith("img/") for name in shapes) else ""


def read_encoder(shapes: Shapes, image_size: int | tuple[int, int] | None = None) -> Encoder:
    """The encoder of a ViT's parameters."""
    if "embedding/kernel" not in shapes or "Transformer/encoder_norm/scale" not in shapes:
        raise ConfigError("the checkpoint is no ViT of big_vision: embedding/kernel is missing")
    if "cls" in shapes:
        raise ConfigError("the checkpoint's ViT has a class token: not supported")
    patch, other, _, width = shapes["embedding/kernel"]
    if patch != other:
        raise ConfigError(f"the checkpoint's patches are {patch}x{other}: only squares are read")
    learned = "pos_embedding" in shapes
    if image_size is None:
        if not learned:
            raise ConfigError("the checkpoint has no learned positions: give its image size")
        image_size = patch * math.isqrt(shapes["pos_embedding"][1])
    first = "Transformer/encoderblock_0/"
    encoder = Encoder(
        width,
        _depth(shapes, "Transformer/encoderblock_{}/LayerNorm_0/scale"),
        shapes[first + "MlpBlock_0/Dense_0/kernel"][1],
        shapes[first + "MultiHeadDotProductAttention_0/query/kernel"][1],
        patch=patch,
        image_size=image_size,
        position="learned" if learned else "sincos2d",
        pool="map" if "MAPHead_0/probe" in shapes else "none",
    )
    if learned and encoder.patches != shapes["pos_embedding"][1]:
        raise ConfigError(
            f"the checkpoint has {shapes['pos_embedding'][1]} positions, images of {image_size} "
            f"have {encoder.patches} patches: give its image size"
        )
    return encoder


def read_decoder(shapes: Shapes, **fields: Any) -> Decoder:
    """The Gemma (with two norms more: Gemma 2) of the parameters below "llm/".

    Args:
      shapes: theirs.
      **fields: of the decoder, where they are not those of the published sizes.
    """
    first = "layers/0/"
    fused = first + "attn/qkv_einsum/w"
    if fused in shapes:
        _, heads, width, head_dim = shapes[fused]
        kv_heads = heads
    elif first + "attn/q_einsum/w" in shapes:
        heads, width, head_dim = shapes[first + "attn/q_einsum/w"]
        kv_heads = shapes[first + "attn/kv_einsum/w"][1]
    else:
        raise ConfigError("the checkpoint's llm/ is no Gemma of big_vision: no attn/q_einsum/w")
    depth = _depth(shapes, "layers/{}/pre_attention_norm/scale")
    post_norms = first + "post_attention_norm/scale" in shapes
    # gemma2_27b is the one size that divides scores by the root of width / heads.
    by_width = post_norms and depth == 46
    settings = {
        "norm": "rms_plus_one",
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "embed_root": True,
        "tied": True,
        "post_norms": post_norms,
        "attention_cap": 50.0 if post_norms else 0.0,
        "logit_cap": 30.0 if post_norms else 0.0,
        "query_scale": width / heads if by_width else 0.0,
    }
    return Decoder(
        shapes["embedder/input_embedding"][0],
        width,
        depth,
        shapes[first + "mlp/linear"][0],
        heads,
        kv_heads,
        head_dim,
        **settings | fields,
    )


def _depth(shapes: Shapes, name: str) -> int:
    depth = 0
    while name.format(depth) in shapes:
        depth += 1
    if not depth:
        raise DataError(f"the checkpoint lacks {name.format(0)}")
    return depth


def rows(model: Model, root: str) -> list[Row]:
    """Where the leaves of a whole model are; `root` stands before those of its encoder."""
    table = placed(encoder_rows(model.encoder), "encoder/", root)
    if model.connector is not None:
        table += placed(_dense("layers/0", "head"), "connector/", root)
    if model.decoder is not None:
        table += placed(decoder_rows(model.decoder), "decoder/", "llm/")
    return table


def encoder_rows(encoder: Encoder) -> list[Row]:
    """Where a ViT's leaves are, below "img/" in SigLIP and PaliGemma."""
    layer = "Transformer/encoderblock_{}/"
    table = [
        Row("stem/embed/kernel", "embedding/kernel", "patch_last"),
        Row("stem/embed/bias", "embedding/bias"),
        *_norm("norm", "Transformer/encoder_norm"),
        *_norm(BLOCK + "norm1", layer + "LayerNorm_0"),
        *_norm(BLOCK + "norm2", layer + "LayerNorm_1"),
        *_attention(BLOCK, layer),
        *_mlp(BLOCK, layer),
    ]
    if encoder.position == "learned":
        table.append(Row("positions", "pos_embedding", "first"))
    if encoder.pool == "map":
        table += [
            Row("head/probe", "MAPHead_0/probe", "token"),
            *_norm("head/norm", "MAPHead_0/LayerNorm_0"),
            *_attention("head/", "MAPHead_0/"),
            *_mlp("head/", "MAPHead_0/"),
        ]
    return table


def decoder_rows(decoder: Decoder) -> list[Row]:
    """Where a Gemma's leaves are, below "llm/"."""
    layer = "layers/{}/"
    attention, mlp = BLOCK + "attention/", BLOCK + "mlp/"
    heads = {"query": "q_einsum", "key": "kv_einsum", "value": "kv_einsum"}
    parts = {"query": (0, 1), "key": (0, 2), "value": (1, 2)}
    if decoder.heads == decoder.kv_heads:
        heads = dict.fromkeys(heads, "qkv_einsum")
        parts = {name: (i, 3) for i, name in enumerate(heads)}
    names = {"norm1": "pre_attention_norm", "norm2": "pre_ffw_norm"}
    if decoder.post_norms:
        names |= {"post_norm1": "post_attention_norm", "post_norm2": "post_ffw_norm"}
    return [
        Row("embedding", "embedder/input_embedding"),
        Row("norm/scale", "final_norm/scale"),
        *(Row(f"{BLOCK}{ours}/scale", f"{layer}{theirs}/scale") for ours, theirs in names.items()),
        *(
            Row(
                f"{attention}{name}/kernel",
                f"{layer}attn/{theirs}/w",
                "heads_first" if parts[name][1] == 1 else "heads_first_part",
                parts[name],
            )
            for name, theirs in heads.items()
        ),
        Row(attention + "out/kernel", layer + "attn/attn_vec_einsum/w"),
        Row(mlp + "gate/kernel", layer + "mlp/gating_einsum", "first", (0, 2)),
        Row(mlp + "up/kernel", layer + "mlp/gating_einsum", "first", (1, 2)),
        Row(mlp + "down/kernel", layer + "mlp/linear"),
    ]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in ("scale", "bias")]


def _dense(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in ("kernel", "bias")]


def _attention(ours: str, theirs: str) -> list[Row]:
    whole = theirs + "MultiHeadDotProductAttention_0/"
    names = ("query", "key", "value", "out")
    return [row for name in names for row in _dense(f"{ours}attention/{name}", whole + name)]


def _mlp(ours: str, theirs: str) -> list[Row]:
    parts = {"up": "Dense_0", "down": "Dense_1"}
    whole = theirs + "MlpBlock_0/"
    return [row for n, part in parts.items() for row in _dense(f"{ours}mlp/{n}", whole + part)]
