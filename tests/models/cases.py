"""What the models are compared on with transformers: sizes, inputs, and where each weight goes.

A table's row says which of their weights becomes which of our leaves; `{}` counts the layers that
our leaf stacks. Linear weights are transposed and given our leaf's shape, others only the shape.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.models.layers import Features
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights import registry, tables


def with_biases(linear: dict[str, str], norms: dict[str, str]) -> dict[str, str]:
    """A row for the kernel or scale and one for the bias of every module of ours and theirs."""
    return (
        {f"{ours}/kernel": f"{theirs}.weight" for ours, theirs in linear.items()}
        | {f"{ours}/scale": f"{theirs}.weight" for ours, theirs in norms.items()}
        | {f"{ours}/bias": f"{theirs}.bias" for ours, theirs in (linear | norms).items()}
    )


# Our module, theirs: each has a kernel and a bias.
VIT_LINEAR = {
    "encoder/stack/blocks/attention/query": "encoder.layers.{}.self_attn.q_proj",
    "encoder/stack/blocks/attention/key": "encoder.layers.{}.self_attn.k_proj",
    "encoder/stack/blocks/attention/value": "encoder.layers.{}.self_attn.v_proj",
    "encoder/stack/blocks/attention/out": "encoder.layers.{}.self_attn.out_proj",
    "encoder/stack/blocks/mlp/up": "encoder.layers.{}.mlp.fc1",
    "encoder/stack/blocks/mlp/down": "encoder.layers.{}.mlp.fc2",
    "encoder/stem/embed": "embeddings.patch_embedding",
    "encoder/head/attention/query": "head.attention.q",
    "encoder/head/attention/key": "head.attention.k",
    "encoder/head/attention/value": "head.attention.v",
    "encoder/head/attention/out": "head.attention.out_proj",
    "encoder/head/mlp/up": "head.mlp.fc1",
    "encoder/head/mlp/down": "head.mlp.fc2",
}
VIT_NORM = {
    "encoder/stack/blocks/norm1": "encoder.layers.{}.layer_norm1",
    "encoder/stack/blocks/norm2": "encoder.layers.{}.layer_norm2",
    "encoder/norm": "post_layernorm",
    "encoder/head/norm": "head.layernorm",
}
SIGLIP = {
    "encoder/positions": "embeddings.position_embedding.weight",
    "encoder/head/probe": "head.probe",
} | with_biases(VIT_LINEAR, VIT_NORM)

LATENTS = "connector/stack/blocks/"
PERCEIVER = {
    "connector/queries": "latents",
    "connector/norm/scale": "norm.weight",
    LATENTS + "norm_latents/scale": "layers.{}.input_latents_norm.weight",
    LATENTS + "norm_context/scale": "layers.{}.input_context_norm.weight",
    LATENTS + "norm_mlp/scale": "layers.{}.post_attention_layernorm.weight",
    LATENTS + "attention/query/kernel": "layers.{}.self_attn.q_proj.weight",
    LATENTS + "attention/key/kernel": "layers.{}.self_attn.k_proj.weight",
    LATENTS + "attention/value/kernel": "layers.{}.self_attn.v_proj.weight",
    LATENTS + "attention/out/kernel": "layers.{}.self_attn.o_proj.weight",
    LATENTS + "mlp/gate/kernel": "layers.{}.mlp.gate_proj.weight",
    LATENTS + "mlp/up/kernel": "layers.{}.mlp.up_proj.weight",
    LATENTS + "mlp/down/kernel": "layers.{}.mlp.down_proj.weight",
}

PROJECTOR = {
    "connector/layers/0/kernel": "linear_1.weight",
    "connector/layers/0/bias": "linear_1.bias",
    "connector/layers/1/kernel": "linear_2.weight",
    "connector/layers/1/bias": "linear_2.bias",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One tower of `model` against one model of transformers.

    Attributes:
      tower: "decoder", "encoder" or "connector".
      model: the sizes; the other two towers are not compared.
      table: our leaf to their weight; None = that of the family, in `weights.registry`.
      family: their model, by its model_type.
    """

    tower: str
    model: Model
    table: dict[str, str] | None
    family: str


