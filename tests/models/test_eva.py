"""EVA-02's towers, which transformers lacks, against their definition in plain numpy.

The definition is that of Fang et al. 2023 (EVA-02) and Sun et al. 2023 (EVA-CLIP), as timm's
models/eva.py computes it. Written token by token and head by head, in float64.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_vision import assert_close
from vision_cases import shapes

from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.presets.encoder_sizes import EVA, EVA02
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights import tables
from vlm_jax.weights.families import timm_eva

EXACT = {"dtype": "float32", "remat": False, "norm_eps": 1e-2}
# More rows than the reference grid has, and fewer columns.
GATED = Encoder(
    24, 2, 20, 3, **EVA02 | EXACT | {"patch": 2, "image_size": (10, 4), "rotary_grid": (3, 3)}
)
POST = Encoder(
    20, 2, 26, 5, post_norm=True, keep_class=True, **EVA | EXACT | {"patch": 2, "image_size": 6}
)


def layer_norm(x, w, eps: float = 1e-2):
    """Of one vector."""
    return (x - x.mean()) / math.sqrt(x.var() + eps) * w["scale"] + w["bias"]


def turned(x, row: float, column: float):
    """A head's vector: its pairs are complex numbers; half turn by the row, half by the column."""
    pairs = [complex(x[i], x[i + 1]) for i in range(0, len(x), 2)]
    half = len(pairs) // 2
    for i in range(half):
        speed = 10_000.0 ** (-i / half)
        pairs[i] *= complex(math.cos(row * speed), math.sin(row * speed))
        pairs[half + i] *= complex(math.cos(column * speed), math.sin(column * speed))
    return np.array([part for pair in pairs for part in (pair.real, pair.imag)])


def attention(tokens, w, encoder: Encoder):
    """Of all tokens on all; the first is the class token, which has no place."""
    rows, columns = encoder.grid
    mixed = [[] for _ in tokens]
    for head in range(encoder.heads):
        query, key, value = (
            [t @ w[n]["kernel"][:, head] + w[n].get("bias", np.zeros((9, 1)))[head] for t in tokens]
            for n in ("query", "key", "value")
        )
        if encoder.rotary_grid:
            down, across = (r / n for r, n in zip(encoder.rotary_grid, (rows, columns)))
            for i in range(1, len(tokens)):
                place = (i - 1) // columns * down, (i - 1) % columns * across
                query[i], key[i] = turned(query[i], *place), turned(key[i], *place)
        for i, q in enumerate(query):
            scores = np.exp([q @ k / math.sqrt(len(q)) for k in key])
            mixed[i].append(sum(s * v for s, v in zip(scores / scores.sum(), value)))
    return [np.concatenate(heads) for heads in mixed]


