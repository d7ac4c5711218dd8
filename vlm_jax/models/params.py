"""A model's parameters as a flat dict of arrays by path, and back.

Rules, checkpoints and shardings all speak of one path, such as
"decoder/stack/blocks/attention/query/kernel". Leaves below `stack/blocks` are stacked over layers.
"""

import functools
import re
from collections.abc import Mapping

import jax
from flax import nnx
from jaxtyping import Array

from vlm_jax.models import adapters, decoder, mapping, prefixes, qformer, quantised, vit
from vlm_jax.models.layers import Linear
from vlm_jax.models.vlm import VLM

# Blocks whose `attention` is that of tokens to each other, which a prefix can stand before.
SELF_ATTENDING = (decoder.Block, vit.Block, qformer.Layer, mapping.MapperBlock)

# Logical axes by path, without the layers' axis; the first pattern matching the whole path holds.
AXES = (
    (r".*attention/query/kernel", ("embed", "heads", None)),
    (r".*attention/(sources/\d+/)?(key|value)/kernel", ("embed", "kv_heads", None)),
    (r".*attention/out/kernel", ("heads", None, "embed")),
    (r".*attention/query/bias", ("heads", None)),
    (r".*attention/(key|value)/bias", ("kv_heads", None)),
    (r".*mlp/(gate|up)/kernel", ("embed", "mlp")),
    (r".*mlp/(gate|up)/bias", ("mlp",)),
    (r".*mlp/down/kernel", ("mlp", "embed")),
    (r"(decoder|text)/embedding", ("vocab", "embed")),
    (r"decoder/output/kernel", ("embed", "vocab")),
    (r"decoder/project_(in|out)/kernel", (None, "embed")),
    (r".*/(downsample|squares)/embed/kernel", (None, None, None, "embed")),
    (r".*/(conv|depthwise)/kernel", (None, None, None, "embed")),
    (r".*/expand/kernel", ("embed", "mlp")),
    (r".*/classifier/kernel", ("embed", None)),
    (r".*/position_grid", (None, None, "embed")),
    (r".*/relative_(rows|columns)", (None, None)),
    (r"decoder/added_embedding", (None, "embed")),
    (r"decoder/added_output/kernel", ("embed", None)),
    (r".*/(attention|mlp)_gate", (None,)),
    (r"text/image_project/kernel", (None, "embed")),
    (r"decoder/mask_embedding", ("embed",)),
    (r"text/(logit_(scale|bias)|temperature)", ()),
    (r"text/match/kernel", ("embed", None)),
    (r"text/transform/kernel", (None, "embed")),
    (r"text/output_bias", ("vocab",)),
    (r".*/(embed|project|layers/\d+|out|context)/kernel", (None, "embed")),
    (r"(encoder|extra_encoders/\d+|decoder|connector|text)/positions", (None, "embed")),
    (r"connector/embedding", (None, "embed")),
    (r"connector/(mapper/)?queries", (None, "embed")),
    (r"connector/flat/kernel", (None, None, None, "embed")),
    (r"connector/flat/bias", (None, "embed")),
    (r"connector/(newline|query)", (None,)),
    (r".*attention/sources/\d+/positions", (None, "embed")),
    (r"(encoder|extra_encoders/\d+)/(row_positions|column_positions|registers)", (None, "embed")),
    (r".*/stem/.*/conv", (None, None, None, "embed")),
    (r".*/(scale|bias|probe|class_token|mean|variance)", (None,)),
)


def axes(path: str) -> tuple[str | None, ...]:
    """Logical axes of the parameter at `path`.

    Raises:
      KeyError: no row of AXES matches; every parameter of every model must have one.
    """
    stacked = "/stack/blocks/" in path
    if adapters.is_leaf(path):
        layer, _, leaf = path.rpartition("/")
        return _adapter_axes(leaf, axes(f"{layer}/{adapters.KERNEL}"), stacked)
    if quantised.is_leaf(path):
        own = ("quantised", None) if path.endswith(quantised.CODES) else ("quantised",)
        return ("layers", *own) if stacked else own
    for pattern, logical in AXES:
        if re.fullmatch(pattern, path):
            return ("layers", *logical) if stacked else logical
    raise KeyError(f"no logical axes for parameter {path!r}: add a row to models.params.AXES")