def _model(**towers) -> Model:
    exact = {"dtype": "float32", "remat": False}
    defaults = {
        "encoder": Encoder(8, 1, 8, 2, patch=4, image_size=8, **exact),
        "connector": Connector("linear", **exact),
        "decoder": Decoder(8, 8, 1, 8, 2, 1, 4, **exact),
    }
    changes = {name: dataclasses.replace(tower, **exact) for name, tower in towers.items()}
    return Model(**(defaults | changes))


def decoder(*sizes, family: str = "llama", **fields) -> Case:
    """A decoder of these sizes, by default a Llama."""
    return Case("decoder", _model(decoder=Decoder(*sizes, **fields)), None, family)


GEMMA = {"norm": "rms_plus_one", "activation": "gelu_tanh", "embed_root": True, "tied": True}
UNGATED = {"gated": False, "norm": "layer"}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}


def gemma(*sizes, family: str = "gemma", **fields) -> Case:
    """A Gemma of these sizes; above the first, branches are normed twice and layers alternate."""
    return decoder(*sizes, family=family, **GEMMA, **fields)


def opt(vocab: int, width: int, depth: int, mlp: int, heads: int, **fields) -> Case:
    """An OPT of these sizes."""
    sizes = vocab, width, depth, mlp, heads, heads, width // heads
    fields = {"position": "learned", "positions": 21, "position_offset": 2, "tied": True} | fields
    return decoder(*sizes, family="opt", activation="relu", **UNGATED, **BIASES, **fields)


def mpt(vocab: int, width: int, depth: int, heads: int, **fields) -> Case:
    """An MPT of these sizes; its feed-forward part is always four times as wide."""
    sizes = vocab, width, depth, 4 * width, heads, heads, width // heads
    fields = {"norm": "layer_unbiased", "gated": False, "activation": "gelu"} | fields
    return decoder(*sizes, family="mpt", position="alibi", tied=True, **fields)


def neox(vocab: int, width: int, depth: int, mlp: int, heads: int, **fields) -> Case:
    """A GPT-NeoX of these sizes."""
    sizes = vocab, width, depth, mlp, heads, heads, width // heads
    fields = {"activation": "gelu"} | fields
    return decoder(*sizes, family="gpt_neox", **UNGATED, **BIASES, **fields)


def encoder(*sizes, **fields) -> Case:
    """A SigLIP vision tower of these sizes."""
    return Case("encoder", _model(encoder=Encoder(*sizes, **fields)), SIGLIP, "siglip")


def perceiver(width: int, **fields) -> Case:
    """An Idefics2 resampler: all it touches has one width, its feed-forward part four times it."""
    model = _model(
        encoder=Encoder(width, 1, 8, 2, patch=4, image_size=16),
        connector=Connector("perceiver", **fields),
        decoder=Decoder(8, width, 1, 8, 2, 1, 4),
    )
    return Case("connector", model, PERCEIVER, "idefics2")


def projector(features: int, width: int) -> Case:
    """A LLaVA-1.5 projector."""
    model = _model(
        encoder=Encoder(features, 1, 8, 2, patch=4, image_size=16),
        connector=Connector("mlp"),
        decoder=Decoder(8, width, 1, 8, 2, 1, 4),
    )
    return Case("connector", model, PROJECTOR, "llava")


