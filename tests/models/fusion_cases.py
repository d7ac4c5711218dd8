"""Decoders with gated cross-attention, as small cases: sizes, inputs, and where weights go."""

import dataclasses

import cases
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.weights import tables
from vlm_jax.weights.families import idefics_text, open_flamingo

ROWS, TOKENS, IMAGES, QUERIES = 2, 11, 3, 4
FLAMINGO = {"norm": "layer", "activation": "gelu", "gated": False}


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder with gated blocks.

    Attributes:
      family: "idefics", or the model_type of the decoder that OpenFlamingo's blocks stand in.
      decoder, fusion: the sizes.
    """

    family: str
    decoder: Decoder
    fusion: CrossAttention

    @property
    def model(self) -> Model:
        """Both in float32."""
        decoder = dataclasses.replace(self.decoder, dtype="float32", remat=False)
        return Model(decoder=decoder, fusion=self.fusion)

    @property
    def plain(self) -> cases.Case:
        """The decoder of an OpenFlamingo without its blocks."""
        return cases.Case("decoder", Model(decoder=self.decoder), None, self.family)

    def leaves(self, theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Their weights, or gradients of them, as our leaves."""
        shapes = {path: leaf.shape for path, leaf in params.abstract(self.model).items()}
        if self.family == "idefics":
            rows = tables.placed(idefics_text.rows(self.decoder, self.fusion), "decoder/")
            return tables.gather(rows, shapes, theirs)
        rows = open_flamingo.rows(self.fusion, open_flamingo.LAYERS[self.family])
        cross = tables.gather(tables.placed(rows, "decoder/"), shapes, theirs)
        return cases.leaves(self.plain, theirs) | cross


def idefics_case(*sizes: int, visual: int, decoder: dict, eps: float = 1e-6, **fields) -> Case:
    """An Idefics1 of vocabulary, width, depth, mlp and heads; its blocks have these sizes too."""
    vocab, width, depth, mlp, heads = sizes
    shared = mlp, heads, heads, width // heads
    return Case(
        "idefics",
        Decoder(vocab, width, depth, *shared, norm_eps=eps, **decoder),
        CrossAttention(*shared, width=visual, norm_eps=eps, **fields),
    )


def flamingo_case(plain: cases.Case, heads: int, head_dim: int, **fields) -> Case:
    """OpenFlamingo's blocks in an MPT or GPT-NeoX."""
    decoder = plain.model.decoder
    sizes = 4 * decoder.width, heads, heads, head_dim
    return Case(plain.family, decoder, CrossAttention(*sizes, **FLAMINGO | fields))


GOLDENS = {
    "idefics": idefics_case(
        *(17, 6, 4, 10, 3),
        visual=7,
        decoder={"added": 2},
        eps=1e-2,
        every=2,
        qk_norm=True,
        gate="vector",
    ),
    "idefics_tied": idefics_case(
        *(19, 10, 2, 14, 5), visual=6, decoder={"added": 3, "tied": True}, every=1
    ),
    # Groups of two layers behind one, and a last block with one layer behind it.
    "flamingo_mpt": flamingo_case(
        cases.mpt(17, 6, 4, 3), 3, 5, every=2, start=1, width=5, norm_eps=1e-2
    ),
    # One block where there is room for two, and a layer after it.
    "flamingo_neox": flamingo_case(
        cases.neox(17, 8, 2, 10, 2, rope_share=0.5, parallel=True),
        *(2, 3),
        every=1,
        start=0,
        count=1,
        width=5,
        norm_eps=1e-4,
    ),
}

LARGER = {
    "idefics": idefics_case(
        *(101, 60, 4, 90, 6), visual=44, decoder={"added": 2}, eps=1e-4, every=2, qk_norm=True
    ),
    "flamingo_mpt": flamingo_case(
        cases.mpt(97, 70, 5, 7), 4, 16, every=3, start=2, width=40, norm_eps=1e-5
    ),
    "flamingo_neox": flamingo_case(
        cases.neox(89, 40, 5, 70, 5, rope_share=1.0, parallel=False),
        *(8, 6),
        every=2,
        start=1,
        width=36,
        norm_eps=1e-3,
    ),
}


def inputs(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, T], visual tokens [B, N, Q, E], and where an image's placeholder stands [B, T]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, case.decoder.tokens, (ROWS, TOKENS)).astype(np.int32)
    visual = rng.normal(size=(ROWS, IMAGES, QUERIES, case.fusion.width)).astype(np.float32)
    media = np.zeros((ROWS, TOKENS), bool)
    media[0, [2, 5, 6]] = media[1, [4]] = True  # text before images; two side by side; one alone
    return tokens, visual, media


def image_index(media: np.ndarray) -> np.ndarray:
    """The last image at or before each token, -1 = none."""
    return media.cumsum(axis=1).astype(np.int32) - 1


def run(case: Case, leaves: dict, tokens, visual, media):
    """Our logits."""
    vlm = params.build(case.model, leaves)
    positions = jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)
    past = positions[:, None, :, None] >= positions[:, None, None, :]
    hook = vlm.hook(jnp.asarray(image_index(media)), jnp.asarray(visual))
    hidden, _ = vlm.decoder(vlm.decoder.embed(jnp.asarray(tokens)), positions, past, hook=hook)
    return vlm.unembed(hidden)


def assert_close(ours: dict, theirs: dict, tolerance: float = 1e-4) -> None:
    """Every array within a relative error, in the Euclidean norm.

    Where the true gradient is zero (key biases), both are rounding errors: hence a floor, a
    millionth of the largest norm.
    """
    assert ours.keys() == theirs.keys()
    norms = {path: np.linalg.norm(array) for path, array in theirs.items()}
    floor = 1e-6 * max(norms.values())
    for path, wanted in theirs.items():
        error = np.linalg.norm(np.asarray(ours[path]) - wanted)
        assert error <= tolerance * norms[path] + floor, (path, error, norms[path])
