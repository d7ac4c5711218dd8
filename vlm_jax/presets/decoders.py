"""Decoder language models as rows of fields: every difference between two families is a field."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A causal transformer; the defaults of what follows `head_dim` are Llama's.

    Attributes:
      vocab: rows of the embedding table.
      width, depth, mlp: the usual sizes.
      heads, kv_heads, head_dim: query heads, key/value heads, and their dimension.
      norm: "rms"; "rms_plus_one", whose stored scale is less one (Gemma); "layer";
        "layer_unbiased" (MPT); or "layer_bare", which learns nothing (Galactica).
      norm_eps: of every norm.
      post_norms: whether both branches are normed once more before they are added (Gemma 2 and 3).
      norm_after: whether norms stand behind each sum instead of before its branch, and none before
        the output matrix (OPT-350m).
      parallel: whether attention and feed-forward part read the same hidden states (GPT-NeoX).
      activation, gated: of the feed-forward part.
      qkv_bias, out_bias, mlp_bias: which linear maps have biases.
      qk_norm: whether queries and keys are normed per head (Qwen3, Gemma 3).
      query_scale: what scores are divided by the root of; 0 = head_dim (the 27B Gemmas
        differ).
      attention_cap, logit_cap: c of c * tanh(x / c) on scores and logits; 0 = none (Gemma 2).
      position: "rotary", "learned" (OPT) or "alibi" (MPT).
      positions: rows of the learned table.
      position_offset: which of them position 0 is (OPT: 2).
      rope_theta: base of the rotary frequencies.
      rope_share: share of the head dimension that is rotated (GPT-NeoX: a quarter).
      rope_factor: what rotary frequencies are divided by; with `rope_original` only the slow ones.
      rope_original, rope_low, rope_high: of Llama 3's and YaRN's scaling, the context it was
        trained for and how many turns within it mark slow and fast frequencies; 0 = all are divided
        (linear).
      rope_ramp: what the blend between slow and fast is linear in: "turns" (Llama 3) or
        "dimensions" (YaRN).
      rope_scale: factor on rotated queries and keys (YaRN).
      window: how far "local" layers look back, themselves included; 0 = to the start.
      window_in_blocks: whether the window holds between tokens of one block too, which see each
        other both ways (Gemma 3); transformers' PaliGemma 2 lifts it there.
      pattern: "global" or "local" for each layer, over and over.
      local_theta: `rope_theta` of local layers, which are never scaled; 0 = as global ones (Gemma 3
        differs).
      embed_root: whether embeddings of tokens are multiplied by the root of the width (Gemma).
      embedding_width: of the embedding table and the output matrix, where hidden states are
        projected from and to it; 0 = `width`, and no projections (OPT-350m differs).
      tied: whether the output matrix is the embedding table.
      added: further rows of the embedding table and of the output matrix, as leaves of their own;
        their tokens follow the others' (Idefics1).
      masked: whether one more embedding, which is no token's, stands where a token is to be told
        without those before it (CapPa); its id is `tokens`.
      dropout: on the output of each residual branch and on embeddings.
      dtype, remat: as for an encoder.
    """

    vocab: int
    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    post_norms: bool = False
    norm_after: bool = False
    parallel: bool = False
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    query_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    position: str = "rotary"
    positions: int = 0
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_share: float = 1.0
    rope_factor: float = 1.0
    rope_original: int = 0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_ramp: str = "turns"
    rope_scale: float = 1.0
    window: int = 0
    window_in_blocks: bool = True
    pattern: tuple[str, ...] = ("global",)
    local_theta: float = 0.0
    embed_root: bool = False
    embedding_width: int = 0
    tied: bool = False
    added: int = 0
    masked: bool = False
    dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: bool = True
    kind: str = "transformer"

    CHOICES: ClassVar = {
        "kind": ("transformer",),
        "norm": ("rms", "rms_plus_one", "layer", "layer_unbiased", "layer_bare"),
        "activation": ("silu", "gelu_tanh", "gelu", "relu", "quick_gelu"),
        "position": ("rotary", "learned", "alibi"),
        "rope_ramp": ("turns", "dimensions"),
        "dtype": ("bfloat16", "float32"),
    }

    @property
    def tokens(self) -> int:
        """How many different tokens it knows."""
        return self.vocab + self.added

    @property
    def embedded(self) -> int:
        """The width of the embedding table."""
        return self.embedding_width or self.width

    @property
    def layers(self) -> tuple[str, ...]:
        """ "global" or "local" for each layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    def problems(self, longest: int) -> Iterator[tuple[str, str]]:
        """Fields that contradict others or the longest document, each with what was expected."""
        if self.heads % self.kv_heads:
            yield "heads", f"a multiple of its {self.kv_heads} key/value heads"
        rotated = int(self.head_dim * self.rope_share)
        if self.position == "rotary" and (not 0 < rotated <= self.head_dim or rotated % 2):
            yield (
                "rope_share",
                f"a share of head_dim {self.head_dim} that is an even number, for rotary positions",
            )
        if self.position == "learned" and self.positions - self.position_offset < longest:
            yield (
                "positions",
                f"at least {self.position_offset} more than the {longest} of data.tokens",
            )
        if not self.pattern or not set(self.pattern) <= {"global", "local"}:
            yield "pattern", "global and local, at least one of them"
        local = "local" in self.pattern
        if local != (self.window > 0):
            yield "window", "at least 1 where the pattern has local layers, else 0"
        if self.local_theta and not local:
            yield "local_theta", "0 where the pattern has no local layers"
        if self.norm_after and (self.parallel or self.post_norms):
            yield "norm_after", "False beside parallel or post_norms"
        if self.rope_low >= self.rope_high:
            yield "rope_low", f"less than rope_high {self.rope_high}"


def _llama3(*sizes: int, factor: float = 1.0, tied: bool = False) -> Decoder:
    """Sizes with Llama 3's rotary frequencies; above factor 1 scaled as in 3.1 and 3.2."""
    scaled = {"rope_factor": factor, "rope_original": 8192} if factor > 1 else {}
    return Decoder(*sizes, rope_theta=500_000.0, tied=tied, **scaled)


