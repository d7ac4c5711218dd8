"""The byte-level BPE tokenizer of the tiny models, trained on what `train` says."""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from vlm_jax.data import emoji, scenes

VOCABULARY = 3072
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")  # ids 0 to 5


def question_texts(captions: list[str]) -> Iterable[str]:
    """Every phrasing with every relation, filled with captions in turn."""
    for place, caption in enumerate(captions):
        other = captions[place - 1]
        for phrasings in emoji.QUESTIONS.values():
            phrasing = phrasings[place % len(phrasings)]
            relation = tuple(scenes.RELATIONS)[place % len(scenes.RELATIONS)]
            options = "; ".join((caption, other))
            yield phrasing.format(name=caption, other=other, relation=relation, options=options)


def training_texts(records: Iterable[dict]) -> list[str]:
    """Captions, tags, words, groups, questions and fixed answers that training can show."""
    records = list(records)
    shown = [record for record in records if record["split"] == "train"]
    hidden = {record["caption"] for record in records if record["split"] == "unseen_concept"}
    captions = sorted({record["caption"] for record in shown})
    tags = sorted({tag for record in shown for tag in record["tags"]} - hidden)
    groups = sorted({record["group"] for record in shown})
    fixed = [*emoji.COUNTS, *emoji.YES_NO, *emoji.ORDINALS, *groups]
    # Captions twice, since an answer starts with a word where a question has " " before it.
    return [*captions, *captions, *tags, *fixed, *question_texts(captions)]


def train(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE: any UTF-8 text round-trips, and nothing is added around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
