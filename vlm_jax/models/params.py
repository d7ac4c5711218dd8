"""A model's parameters as a flat dict of arrays by path, and back.

Rules, checkpoints and shardings all speak of one path, such as
"decoder/stack/blocks/attention/query/kernel". Leaves below `stack/blocks` are stacked over layers.
"""

import functools
import re

import jax
from flax import nnx
from jaxtyping import Array

from vlm_jax.models.vlm import VLM

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
    (r"text/logit_(scale|bias)", ()),
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
    for pattern, logical in AXES:
        if re.fullmatch(pattern, path):
            return ("layers", *logical) if "/stack/blocks/" in path else logical
    raise KeyError(f"no logical axes for parameter {path!r}: add a row to models.params.AXES")


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


def init(model, key: Array) -> dict[str, Array]:
    """Fresh parameters; pure, so that jit with `out_shardings` makes each on its own devices."""
    state = nnx.state(VLM(model, nnx.Rngs(key)))
    return {_path(keys): leaf[...] for keys, leaf in nnx.to_flat_state(state)}


def build(model, flat: dict[str, Array]) -> VLM:
    """The module over these leaves; cheap, made inside jit.

    Raises:
      ValueError: leaves are missing, left over or of another shape; names the first of each.
    """
    graph, state = _abstract(model)
    wanted = {_path(keys) for keys, _ in state}
    if wanted != flat.keys():
        missing, extra = sorted(wanted - flat.keys()), sorted(flat.keys() - wanted)
        raise ValueError(
            f"parameters do not fit the model: missing {missing[:3]}, extra {extra[:3]}"
        )
    for keys, leaf in state:
        if flat[_path(keys)].shape != leaf.shape:  # many another shape would broadcast silently
            raise ValueError(
                f"parameter {_path(keys)} has shape {flat[_path(keys)].shape}; the model expects "
                f"{leaf.shape}: is it another model's?"
            )
    leaves = [(keys, leaf.replace(flat[_path(keys)])) for keys, leaf in state]
    return nnx.merge(graph, nnx.from_flat_state(leaves))