def _qwen2(*sizes: int, tied: bool) -> Decoder:
    return Decoder(*sizes, norm_eps=1e-6, qkv_bias=True, rope_theta=1e6, tied=tied)


def _qwen3(*sizes: int, tied: bool) -> Decoder:
    return Decoder(*sizes, norm_eps=1e-6, qk_norm=True, rope_theta=1e6, tied=tied)


def _gemma(*sizes: int, **fields) -> Decoder:
    return Decoder(
        *sizes,
        norm="rms_plus_one",
        norm_eps=1e-6,
        activation="gelu_tanh",
        embed_root=True,
        tied=True,
        **fields,
    )


def _gemma2(*sizes: int) -> Decoder:
    return _gemma(
        *sizes,
        post_norms=True,
        attention_cap=50.0,
        logit_cap=30.0,
        window=4096,
        pattern=("local", "global"),
    )


def _gemma3(*sizes: int, window: int, factor: float) -> Decoder:
    return _gemma(
        *sizes,
        post_norms=True,
        qk_norm=True,
        rope_theta=1e6,
        rope_factor=factor,
        window=window,
        pattern=("local",) * 5 + ("global",),
        local_theta=10_000.0,
    )


def _plain(vocab: int, width: int, depth: int, heads: int, **fields) -> Decoder:
    """The shape of GPT-2's descendants: ungated, as many key/value heads as others, four widths."""
    sizes = vocab, width, depth, 4 * width, heads, heads, width // heads
    return Decoder(*sizes, gated=False, **fields)


_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}


def _opt(*sizes: int) -> Decoder:
    return _plain(
        50_272,
        *sizes,
        norm="layer",
        activation="relu",
        position="learned",
        positions=2050,
        position_offset=2,
        tied=True,
        **_BIASES,
    )


