"""Whether a run fits its devices, answered from shapes before anything large is allocated."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlm_jax.config import Config
from vlm_jax.errors import ConfigError
from vlm_jax.parallel import devices
from vlm_jax.presets.connectors import Work
from vlm_jax.training.adaptation import Plan, readable
from vlm_jax.training.state import State

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Tower:
    """What of a stack of transformer blocks decides its activations on one device.

    Attributes:
      name: first part of its parameters' paths.
      sequences: sequences it reads in one step.
      length: tokens of a sequence.
      context: tokens a token looks at.
      width, mlp, heads, depth, remat: of its preset.
      item: bytes of a number in its computation.
      lowest: whether it reads images, so that no other tower is below it.
    """

    name: str
    sequences: int
    length: int
    context: int
    width: int
    mlp: float
    heads: float
    depth: int
    remat: bool
    item: int
    lowest: bool = False

    @property
    def residual(self) -> float:
        """Bytes of the tokens between two blocks."""
        return self.sequences * self.length * self.width * self.item

    @property
    def block(self) -> float:
        """Bytes that the backward pass of one block needs.

        Per token two norms, queries, keys, values, the attention's output and two residuals
        (8 widths), and gate, up and their product (3 feed-forward widths); per head the scores and
        their softmax in float32.
        """
        tokens = self.sequences * self.length
        inner = tokens * (8 * self.width + 3 * self.mlp) * self.item
        return inner + tokens * self.context * self.heads * 2 * FLOAT32

    def activations(self, trained: bool) -> float:
        """Bytes at the peak: with rematerialisation a residual per block and one block's inside."""
        if not trained:
            return self.block
        if self.remat:
            return self.depth * self.residual + self.block
        return self.depth * self.block


def needed(config: Config, plan: Plan, mesh: Mesh, state: State) -> dict[str, int]:
    """Bytes per device of each part of a run.

    Args:
      config: the run.
      plan: its adaptation.
      mesh: its devices.
      state: the abstract state with its shardings.

    Returns:
      parameters (float32 masters of what trains, the rest in its dtype), gradients, the moments of
      AdamW, the average, an estimate of the activations (see `Tower`; convolutional stems and what
      the compiler adds are not counted), and one layer's kernels that are held in few bits.
    """
    trainable = _bytes(state.trainable)
    parts = {
        "parameters": trainable + _bytes(state.frozen),
        # That of a micro-batch stands beside the sum.
        "gradients": trainable * (2 if config.train.accumulate > 1 else 1),
        "optimizer": _bytes(state.opt),
        "average": _bytes(state.ema),
        "activations": int(_activations(config, plan, mesh.shape)),
        "kernels as floats": _restored(plan),
    }
    return {name: size for name, size in parts.items() if size}


def check(config: Config, plan: Plan, mesh: Mesh, state: State, hint: str = "") -> dict[str, int]:
    """`needed`, when the devices have it.

    Raises:
      ConfigError: they do not; names the bytes needed and present, their parts, and `hint`.
    """
    parts = needed(config, plan, mesh, state)
    total, present = sum(parts.values()), devices.memory(mesh.local_devices)
    if total <= present:
        return parts
    listed = ", ".join(f"{name} {readable(size)}" for name, size in parts.items())
    kind = mesh.devices.flat[0].device_kind
    raise ConfigError(
        f"{config.name} needs {total:,} bytes ({readable(total)}) per device and each of the "
        f"{mesh.size} devices ({kind}) has {present:,} ({readable(present)}). It needs {listed}. "
        "Run on more devices with a larger config.parallel.fsdp or .tensor, lower "
        f"config.data.rows, or freeze more in config.adaptation{f'; {hint}' if hint else ''}"
    )


