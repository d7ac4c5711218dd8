"""The state of a run: everything on the devices that a checkpoint must hold."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from vlm_jax.config import Config
from vlm_jax.models import adapters, params
from vlm_jax.parallel import sharding
from vlm_jax.training import guard, initial, optimizer
from vlm_jax.training.adaptation import Plan

# Drawing hundreds of parameters is one large program that runs once: on a CPU, LLVM spent 15 s on
# optimising what then ran for milliseconds (3 s so).
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A pytree of plain arrays; parameters are flat dicts by path.

    Attributes:
      step: optimizer steps done.
      trainable: float32 masters.
      frozen: parameters that never change, in their own dtype.
      opt: the optimizer's state, for `trainable` alone.
      ema: float32 running average of `trainable`, or None.
      key: data of the PRNG key that dropout of every step is folded from.
      guard: what the guard knows.
    """

    step: Int[Array, ""]
    trainable: dict[str, Array]
    frozen: dict[str, Array]
    opt: optax.OptState
    ema: dict[str, Array] | None
    key: UInt32[Array, "2"]
    guard: guard.Memory

    @property
    def done(self) -> int:
        """Steps of the loop that led here, skipped ones among them; waits for the device."""
        return int(self.step) + int(self.guard.skipped)

    def evaluated(self) -> dict[str, Array]:
        """All parameters by path as evaluation and export want them: averages where kept."""
        return {**self.frozen, **(self.trainable if self.ema is None else self.ema)}


def fresh(config: Config, plan: Plan, loaded: dict[str, Array] | None = None) -> State:
    """A new run's state; pure, made under jit by `create`.

    Args:
      config: the run.
      plan: which parameters train.
      loaded: parameters that are not drawn, by path.
    """
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    drawn = params.init(config.model, init_key)
    flat = hold(plan, drawn | hold(plan, loaded or {}))
    trainable, frozen = plan.split(_adapters(config, plan, flat, init_key) | flat)
    trainable = {path: leaf.astype(jnp.float32) for path, leaf in trainable.items()}
    return State(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        opt=optimizer.make(config.train, plan).init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if config.train.ema else None,
        key=jax.random.key_data(dropout_key),
        guard=guard.fresh(config.guard),
    )


def hold(plan: Plan, flat: dict[str, Array]) -> dict[str, Array]:
    """The parameters with kernels in few bits where the plan says so; pure.

    A kernel whose codes are there too is left out.
    """
    found = {path: leaf for path, leaf in flat.items() if path not in plan.held}
    for path, held in plan.held.items():
        there = held.leaves(path).keys() <= flat.keys()
        if path in flat and not there:
            found |= held.hold(path, flat[path])
    return found


def _adapters(config: Config, plan: Plan, flat: dict[str, Array], key: Array) -> dict[str, Array]:
    """Fresh adapters of the kernels that have one."""
    found, flat = {}, params.restored(config.model, flat)
    for path, spec in plan.adapters.items():
        places = {name: adapters.beside(path, name) for name in adapters.LEAVES}
        shapes = {name: plan.shapes[p] for name, p in places.items() if p in plan.shapes}
        leaves = adapters.init(spec, shapes, flat[path], adapters.keyed(key, path))
        found |= {places[name]: leaf for name, leaf in leaves.items()}
    return found


def abstract(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    planned: Mapping[str, initial.Source] | None = None,
) -> State:
    """Shapes, dtypes and shardings of the state on `mesh`; nothing is allocated.

    Args:
      config: the run.
      plan: which parameters train.
      mesh: its devices.
      planned: what folders of `config.init` that are not there yet will hold.
    """
    loaded = initial.shapes(config, planned)
    shapes = jax.eval_shape(lambda loaded: fresh(config, plan, loaded), loaded)
    places = sharding.named(mesh, plan.shapes, params.axes)

    def place(keys: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Moments and averages lie where their parameter lies; counters, keys and factored moments
        # everywhere.
        path = getattr(keys[-1], "key", None)
        alike = path in places and leaf.shape == plan.shapes[path].shape
        where = places[path] if alike else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, shapes)


def own_bytes(state: State) -> dict[str, int]:
    """Bytes of each parameter, over all devices."""
    leaves = {**state.trainable, **state.frozen}
    return {path: leaf.size * leaf.dtype.itemsize for path, leaf in leaves.items()}


def kept_bytes(state: State) -> dict[str, int]:
    """Bytes that the optimizer and the average keep for each trainable path, over all devices."""
    kept = dict.fromkeys(state.trainable, 0)
    for keys, leaf in jax.tree_util.tree_leaves_with_path((state.opt, state.ema)):
        path = getattr(keys[-1], "key", None)
        if path in kept:
            kept[path] += leaf.size * leaf.dtype.itemsize
    return kept


def shardings(state: State) -> State:
    """The shardings of a state or abstract state, as a tree of its shape."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def create(config: Config, plan: Plan, mesh: Mesh) -> State:
    """A new run's state, each shard made or read on its own device."""
    places = shardings(abstract(config, plan, mesh))
    kernels = {path: held.kernel for path, held in plan.held.items()}
    loading = sharding.named(mesh, plan.shapes | kernels, params.axes)
    taken = jax.jit(functools.partial(hold, plan))
    loaded = initial.load(config, loading, taken, alone=kernels.keys())
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = QUICK_COMPILE if on_cpu else None
    init = jax.jit(
        lambda loaded: fresh(config, plan, loaded),
        out_shardings=places,
        donate_argnums=0,
        compiler_options=options,
    )
    return init(loaded)