def _adapter_axes(leaf: str, kernel: tuple, stacked: bool) -> tuple[str | None, ...]:
    """What goes in and comes out lies as the kernel's does; ranks are whole everywhere."""
    layers, (first, *rest) = kernel[:stacked], kernel[stacked:]
    last = next((name for name in rest if name is not None), None)
    own = {
        adapters.A: (first, None),
        adapters.B: (None, last),
        adapters.SCALE: (),
        adapters.MAGNITUDE: (last,),
        adapters.DOWN: (last, None),
        adapters.DOWN_BIAS: (None,),
        adapters.UP: (None, last),
        adapters.UP_BIAS: (last,),
        prefixes.KEYS: (None, last, None),
        prefixes.VALUES: (None, last, None),
        prefixes.EMBEDDING: (None, None),
        prefixes.INNER: (None, None),
        prefixes.INNER_BIAS: (None,),
        prefixes.OUTER: (None, None, last, None),
        prefixes.OUTER_BIAS: (None, last, None),
    }
    return own[leaf] if leaf in prefixes.SHARED else (*layers, *own[leaf])


@functools.lru_cache(maxsize=32)
def _abstract(model) -> tuple[nnx.GraphDef, tuple]:
    module = nnx.eval_shape(lambda: VLM(model, nnx.Rngs(0)))
    graph, state = nnx.split(module)
    return graph, tuple(nnx.to_flat_state(state))


def _path(keys: tuple) -> str:
    return "/".join(str(key) for key in keys)


def abstract(model) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters of a `config.Model`; nothing is allocated."""
    _, state = _abstract(model)
    return {_path(keys): leaf.get_value() for keys, leaf in state}


@functools.lru_cache(maxsize=32)
def linears(model) -> dict[str, int]:
    """Paths of the kernels of linear layers, and how many axes of each go in."""
    module = nnx.eval_shape(lambda: VLM(model, nnx.Rngs(0)))
    return {
        _path((*keys, adapters.KERNEL)): found.axes
        for keys, found in nnx.iter_modules(module)
        if isinstance(found, Linear)
    }


@functools.lru_cache(maxsize=32)
def prefixable(model) -> frozenset[str]:
    """Paths of the kernels of keys of those attentions that a prefix can stand before."""
    module = nnx.eval_shape(lambda: VLM(model, nnx.Rngs(0)))
    return frozenset(
        _path((*keys, "attention/key", adapters.KERNEL))
        for keys, found in nnx.iter_modules(module)
        if isinstance(found, SELF_ATTENDING)
    )


def restored(model, flat: Mapping[str, Array]) -> dict[str, Array]:
    """The parameters with the kernels that are held in few bits as floats (float32)."""
    return quantised.restored(flat, abstract(model), linears(model))


def count(model, flat: Mapping[str, Array]) -> int:
    """How many parameters there are; a kernel that is held in few bits counts as floats."""
    shapes = abstract(model)
    plain = (leaf.size for path, leaf in flat.items() if not quantised.is_leaf(path))
    return sum(plain) + sum(shapes[path].size for path in quantised.kernels(flat))


def init(model, key: Array) -> dict[str, Array]:
    """Fresh parameters; pure, so that jit with `out_shardings` makes each on its own devices."""
    state = nnx.state(VLM(model, nnx.Rngs(key)))
    return {_path(keys): leaf[...] for keys, leaf in nnx.to_flat_state(state)}


def build(
    model,
    flat: Mapping[str, Array],
    rates: Mapping[str, float] | None = None,
    key: Array | None = None,
) -> VLM:
    """The module over these leaves; cheap, made inside jit.

    Args:
      model: a `config.Model`.
      flat: its parameters by path, and adapters' leaves; kernels may be held in few bits.
      rates: of adapters' dropout, by path of the kernel.
      key: of adapters' dropout; None = evaluation.

    Raises:
      ValueError: leaves are missing, left over or of another shape; names the first of each.
    """
    graph, state = _abstract(model)
    wanted = {_path(keys) for keys, _ in state}
    held = frozenset(quantised.kernels(flat))
    given = held | {
        path for path in flat if not (adapters.is_leaf(path) or quantised.is_leaf(path))
    }
    if wanted != given:
        missing, extra = sorted(wanted - given), sorted(given - wanted)
        raise ValueError(
            f"parameters do not fit the model: missing {missing[:3]}, extra {extra[:3]}"
        )
    for keys, leaf in state:
        if _path(keys) in held:
            continue
        if flat[_path(keys)].shape != leaf.shape:  # many another shape would broadcast silently
            raise ValueError(
                f"parameter {_path(keys)} has shape {flat[_path(keys)].shape}; the model expects "
                f"{leaf.shape}: is it another model's?"
            )
    # What is held in few bits is put in afterwards.
    leaves = [(keys, leaf.replace(flat.get(_path(keys), ()))) for keys, leaf in state]
    vlm = nnx.merge(graph, nnx.from_flat_state(leaves))
    shapes = {_path(keys): leaf.shape for keys, leaf in state if _path(keys) in held}
    adapters.attach_quantised(vlm, flat, shapes)
    adapters.attach(vlm, flat, rates, key)
    return vlm