# Small enough that weights and outputs lie in the repository. Head dimensions are not width / heads
# where the model allows it, head counts are odd, and epsilons large enough to be seen.
GOLDENS = {
    "llama_tied": decoder(37, 18, 2, 28, 6, 3, 4, rope_theta=100.0, norm_eps=1e-2, tied=True),
    "llama_untied": decoder(29, 12, 3, 20, 3, 1, 6, norm_eps=1e-5),
    "llama3": decoder(
        31, 12, 2, 20, 3, 1, 8, rope_factor=5.0, rope_original=16, rope_low=0.5, rope_high=3.0
    ),
    "mistral": decoder(23, 12, 2, 20, 4, 2, 4, family="mistral", window=5, pattern=("local",)),
    "qwen2": decoder(27, 12, 2, 18, 6, 2, 4, family="qwen2", qkv_bias=True, tied=True),
    "qwen3": decoder(25, 12, 2, 18, 3, 1, 6, family="qwen3", qk_norm=True, norm_eps=1e-2),
    "gemma": gemma(29, 12, 2, 20, 3, 1, 6, norm_eps=1e-2),
    "gemma2": gemma(
        29,
        12,
        3,
        20,
        4,
        2,
        6,
        family="gemma2",
        post_norms=True,
        query_scale=3.0,
        attention_cap=1.5,
        logit_cap=4.0,
        window=3,
        pattern=("local", "global"),
    ),
    "gemma3": gemma(
        29,
        12,
        4,
        16,
        2,
        1,
        6,
        family="gemma3_text",
        post_norms=True,
        qk_norm=True,
        query_scale=5.0,
        rope_theta=1e4,
        rope_factor=4.0,
        local_theta=50.0,
        window=4,
        pattern=("local", "local", "global"),
    ),
    "opt": opt(33, 12, 2, 22, 3),
    "mpt": mpt(35, 18, 2, 6),
    "neox": neox(27, 24, 2, 20, 3, rope_share=0.5, parallel=True),
    "neox_serial": neox(27, 16, 2, 20, 2, parallel=False),
    "siglip": encoder(12, 2, 20, 3, patch=4, image_size=12, norm_eps=1e-2),
    "siglip_map": encoder(12, 2, 20, 3, patch=4, image_size=12, pool="map"),
    "perceiver": perceiver(12, queries=5, layers=2, heads=6, kv_heads=2, norm_eps=1e-2),
    "projector": projector(10, 14),
}

LARGER = {
    "llama_gqa": decoder(211, 80, 3, 136, 10, 5, 14, rope_theta=5e5, tied=True),
    "llama_mha": decoder(199, 60, 4, 100, 5, 5, 12, norm_eps=1e-6),
    "llama_mqa": decoder(97, 63, 2, 90, 7, 1, 16, tied=True),
    "mistral": decoder(
        101, 60, 3, 90, 6, 2, 10, family="mistral", window=6, pattern=("local",), norm_eps=1e-4
    ),
    "qwen2": decoder(97, 56, 3, 90, 7, 7, 8, family="qwen2", qkv_bias=True),
    "qwen3": decoder(95, 54, 3, 70, 6, 2, 12, family="qwen3", qk_norm=True, tied=True),
    "gemma": gemma(99, 52, 3, 80, 5, 5, 14),
    "gemma2": gemma(
        99,
        60,
        5,
        84,
        6,
        3,
        14,
        family="gemma2",
        post_norms=True,
        query_scale=9.0,
        attention_cap=2.0,
        logit_cap=3.0,
        window=5,
        pattern=("local", "global"),
    ),
    "gemma3": gemma(
        99,
        60,
        7,
        76,
        4,
        2,
        10,
        family="gemma3_text",
        post_norms=True,
        qk_norm=True,
        query_scale=11.0,
        rope_theta=1e5,
        local_theta=300.0,
        window=6,
        pattern=("local",) * 5 + ("global",),
    ),
    "opt": opt(103, 60, 3, 110, 5, positions=40),
    "mpt": mpt(107, 70, 3, 7),
    "neox": neox(89, 80, 3, 120, 5, rope_share=0.25, parallel=True, norm_eps=1e-3),
    "siglip": encoder(72, 3, 130, 6, patch=8, image_size=40),
    "siglip_map": encoder(64, 4, 100, 4, patch=6, image_size=30, pool="map"),
    "siglip_gelu": encoder(48, 2, 96, 3, patch=4, image_size=16, pool="map", activation="gelu"),
    "perceiver": perceiver(96, queries=9, layers=3, heads=8, kv_heads=4),
    "projector": projector(56, 88),
}