def _mpt(*sizes: int) -> Decoder:
    return _plain(
        50_432, *sizes, norm="layer_unbiased", activation="gelu", position="alibi", tied=True
    )


def _neox(*sizes: int, share: float, parallel: bool) -> Decoder:
    fields = {"norm": "layer", "activation": "gelu", "rope_share": share, "parallel": parallel}
    return _plain(50_432, *sizes, **fields, **_BIASES)


# Published shapes (each model's config.json) and, below 100M, sizes of our own for small machines.
# vocab, width, depth, mlp, heads, kv_heads, head_dim, then fields.
SIZES = {
    "1m": Decoder(2048, 128, 4, 384, 4, 2, 32, tied=True),
    "5m": Decoder(2048, 256, 6, 768, 4, 2, 64, tied=True),
    "25m": Decoder(8192, 512, 8, 1536, 8, 4, 64, tied=True),
    "smollm2-135m": Decoder(49_152, 576, 30, 1536, 9, 3, 64, rope_theta=100_000.0, tied=True),
    "smollm2-360m": Decoder(49_152, 960, 32, 2560, 15, 5, 64, rope_theta=100_000.0, tied=True),
    "smollm2-1.7b": Decoder(49_152, 2048, 24, 8192, 32, 32, 64, rope_theta=130_000.0, tied=True),
    "llama1-7b": Decoder(32_000, 4096, 32, 11_008, 32, 32, 128, norm_eps=1e-6),
    "llama1-13b": Decoder(32_000, 5120, 40, 13_824, 40, 40, 128, norm_eps=1e-6),
    "llama2-7b": Decoder(32_000, 4096, 32, 11_008, 32, 32, 128),
    "llama2-13b": Decoder(32_000, 5120, 40, 13_824, 40, 40, 128),
    "llama3-8b": _llama3(128_256, 4096, 32, 14_336, 32, 8, 128),
    "llama3.1-8b": _llama3(128_256, 4096, 32, 14_336, 32, 8, 128, factor=8.0),
    "llama3.2-1b": _llama3(128_256, 2048, 16, 8192, 32, 8, 64, factor=32.0, tied=True),
    "llama3.2-3b": _llama3(128_256, 3072, 28, 8192, 24, 8, 128, factor=32.0, tied=True),
    "mistral-7b": Decoder(
        32_000, 4096, 32, 14_336, 32, 8, 128, window=4096, pattern=("local",)
    ),  # v0.1: later versions have no window
    "qwen2-0.5b": _qwen2(151_936, 896, 24, 4864, 14, 2, 64, tied=True),
    "qwen2-7b": _qwen2(152_064, 3584, 28, 18_944, 28, 4, 128, tied=False),
    "qwen3-0.6b": _qwen3(151_936, 1024, 28, 3072, 16, 8, 128, tied=True),
    "qwen3-8b": _qwen3(151_936, 4096, 36, 12_288, 32, 8, 128, tied=False),
    "gemma-2b": _gemma(256_000, 2048, 18, 16_384, 8, 1, 256),
    "gemma2-2b": _gemma2(256_000, 2304, 26, 9216, 8, 4, 256),
    "gemma2-9b": _gemma2(256_000, 3584, 42, 14_336, 16, 8, 256),
    "gemma3-1b": _gemma3(262_144, 1152, 26, 6912, 4, 1, 256, window=512, factor=1.0),
    "gemma3-4b": _gemma3(262_208, 2560, 34, 10_240, 8, 4, 256, window=1024, factor=8.0),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "mpt-7b": _mpt(4096, 32, 32),
    "redpajama-3b": _neox(2560, 32, 32, share=1.0, parallel=False),
}


def decoder(name: str, **fields) -> Decoder:
    """A decoder by name, e.g. `decoder("llama2-7b", vocab=32_064)`.

    Raises:
      ValueError: the name is not in the table.
    """
    if name not in SIZES:
        raise ValueError(f"unknown decoder {name!r}: expected one of {', '.join(SIZES)}")
    return dataclasses.replace(SIZES[name], **fields)
