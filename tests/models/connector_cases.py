"""Connectors of published systems in odd sizes, with what they are fed and where weights go."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np

from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.models.layers import Features
from vlm_jax.presets.connectors import Connector, resampler
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.mapping import Mapping
from vlm_jax.presets.qformer import QFormer
from vlm_jax.presets.sva import Sva
from vlm_jax.weights import tables
from vlm_jax.weights.families import (
    blip_2_qformer,
    cambrian_sva,
    clipcap_mapping,
    gemma3_projector,
    idefics2_connector,
    idefics3_connector,
    idefics_resampler,
    instructblip_qformer,
    llava_next_projector,
    llava_projector,
    mplug_owl_abstractor,
    open_flamingo_resampler,
    paligemma_projector,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A connector before encoders and a decoder of which only the sizes matter.

    Attributes:
      family: the module with its table.
      preset: the connector.
      features: rows, columns and width of the features of each encoder.
      width: of the decoder.
      masked: whether some features are padding.
      texts: length of the images' second texts; 0 = none.
    """

    family: types.ModuleType
    preset: object
    features: tuple[tuple[int, int, int], ...]
    width: int
    masked: bool = False
    texts: int = 0

    @property
    def model(self) -> Model:
        """The system of one layer each around the connector."""
        first, *others = (encoder(*sizes) for sizes in self.features)
        # Rematerialised, for a scan compiles its block once, where it is not unrolled.
        connector = dataclasses.replace(self.preset, dtype="float32", remat=True)
        decoder = Decoder(8, self.width, 1, 8, 2, 1, 4, dtype="float32", remat=False)
        return Model(first, connector, decoder, tuple(others))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of our leaves, by path within the connector."""
        return {
            path.removeprefix("connector/"): leaf.shape
            for path, leaf in params.abstract(self.model).items()
            if path.startswith("connector/")
        }

    def leaves(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Their weights, or gradients of them, as our leaves."""
        return tables.gather(self.family.rows(self.preset), self.shapes, tensors)


def encoder(rows: int, columns: int, width: int) -> Encoder:
    """An encoder whose features have this grid and width."""
    return Encoder(
        width, 1, 8, 1, patch=4, image_size=(4 * rows, 4 * columns), dtype="float32", remat=False
    )