def feed_forward(x, w, encoder: Encoder):
    """SwiGLU with a norm inside, or two matrices and an exact GELU."""
    dense = lambda name, x: x @ w[name]["kernel"] + w[name]["bias"]  # noqa: E731
    if not encoder.gated:
        hidden = dense("up", x)
        return dense("down", [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
    gate = dense("gate", x)
    return dense("down", layer_norm(gate / (1 + np.exp(-gate)) * dense("up", x), w["norm"]))


def block(tokens, w, encoder: Encoder):
    """One block; post-norm branches are normed after."""
    before = (lambda x, norm: x) if encoder.post_norm else (lambda x, norm: layer_norm(x, w[norm]))
    after = (lambda x, norm: layer_norm(x, w[norm])) if encoder.post_norm else (lambda x, norm: x)
    mixed = attention([before(t, "norm1") for t in tokens], w["attention"], encoder)
    if encoder.inner_norm:
        mixed = [layer_norm(m, w["inner_norm"]) for m in mixed]
    out = w["attention"]["out"]
    matrix = out["kernel"].reshape(-1, encoder.width)
    tokens = [t + after(m @ matrix + out["bias"], "norm1") for t, m in zip(tokens, mixed)]
    return [t + after(feed_forward(before(t, "norm2"), w["mlp"], encoder), "norm2") for t in tokens]


def tower(flat: dict, patches: np.ndarray, encoder: Encoder) -> np.ndarray:
    """Features of one image's patches."""
    embed = lambda p: p @ flat["stem/embed/kernel"] + flat["stem/embed/bias"]  # noqa: E731
    tokens = [flat["class_token"], *(embed(p) for p in patches)]
    tokens = [token + place for token, place in zip(tokens, flat["positions"])]
    for layer in range(encoder.depth):
        tokens = block(tokens, nested(flat, layer), encoder)
    norm = {name: flat[f"norm/{name}"] for name in ("scale", "bias")}
    tokens = tokens if encoder.keep_class else tokens[1:]
    return np.stack([layer_norm(token, norm) for token in tokens])


def nested(flat: dict, layer: int) -> dict:
    """The leaves of one block as a tree."""
    tree = {}
    for path, leaf in flat.items():
        if path.startswith("stack/blocks/"):
            *parents, name = path.removeprefix("stack/blocks/").split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf[layer]
    return tree


@pytest.mark.parametrize("encoder", [GATED, POST], ids=["eva02-l", "eva02-e"])
def test_features_equal_those_of_the_definition(encoder):
    rng = np.random.default_rng(0)
    flat = {
        path: 0.4 * rng.normal(size=shape) + path.endswith("scale")
        for path, shape in shapes(encoder).items()
    }
    x = rng.normal(size=(1, encoder.patches, 3 * encoder.patch**2))
    ours = {f"encoder/{path}": jnp.asarray(leaf, jnp.float32) for path, leaf in flat.items()}
    seen = Images(np.asarray([[encoder.grid]]), patches=x.astype(np.float32))
    run = jax.jit(lambda flat, seen: params.build(Model(encoder), flat).encoder(seen).x)
    assert_close(run(ours, seen)[0], tower(flat, x[0], encoder))
    assert not any("key/bias" in path for path in flat)


# Names in timm's files of eva02_large_patch14_clip_224 and eva02_enormous_patch14_clip_224.
BLOCK = "norm1.weight norm1.bias norm2.weight norm2.bias attn.proj.weight attn.proj.bias"
NAMES = {
    "eva02_large_patch14_clip_224": (
        f"{BLOCK} attn.q_proj.weight attn.q_proj.bias attn.k_proj.weight attn.v_proj.weight "
        "attn.v_proj.bias attn.norm.weight attn.norm.bias mlp.fc1_g.weight mlp.fc1_g.bias "
        "mlp.fc1_x.weight mlp.fc1_x.bias mlp.norm.weight mlp.norm.bias mlp.fc2.weight mlp.fc2.bias"
    ),
    "eva02_enormous_patch14_clip_224": (
        f"{BLOCK} attn.qkv.weight attn.q_bias attn.v_bias mlp.fc1.weight mlp.fc1.bias "
        "mlp.fc2.weight mlp.fc2.bias"
    ),
}
NAMES["eva_giant_patch14_clip_224"] = NAMES["eva02_enormous_patch14_clip_224"]
OUTER = "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias"


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_names_is_that_of_timm_and_goes_both_ways(name):
    preset = timm_eva.read({"architecture": name})
    small = dataclasses.replace(preset, width=24, depth=2, mlp=20, heads=3, image_size=28)
    blocks = {f"blocks.{i}.{tensor}" for i in range(2) for tensor in NAMES[name].split()}
    rng = np.random.default_rng(0)
    leaves = {
        path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes(small).items()
    }
    rows = timm_eva.rows(small)
    tensors = tables.scatter(rows, leaves)
    assert tensors.keys() == blocks | set(OUTER.split())
    names = [*tensors, "head.weight", "head.bias"]
    assert tables.uncovered(rows, shapes(small), names, timm_eva.CARRIED) == ([], [])
    back = tables.gather(rows, shapes(small), tensors)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", timm_eva.ARCHITECTURES)
def test_a_config_written_from_a_preset_is_read_as_that_preset(name):
    preset = timm_eva.read({"architecture": name})
    assert timm_eva.read(timm_eva.write(preset)) == preset