def _bytes(tree) -> int:
    """Bytes per device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _restored(plan: Plan) -> int:
    """Bytes of the largest layer's kernels in float32, of those that are held in few bits."""
    sizes = collections.Counter()
    for path, held in plan.held.items():
        layer = path.partition("/stack/blocks/")[0] if held.stacked else path
        layers = held.kernel.shape[0] if held.stacked else 1
        sizes[layer] += FLOAT32 * held.kernel.size // layers
    return max(sizes.values(), default=0)


def _activations(config: Config, plan: Plan, mesh: Mapping[str, int]) -> float:
    ways = mesh["data"] * mesh["fsdp"] * config.train.accumulate
    rows = math.ceil(config.data.rows / ways)
    total, below = 0.0, False
    for tower in _towers(config, rows, mesh["tensor"]):
        # Gradients flow through a tower where anything trains in it or below it.
        own = any(path.startswith(f"{tower.name}/") for path in plan.lr)
        total += tower.activations(own or (below and not tower.lowest))
        below = below or own
    if config.model.pair and not config.model.matched:  # compared block by block, see `pairs.py`
        return total
    vocab = config.model.tokens / mesh["tensor"]
    logits_and_gradient = 2 * rows * config.data.tokens * vocab * FLOAT32
    return total + logits_and_gradient


def _towers(config: Config, rows: int, tensor: int) -> Iterator[Tower]:
    """The towers that a step runs, from the pixels up."""
    model, data, decoder = config.model, config.data, config.model.decoder
    slots = rows * data.images_per_row

    def tower(name: str, sequences: int, work: Work, dtype: str, lowest: bool = False) -> Tower:
        spread = {"mlp": work.mlp / tensor, "heads": work.heads / tensor}
        item = jnp.dtype(dtype).itemsize
        return Tower(name, sequences, **(work._asdict() | spread), item=item, lowest=lowest)

    if data.images:
        for i, encoder in enumerate(model.encoders):
            name = f"extra_encoders/{i - 1}" if i else "encoder"
            shared = 0 if i else data.patches_per_row
            sequences, runs = slots, encoder.runs
            if shared:
                sequences, runs = rows, encoder.packed_runs(data.images_per_row, shared)
            for run in runs:
                yield tower(name, sequences, Work(*run, encoder.remat), encoder.dtype, lowest=True)
    if model.matched:
        # One pass over queries and the text as it is and as it is told, one of three times as many
        # pairs that are matched.
        work = model.connector.work(model.encoders, 0)
        for count, texts in ((1, 2), (3, 1)):
            read = texts * model.text.length
            pass_ = work._replace(length=work.length + read, context=work.context + read)
            yield tower("connector", count * rows, pass_, model.connector.dtype)
        return
    if model.text is not None and data.images:
        text, length = model.text, data.tokens if model.pair else data.text_tokens
        sizes = (length, length, text.width, text.mlp, text.heads, text.depth)
        yield tower("text", slots, Work(*sizes, text.remat), text.dtype, lowest=True)
    if model.pair:
        return
    if data.images:
        connector = model.connector
        work = connector.work(model.encoders, model.visual_width)
        if model.instructed:
            length, context = work.length + data.text_tokens, work.context + data.text_tokens
            work = work._replace(length=length, context=context)
        yield tower("connector", slots, work, connector.dtype)
        if model.samplers is not None:
            work = work._replace(depth=model.samplers.count, remat=decoder.remat)
            yield tower("samplers", slots, work, decoder.dtype)
    own = Work(
        length=data.tokens,
        context=data.tokens,
        width=decoder.width,
        mlp=decoder.mlp,
        heads=decoder.heads,
        depth=decoder.depth,
        remat=decoder.remat,
    )
    if model.fusion is not None:
        fusion = model.fusion
        cross = own._replace(
            context=data.images_per_row * model.visual_tokens if data.images else 0,
            mlp=fusion.mlp,
            heads=fusion.heads,
            depth=len(fusion.places(decoder.depth)),
        )
        yield tower("decoder/cross", rows, cross, decoder.dtype)
    yield tower("decoder", rows, own, decoder.dtype)