def inputs(case: Case, images: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Features `x0`, `x1`, ... of each encoder, and where the case has them a mask and texts."""
    rng = np.random.default_rng(seed)
    found = {
        f"x{i}": rng.normal(size=(images, rows * columns, width)).astype(np.float32)
        for i, (rows, columns, width) in enumerate(case.features)
    }
    if case.masked:
        for i in range(len(case.features)):
            found[f"mask{i}"] = np.arange(found[f"x{i}"].shape[1]) < np.array([[99], [1], [4]])
    if case.texts:
        lengths = np.array([[case.texts], [0], [3]])
        texts = rng.integers(1, case.preset.vocab, (images, case.texts))
        found["texts"] = np.where(np.arange(case.texts) < lengths, texts, 0).astype(np.int32)
    return found


def run(case: Case, leaves: dict, fed: dict[str, np.ndarray]):
    """Our visual tokens over these leaves."""
    model = case.model
    flat = {path: jnp.zeros(leaf.shape) for path, leaf in params.abstract(model).items()}
    flat |= {f"connector/{path}": leaf for path, leaf in leaves.items()}
    seen = [
        Features(jnp.asarray(fed[f"x{i}"]), fed.get(f"mask{i}")) for i in range(len(case.features))
    ]
    return params.build(model, flat).connector(tuple(seen), fed.get("texts"))


def relative_error(ours, theirs) -> float:
    """Norm of the difference over the norm of theirs."""
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights for these shapes, none of them 0 or 1; scales lie around 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.3 * rng.normal(size=shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


_idefics2 = {"queries": 5, "layers": 2, "head_dim": 5, "norm_eps": 1e-2, "embed_hidden": 13}
IDEFICS2 = resampler("idefics2", width=10, heads=6, kv_heads=2, **_idefics2)
_flamingo = {"width": 10, "out": 10, "queries": 5, "layers": 2, "heads": 3, "kv_heads": 3}

_qformer = {"queries": 3, "width": 6, "mlp": 7, "heads": 3, "norm_eps": 1e-2}
QFORMER = QFormer(depth=4, **(_qformer | {"mlp": 5}))
INSTRUCTED = QFormer(depth=2, vocab=19, positions=9, **_qformer)

# Cases that transformers has.
GOLDENS = {
    "llava": Case(llava_projector, Connector("mlp"), ((2, 3, 10),), 14),
    "llava_next": Case(llava_next_projector, Connector("mlp", newline="token"), ((3, 2, 6),), 10),
    "paligemma": Case(paligemma_projector, Connector("linear"), ((2, 3, 7),), 9),
    "gemma3": Case(
        gemma3_projector,
        Connector(
            "linear",
            bias=False,
            pool="average",
            grid=(2, 2),
            input_norm="rms_plus_one",
            norm_eps=1e-2,
        ),
        ((6, 6, 7),),
        9,
    ),
    "idefics3": Case(
        idefics3_connector,
        Connector("linear", bias=False, pool="shuffle", factor=3),
        ((6, 6, 5),),
        8,
    ),
    "idefics2": Case(idefics2_connector, IDEFICS2, ((2, 3, 7),), 10),
    "idefics2_masked": Case(idefics2_connector, IDEFICS2, ((2, 3, 7),), 10, masked=True),
    "idefics": Case(
        idefics_resampler,
        resampler("idefics", head_dim=5, **_flamingo),
        ((2, 3, 10),),
        14,
    ),
    "blip_2": Case(blip_2_qformer, QFORMER, ((2, 3, 7),), 10, masked=True),
    "instructblip": Case(instructblip_qformer, INSTRUCTED, ((2, 3, 7),), 10, masked=True, texts=5),
}

# Further ones, compared only where transformers is installed.
LIVE = {
    "llava_unbiased": Case(
        llava_projector, Connector("mlp", bias=False, activation="gelu_tanh"), ((2, 3, 10),), 14
    ),
    "idefics_no_qk_norm": Case(
        idefics_resampler,
        resampler("idefics", head_dim=4, **(_flamingo | {"qk_norm": False})),
        ((2, 3, 10),),
        14,
    ),
    "blip_2_every_3": Case(
        blip_2_qformer, dataclasses.replace(QFORMER, depth=3, every=3), ((2, 3, 7),), 10
    ),
}

# Cases that transformers lacks: `connector_statements.py` states them.
STATED = {
    "open_flamingo": Case(
        open_flamingo_resampler,
        resampler("open-flamingo", head_dim=5, hidden=30, **_flamingo),
        ((2, 3, 10),),
        14,
    ),
    "mplug_owl": Case(
        mplug_owl_abstractor,
        resampler(
            "mplug-owl", width=12, hidden=14, queries=5, layers=2, heads=3, kv_heads=3,
            mlp_norm_eps=1e-2,
        ),
        ((2, 3, 12),),
        10,
        masked=True,
    ),
    "clipcap_mlp": Case(clipcap_mapping, Mapping(queries=3), ((1, 1, 7),), 10),
    "clipcap_transformer": Case(
        clipcap_mapping,
        Mapping("transformer", queries=3, seeds=4, layers=2),
        ((1, 1, 7),),
        16,
    ),
    "cambrian": Case(
        cambrian_sva,
        Sva(sides=(3, 3, 6), side=3, width=32, layers=2),
        ((4, 2, 7), (3, 3, 5), (6, 6, 4)),
        10,
    ),
    "cambrian_masked": Case(
        cambrian_sva,
        Sva(sides=(4, 8), side=4, width=32, layers=2),
        ((4, 4, 7), (8, 8, 5)),
        10,
        masked=True,
    ),
}  # fmt: skip
