"""Decoder language models of the Llama family as rows of fields."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Attributes:
      vocab: rows of the embedding table.
      width, depth, mlp: the usual sizes.
      heads, kv_heads, head_dim: query heads, key/value heads, and their dimension.
      rope_theta: base of the rotary frequencies.
      norm_eps: of every RMSNorm.
      tied: whether the output matrix is the embedding table.
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
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: bool = True


# Published shapes (each model's config.json; llama3.2's scaled rotary frequencies and mistral's
# sliding window are not fields yet) and, below 100M, sizes of our own for small machines.
# vocab, width, depth, mlp, heads, kv_heads, head_dim, then fields.
SIZES = {
    "1m": Decoder(2048, 128, 4, 384, 4, 2, 32, tied=True),
    "5m": Decoder(2048, 256, 6, 768, 4, 2, 64, tied=True),
    "25m": Decoder(8192, 512, 8, 1536, 8, 4, 64, tied=True),
    "smollm2-135m": Decoder(49_152, 576, 30, 1536, 9, 3, 64, rope_theta=100_000.0, tied=True),
    "llama3.2-1b": Decoder(128_256, 2048, 16, 8192, 32, 8, 64, rope_theta=500_000.0, tied=True),
    "llama3.2-3b": Decoder(128_256, 3072, 28, 8192, 24, 8, 128, rope_theta=500_000.0, tied=True),
    "llama2-7b": Decoder(32_000, 4096, 32, 11_008, 32, 32, 128),
    "mistral-7b": Decoder(32_000, 4096, 32, 14_336, 32, 8, 128),
}


def llama(name: str, **fields) -> Decoder:
    """A decoder by name, e.g. `llama("llama2-7b", vocab=32_064)`.

    Raises:
      ValueError: the name is not in the table.
    """
    if name not in SIZES:
        raise ValueError(f"unknown decoder {name!r}: expected one of {', '.join(SIZES)}")
    return dataclasses.replace(SIZES[name], **fields)
