"""Tokenizers: the embedded one of the tiny models, and any Hugging Face `tokenizer.json`."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import tokenizers

from vlm_jax.config import Config
from vlm_jax.data import templates
from vlm_jax.errors import ConfigError

EMBEDDED = pathlib.Path(__file__).parent / "embedded" / "tokenizer.json"

# The names that published tokenizers use, the most specific first; the first one present is taken.
SPECIALS = {
    "pad": ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>", "</s>"),
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "[SEP]"),
}
# Only a placeholder: what stands there is replaced by visual tokens, so any id will do.
IMAGE = ("<image>", "<|image|>", "<image_soft_token>", "<|image_pad|>")

_LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
      pad, bos, eos, image: special ids.
      size: rows that an embedding table needs.
      fingerprint: of the file, so that a resumed run notices another tokenizer.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    pad: int
    bos: int
    eos: int
    image: int
    size: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens spelled out in it are read as ordinary text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_alone(self, text: str) -> list[int]:
        """Ids of a text with what this tokenizer puts around one, such as [CLS] and [SEP]."""
        return self.backend.encode(text).ids

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and for each the character of `text` at which it starts."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def single(self, text: str) -> list[int]:
        """Ids of the tokens that are this text, the special one that is spelled so included."""
        special, spelled = self.backend.token_to_id(text), self.encode(text)
        return ([] if special is None else [special]) + (spelled if len(spelled) == 1 else [])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text, special ones by name; "" where a character goes on.

        A character of several tokens stands at its last one. Bytes that make no character are given
        as the vocabulary spells them.
        """
        pieces, begun = [], []
        for i in map(int, ids):
            if i in self._specials or self.backend.id_to_token(i) is None:
                pieces += [*map(self._named, begun), self._named(i)]
                begun = []
                continue
            begun.append(i)
            text = self._after_words(begun)
            if "\ufffd" not in text:
                pieces += [""] * (len(begun) - 1) + [text]
                begun = []
            elif len(begun) == _LONGEST_CHARACTER:
                pieces += map(self._named, begun)
                begun = []
        return [*pieces, *map(self._named, begun)]

    def is_special(self, i: int) -> bool:
        """Whether an id is that of a special token."""
        return i in self._specials

    @functools.cached_property
    def _specials(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        special = (i for i, token in added.items() if token.special)
        return frozenset((self.pad, self.bos, self.eos, self.image, *special))

    def _named(self, i: int) -> str:
        name = self.backend.id_to_token(i)
        return f"<{i}>" if name is None else name

    def _after_words(self, ids: Sequence[int]) -> str:
        """Text of ids in the middle of a text: at its start decoders may drop a space."""
        words = self.encode("a")
        return self.decode([*words, *ids]).removeprefix(self.decode(words))

    def special(self, name: str) -> int:
        """Id of a token by its exact name.

        Raises:
          ConfigError: the tokenizer has no such token.
        """
        found = self.backend.token_to_id(name)
        if found is None:
            raise ConfigError(
                f"the tokenizer has no token {name!r}, which the chat template needs: choose "
                "another data.template, or a tokenizer that has it"
            )
        return found


@functools.cache
def load(name: str, marks: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer by name.

    Args:
      name: "embedded", or the path of a Hugging Face tokenizer.json or of the folder it is in.
      marks: special tokens that it gets behind its own, as far as it lacks them.

    Raises:
      ConfigError: no such file, not a tokenizer, or it lacks a special token.
    """
    path = EMBEDDED if name == "embedded" else pathlib.Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"config.data.tokenizer is {name!r}: {error.strerror or error}; expected 'embedded' or "
            "the path of a tokenizer.json"
        ) from error
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"config.data.tokenizer is {name!r}, not a tokenizer: {error}") from error
    missing = [mark for mark in marks if backend.token_to_id(mark) is None]
    backend.add_special_tokens(missing)
    return _wrap(backend, name, hashlib.sha256(data + "".join(missing).encode()).hexdigest()[:16])


def for_config(config: Config) -> Tokenizer:
    """The config's tokenizer; the embedded one has the chat template's special tokens too.

    Raises:
      ConfigError: it has more ids than the decoder or text tower has embeddings, or cannot be
        read; or the one that the connector needs.
    """
    name = config.data.tokenizer
    embedded = name == "embedded"
    tokenizer = load(name, templates.template(config.data.template).specials if embedded else ())
    if tokenizer.size > config.model.tokens:
        reader = "text" if config.model.pair else "decoder"
        raise ConfigError(
            f"config.model.{reader}.vocab is {config.model.tokens}; the tokenizer "
            f"{config.data.tokenizer!r} needs at least {tokenizer.size}"
        )
    if config.model.instructed:
        for_instructions(config)
    return tokenizer


def for_instructions(config: Config) -> Tokenizer:
    """The tokenizer of what an instructed connector reads.

    Raises:
      ConfigError: it has more ids than the connector has embeddings, a token that counts as
        padding, or cannot be read.
    """
    name = config.data.instruction_tokenizer or config.data.tokenizer
    tokenizer, rows = load(name), config.model.connector.vocab
    if tokenizer.size > rows:
        raise ConfigError(
            f"config.model.connector.vocab is {rows}; the tokenizer {name!r} of its instructions "
            f"needs at least {tokenizer.size}"
        )
    if tokenizer.pad:
        raise ConfigError(
            f"config.data.instruction_tokenizer is {name!r}, whose padding is {tokenizer.pad}; "
            "expected one whose padding is 0, as 0 is read as padding in second texts"
        )
    return tokenizer


def _wrap(backend: tokenizers.Tokenizer, name: str, fingerprint: str) -> Tokenizer:
    backend.no_padding()
    backend.no_truncation()
    # A caption that says "<eos>" must not end the document.
    backend.encode_special_tokens = True
    ids = {role: _first(backend, candidates) for role, candidates in SPECIALS.items()}
    for role, found in ids.items():
        if found is None:
            raise ConfigError(
                f"config.data.tokenizer {name!r} has no {role} token: looked for "
                f"{', '.join(SPECIALS[role])}; add one of them to its added_tokens"
            )
    image = _first(backend, IMAGE)
    return Tokenizer(
        backend=backend,
        image=ids["pad"] if image is None else image,
        size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        fingerprint=fingerprint,
        **ids,
    )


def _first(backend: tokenizers.Tokenizer, candidates: Sequence[str]) -> int | None:
    found = (backend.token_to_id(name) for name in candidates)
    return next((i for i in found if i is not None), None)