def inputs(case: Case, seed: int = 0) -> np.ndarray:
    """Tokens [2, 13], pixels [3, S, S, 3] or patch features [3, P, E]."""
    rng = np.random.default_rng(seed)
    encoder = case.model.encoder
    if case.tower == "decoder":
        return rng.integers(0, case.model.decoder.vocab, (2, 13)).astype(np.int32)
    size = encoder.image_size
    shapes = {"encoder": (3, size, size, 3), "connector": (3, encoder.patches, encoder.width)}
    return rng.normal(size=shapes[case.tower]).astype(np.float32)


def leaves(case: Case, theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their weights, or gradients of them, as our leaves."""
    if case.table is None:
        shapes = {path: leaf.shape for path, leaf in params.abstract(case.model).items()}
        return tables.gather(registry.family(case.family).rows(case.model), shapes, theirs)
    found = {}
    for path, leaf in params.abstract(case.model).items():
        if path not in case.table:
            continue
        name, stacked = case.table[path], "{}" in case.table[path]
        arrays = [theirs[name.format(i)] for i in range(leaf.shape[0] if stacked else 1)]
        shape = leaf.shape[1:] if stacked else leaf.shape
        if path.endswith("/kernel"):
            arrays = [np.moveaxis(array, 0, -1) for array in arrays]
        arrays = [array.reshape(shape) for array in arrays]
        found[path] = np.stack(arrays) if stacked else arrays[0]
    return found


def towers_leaves(case: Case) -> set[str]:
    """Our leaves of the compared tower, but for a Perceiver's embedding, which theirs lacks."""
    every = {path for path in params.abstract(case.model) if path.startswith(case.tower + "/")}
    return every - {"connector/embed/kernel"} if case.table is PERCEIVER else every


def run(case: Case, compared: dict, x: np.ndarray):
    """Our tower's output over these leaves: logits, features or visual tokens."""
    others = {
        path: jnp.zeros(leaf.shape, leaf.dtype)
        for path, leaf in params.abstract(case.model).items()
        if path not in compared
    }
    if case.table is PERCEIVER:
        others["connector/embed/kernel"] = jnp.eye(case.model.encoder.width)
    vlm = params.build(case.model, others | compared)
    return {"decoder": _logits, "encoder": _features, "connector": _tokens}[case.tower](vlm, x)


def _logits(vlm, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    past = positions[:, None, :, None] >= positions[:, None, None, :]
    hidden, _ = vlm.decoder(vlm.decoder.embed(tokens), positions, past)
    return vlm.unembed(hidden)


def _features(vlm, pixels):
    encoder = vlm.encoder.encoder
    grids = np.full((len(pixels), 1, 2), encoder.grid, np.int32)
    return vlm.encoder(Images(grids, patches=patchify(pixels, encoder.patch))).x


def _tokens(vlm, features):
    return vlm.connector((Features(jnp.asarray(features)),))


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Whole images [n, S, S, 3] to flattened patches [n, P, patch * patch * 3], row by row."""
    n, size = len(pixels), pixels.shape[1]
    squares = [
        pixels[:, y : y + patch, x : x + patch].reshape(n, -1)
        for y in range(0, size, patch)
        for x in range(0, size, patch)
    ]
    return np.stack(squares, axis=1)


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What the output is weighted with to make the scalar whose gradients are compared."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def assert_gradients_equal(case: Case, ours: dict, theirs: dict[str, np.ndarray]) -> None:
    """Every gradient within 1e-4, of the leaf's largest. Those of key biases are rounding errors
    of 0, for a softmax does not feel them: hence a floor, a millionth of the largest of all."""
    theirs = leaves(case, theirs)
    largest = {path: np.abs(gradient).max() for path, gradient in theirs.items()}
    for path, gradient in theirs.items():
        atol = max(1e-4 * largest[path], 1e-6 * max(largest.values()))
        np.testing.assert_allclose(ours[path], gradient, rtol=1e-4, atol=atol, err_msg=path)
