"""Every chat template: golden strings with what is learned, and the rules that all of them keep.

A golden is the whole document as text, the learned parts in «», an image as `<image><image>`. They
were written from the sources that `templates.TEMPLATES` names, not by `chat.render`.
"""

import functools
import pathlib

import corpora
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlm_jax.data import chat, documents, formats, sources, templates, tokenizer
from vlm_jax.data.example import Example, ImageRef, Turn
from vlm_jax.errors import DataError

TWO = (
    Turn("user", (ImageRef(0), "What is it?")),
    Turn("assistant", ("A fox.",)),
    Turn("user", ("And where?",)),
    Turn("assistant", ("In snow.",)),
)
MANY = (
    Turn("user", (ImageRef(0), ImageRef(1), "Which is red?")),
    Turn("assistant", ("The first.",)),
    Turn("user", ("Is ", ImageRef(2), " too?")),
    Turn("assistant", ("No.",)),
)
OWN = Turn("system", ("Be brief.",))

I = "<image><image>"
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = HUMAN.replace("human", "user")
LLAVA = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
OWL = (
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CAMBRIAN = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. \n    As a "
    "multimodal AI, you have the ability to process and analyze images. Whenever an image is "
    "present in the conversation, very carefully examine it and consider its content when "
    "formulating your response.\n    You should give concise responses to very simple questions, "
    "but provide thorough responses to more complex and open-ended questions. "
)
W = "<|global_image|>"
F, G = "<fake_token_around_image>", "<fake_token_around_image><global-img>"

# Template -> TWO, MANY, and TWO with a system text of its own or "" where it has no place for one.
GOLDENS = {
    "tiny": (
        f"<s><user>{I}What is it?<assistant>«A fox.</s>»<user>And where?<assistant>«In snow.</s>»",
        f"<s><user>{I}{I}Which is red?<assistant>«The first.</s>»"
        f"<user>Is {I} too?<assistant>«No.</s>»",
        "",
    ),
    "plain": (
        f"<s>{I}«A fox.\nIn snow.\n»",
        f"<s>{I}{I}«The first.\n»{I}«No.\n»",
        "",
    ),
    "blip2": (
        f"{I}<s>«A fox.\nIn snow.\n»",
        f"{I}{I}{I}<s>«The first.\nNo.\n»",
        "",
    ),
    "instructblip": (
        f"{I}<s>What is it?«A fox.</s>»And where?«In snow.</s>»",
        f"{I}{I}{I}<s>Which is red?«The first.</s>»Is  too?«No.</s>»",
        "",
    ),
    "clip": (
        f"<s>{I}«A fox.</s>In snow.</s>»",
        f"<s>{I}{I}«The first.</s>»{I}«No.</s>»",
        "",
    ),
    "siglip": (
        f"{I}«A fox.</s>In snow.</s>»",
        f"{I}{I}«The first.</s>»{I}«No.</s>»",
        "",
    ),
    "interleaved": (
        f"<s>{I}What is it?«A fox.»And where?«In snow.</s>»",
        f"<s>{I}{I}Which is red?«The first.»Is {I} too?«No.</s>»",
        "",
    ),
    "idefics": (
        f"<s>{F}{I}{F}What is it?«A fox.»And where?«In snow.</s>»",
        f"<s>{F}{I}{F}{I}{F}Which is red?«The first.»Is {F}{I}{F} too?«No.</s>»",
        "",
    ),
    "vicuna_v0": (
        f"<s>{HUMAN}###Human: {I}\nWhat is it?###Assistant:« A fox.###»"
        "Human: And where?###Assistant:« In snow.###»",
        f"<s>{HUMAN}###Human: {I}\n{I}\nWhich is red?###Assistant:« The first.###»"
        f"Human: {I}\nIs  too?###Assistant:« No.###»",
        f"<s>Be brief.###Human: {I}\nWhat is it?###Assistant:« A fox.###»"
        "Human: And where?###Assistant:« In snow.###»",
    ),
    "llava_v0": (
        f"<s>{HUMAN}\n\n### Human: {I}\nWhat is it?\n### Assistant:« A fox.\n###»"
        " Human: And where?\n### Assistant:« In snow.\n###» ",
        f"<s>{HUMAN}\n\n### Human: {I}\n{I}\nWhich is red?\n### Assistant:« The first.\n###»"
        f" Human: {I}\nIs  too?\n### Assistant:« No.\n###» ",
        f"<s>Be brief.\n\n### Human: {I}\nWhat is it?\n### Assistant:« A fox.\n###»"
        " Human: And where?\n### Assistant:« In snow.\n###» ",
    ),
    "vicuna_v1": (
        f"<s>{USER} USER: {I}\nWhat is it? ASSISTANT:« A fox.</s>»"
        "USER: And where? ASSISTANT:« In snow.</s>»",
        f"<s>{USER} USER: {I}\n{I}\nWhich is red? ASSISTANT:« The first.</s>»"
        f"USER: {I}\nIs  too? ASSISTANT:« No.</s>»",
        f"<s>Be brief. USER: {I}\nWhat is it? ASSISTANT:« A fox.</s>»"
        "USER: And where? ASSISTANT:« In snow.</s>»",
    ),
    "llama_2": (
        f"<s>[INST] {I}What is it? [/INST]« A fox. </s>»"
        "<s>[INST] And where? [/INST]« In snow. </s>»",
        f"<s>[INST] {I}{I}Which is red? [/INST]« The first. </s>»"
        f"<s>[INST] Is {I} too? [/INST]« No. </s>»",
        f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{I}What is it? [/INST]« A fox. </s>»"
        "<s>[INST] And where? [/INST]« In snow. </s>»",
    ),
    "llava_llama_2": (
        f"<s>[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n{I}\nWhat is it? [/INST]« A fox. </s>»"
        "<s>[INST] And where? [/INST]« In snow. </s>»",
        f"<s>[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n{I}\n{I}\nWhich is red? [/INST]« The first. </s>»"
        f"<s>[INST] {I}\nIs  too? [/INST]« No. </s>»",
        f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{I}\nWhat is it? [/INST]« A fox. </s>»"
        "<s>[INST] And where? [/INST]« In snow. </s>»",
    ),
    "llava_mistral": (
        f"<s>[INST] {I}\nWhat is it? [/INST]« A fox. </s>»"
        "[INST] And where? [/INST]« In snow. </s>»",
        f"<s>[INST] {I}\n{I}\nWhich is red? [/INST]« The first. </s>»"
        f"[INST] {I}\nIs  too? [/INST]« No. </s>»",
        "",
    ),
    "cambrian": (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>{CAMBRIAN}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>{I}\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>«A fox.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>And where?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>«In snow.<|eot_id|>»",
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>{CAMBRIAN}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>{I}\n{I}\nWhich is red?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>«The first.<|eot_id|>»"
        f"<|start_header_id|>user<|end_header_id|>{I}\nIs  too?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>«No.<|eot_id|>»",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>Be brief.<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>{I}\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>«A fox.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>And where?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>«In snow.<|eot_id|>»",
    ),
    "llama_3": (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{I}What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A fox.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd where?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«In snow.<|eot_id|>»",
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{I}{I}"
        "Which is red?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«The first.<|eot_id|>»"
        f"<|start_header_id|>user<|end_header_id|>\n\nIs {I} too?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«No.<|eot_id|>»",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{I}What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A fox.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd where?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«In snow.<|eot_id|>»",
    ),
    "mistral": (
        f"<s>[INST] {I}What is it? [/INST]«A fox.</s>»[INST] And where? [/INST]«In snow.</s>»",
        f"<s>[INST] {I}{I}Which is red? [/INST]«The first.</s>»[INST] Is {I} too? [/INST]«No.</s>»",
        "",
    ),
    "chatml": (
        f"<|im_start|>user\n{I}What is it?<|im_end|>\n<|im_start|>assistant\n«A fox.<|im_end|>»\n"
        "<|im_start|>user\nAnd where?<|im_end|>\n<|im_start|>assistant\n«In snow.<|im_end|>»\n",
        f"<|im_start|>user\n{I}{I}Which is red?<|im_end|>\n"
        "<|im_start|>assistant\n«The first.<|im_end|>»\n"
        f"<|im_start|>user\nIs {I} too?<|im_end|>\n<|im_start|>assistant\n«No.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{I}What is it?<|im_end|>\n<|im_start|>assistant\n«A fox.<|im_end|>»\n"
        "<|im_start|>user\nAnd where?<|im_end|>\n<|im_start|>assistant\n«In snow.<|im_end|>»\n",
    ),
    "smollm2": (
        f"<|im_start|>system\n{SMOL}<|im_end|>\n"
        f"<|im_start|>user\n{I}What is it?<|im_end|>\n<|im_start|>assistant\n«A fox.<|im_end|>»\n"
        "<|im_start|>user\nAnd where?<|im_end|>\n<|im_start|>assistant\n«In snow.<|im_end|>»\n",
        f"<|im_start|>system\n{SMOL}<|im_end|>\n"
        f"<|im_start|>user\n{I}{I}Which is red?<|im_end|>\n"
        "<|im_start|>assistant\n«The first.<|im_end|>»\n"
        f"<|im_start|>user\nIs {I} too?<|im_end|>\n<|im_start|>assistant\n«No.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{I}What is it?<|im_end|>\n<|im_start|>assistant\n«A fox.<|im_end|>»\n"
        "<|im_start|>user\nAnd where?<|im_end|>\n<|im_start|>assistant\n«In snow.<|im_end|>»\n",
    ),
    "gemma": (
        f"<bos><start_of_turn>user\n{I}What is it?<end_of_turn>\n"
        "<start_of_turn>model\n«A fox.<end_of_turn>»\n"
        "<start_of_turn>user\nAnd where?<end_of_turn>\n"
        "<start_of_turn>model\n«In snow.<end_of_turn>»\n",
        f"<bos><start_of_turn>user\n{I}{I}Which is red?<end_of_turn>\n"
        "<start_of_turn>model\n«The first.<end_of_turn>»\n"
        f"<start_of_turn>user\nIs {I} too?<end_of_turn>\n"
        "<start_of_turn>model\n«No.<end_of_turn>»\n",
        "",
    ),
    "minigpt4": (
        f"<s>###Human: <Img>{I}</Img> What is it? ###Assistant: «A fox.###»"
        "<s>###Human: And where? ###Assistant: «In snow.###»",
        f"<s>###Human: <Img>{I}</Img> <Img>{I}</Img> Which is red? ###Assistant: «The first.###»"
        f"<s>###Human: <Img>{I}</Img> Is  too? ###Assistant: «No.###»",
        "",
    ),
    "minigpt_v2": (
        f"<s>[INST] <Img>{I}</Img> What is it?  [/INST]«A fox.</s>»"
        "<s>[INST] And where?  [/INST]«In snow.</s>»",
        f"<s>[INST] <Img>{I}</Img> <Img>{I}</Img> Which is red?  [/INST]«The first.</s>»"
        f"<s>[INST] <Img>{I}</Img> Is  too?  [/INST]«No.</s>»",
        "",
    ),
    "mplug_owl": (
        f"<s>{OWL}\nHuman: {I}\nHuman: What is it?\nAI: «A fox.</s>»"
        "\nHuman: And where?\nAI: «In snow.</s>»",
        f"<s>{OWL}\nHuman: {I}\nHuman: {I}\nHuman: Which is red?\nAI: «The first.</s>»"
        f"\nHuman: {I}\nHuman: Is  too?\nAI: «No.</s>»",
        f"<s>Be brief.\nHuman: {I}\nHuman: What is it?\nAI: «A fox.</s>»"
        "\nHuman: And where?\nAI: «In snow.</s>»",
    ),
    "idefics2": (
        f"<s>User:{F}{I}{F}What is it?<end_of_utterance>\nAssistant:« A fox.<end_of_utterance>»\n"
        "User: And where?<end_of_utterance>\nAssistant:« In snow.<end_of_utterance>»\n",
        f"<s>User:{F}{I}{F}{I}{F}Which is red?<end_of_utterance>\n"
        "Assistant:« The first.<end_of_utterance>»\n"
        f"User: Is {F}{I}{F} too?<end_of_utterance>\nAssistant:« No.<end_of_utterance>»\n",
        f"<s>System: Be brief.<end_of_utterance>\n"
        f"User:{F}{I}{F}What is it?<end_of_utterance>\nAssistant:« A fox.<end_of_utterance>»\n"
        "User: And where?<end_of_utterance>\nAssistant:« In snow.<end_of_utterance>»\n",
    ),
    "idefics3": (
        f"<|begin_of_text|>User:{G}{I}{F}What is it?<end_of_utterance>\n"
        "Assistant:« A fox.<end_of_utterance>»\n"
        "User: And where?<end_of_utterance>\nAssistant:« In snow.<end_of_utterance>»\n",
        f"<|begin_of_text|>User:{G}{I}{F}{G}{I}{F}Which is red?<end_of_utterance>\n"
        "Assistant:« The first.<end_of_utterance>»\n"
        f"User: Is {G}{I}{F} too?<end_of_utterance>\nAssistant:« No.<end_of_utterance>»\n",
        "<|begin_of_text|>System: Be brief.<end_of_utterance>\n"
        f"User:{G}{I}{F}What is it?<end_of_utterance>\nAssistant:« A fox.<end_of_utterance>»\n"
        "User: And where?<end_of_utterance>\nAssistant:« In snow.<end_of_utterance>»\n",
    ),
    "smolvlm": (
        f"<|im_start|>User:{G}{I}{F}What is it?<end_of_utterance>\n"
        "Assistant:« A fox.<end_of_utterance>»\n"
        "User: And where?<end_of_utterance>\nAssistant:« In snow.<end_of_utterance>»\n",
        f"<|im_start|>User:{G}{I}{F}{G}{I}{F}Which is red?<end_of_utterance>\n"
        "Assistant:« The first.<end_of_utterance>»\n"
        f"User: Is {G}{I}{F} too?<end_of_utterance>\nAssistant:« No.<end_of_utterance>»\n",
        "<|im_start|>System: Be brief.<end_of_utterance>\n"
        f"User:{G}{I}{F}What is it?<end_of_utterance>\nAssistant:« A fox.<end_of_utterance>»\n"
        "User: And where?<end_of_utterance>\nAssistant:« In snow.<end_of_utterance>»\n",
    ),
    "nanovlm_v0": (
        f"{I}Question: What is it? Answer:«A fox.<|endoftext|>»"
        "Question: And where? Answer:«In snow.<|endoftext|>»",
        f"{I}{I}{I}Question: Which is red? Answer:«The first.<|endoftext|>»"
        "Question: Is  too? Answer:«No.<|endoftext|>»",
        "",
    ),
    "nanovlm": (
        f"<|im_start|>user\n{W}{I}What is it?<|im_end|>\n"
        "<|im_start|>assistant\n«A fox.<|im_end|>»\n"
        "<|im_start|>user\nAnd where?<|im_end|>\n<|im_start|>assistant\n«In snow.<|im_end|>»\n",
        f"<|im_start|>user\n<image: 0>{W}{I}<image: 1>{W}{I}Which is red?<|im_end|>\n"
        "<|im_start|>assistant\n«The first.<|im_end|>»\n"
        f"<|im_start|>user\nIs <image: 2>{W}{I} too?<|im_end|>\n"
        "<|im_start|>assistant\n«No.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{W}{I}What is it?<|im_end|>\n"
        "<|im_start|>assistant\n«A fox.<|im_end|>»\n"
        "<|im_start|>user\nAnd where?<|im_end|>\n<|im_start|>assistant\n«In snow.<|im_end|>»\n",
    ),
    "paligemma": (
        f"{I}<bos>What is it?\n«A fox.<eos>»And where?\n«In snow.<eos>»",
        f"{I}{I}{I}<bos>Which is red?\n«The first.<eos>»Is  too?\n«No.<eos>»",
        "",
    ),
    "in_out": (
        f"<s>{I}In: What is it?\nOut:« A fox.</s>»In: And where?\nOut:« In snow.</s>»",
        f"<s>{I}{I}{I}In: Which is red?\nOut:« The first.</s>»In: Is  too?\nOut:« No.</s>»",
        "",
    ),
    "flamingo": (
        f"{I}What is it?«A fox.<|endofchunk|>»And where?«In snow.<|endofchunk|><|endoftext|>»",
        f"{I}{I}Which is red?«The first.<|endofchunk|>»Is {I} too?«No.<|endofchunk|><|endoftext|>»",
        "",
    ),
}

# Tokens of the templates' families; <s> and </s> for all others.
GEMMA = ("<bos>", "<eos>")
META = ("<|begin_of_text|>", "<|end_of_text|>")
BPE = ("<|endoftext|>", "<|endoftext|>")
ENDS = {
    "llama_3": META,
    "cambrian": META,
    "nanovlm_v0": BPE,
    "chatml": BPE,
    "smollm2": BPE,
    "gemma": GEMMA,
    "idefics3": META,
    "smolvlm": BPE,
    "nanovlm": BPE,
    "paligemma": GEMMA,
    "flamingo": BPE,
}
ONE_TURN = ("blip2",)  # nothing stands between a caption and the next
SYSTEM_TEXT = sorted(name for name, row in templates.TEMPLATES.items() if row.system is not None)


def marks(name: str) -> list[str]:
    """The special tokens of a template's family."""
    ends = ENDS.get(name, ("<s>", "</s>"))
    return list(dict.fromkeys(["<unk>", *ends, "<image>", *templates.TEMPLATES[name].specials]))


@functools.cache
def letters(name: str, folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer of one token per byte and the marks of a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({a: i for i, a in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(marks(name))
    path = folder / f"letters-{name}.json"
    backend.save(str(path))
    return path


@functools.cache
def words(name: str, folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer that puts "▁" before every text, as LLaMA's does, and merges letters."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=marks(name), show_progress=False)
    texts = [golden.replace("«", "").replace("»", "") for golden in GOLDENS[name]]
    backend.train_from_iterator(texts + texts, trainer)
    path = folder / f"words-{name}.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("tokenizers")


def marked(backend: tokenizers.Tokenizer, tokens, weights) -> str:
    """A document as text, what is learned in «»."""
    cuts = np.flatnonzero(np.diff(weights)) + 1
    parts = zip(np.split(tokens, cuts), np.split(weights, cuts), strict=True)
    spell = lambda ids: backend.decode(ids.tolist(), skip_special_tokens=False)  # noqa: E731
    return "".join(f"«{spell(ids)}»" if weight[0] else spell(ids) for ids, weight in parts)


def test_every_template_has_its_goldens():
    assert sorted(GOLDENS) == sorted(templates.TEMPLATES)
    assert [name for name in sorted(GOLDENS) if GOLDENS[name][2]] == SYSTEM_TEXT


@pytest.mark.parametrize("talk", [0, 1, 2], ids=["two", "many", "system"])
@pytest.mark.parametrize("name", GOLDENS)
def test_tokens_and_mask_are_the_golden_ones(name, talk, folder):
    golden = GOLDENS[name][talk]
    if not golden:
        return
    path = letters(name, folder)
    tok = tokenizer.load(str(path))
    rendered = chat.render(templates.template(name), tok, (TWO, MANY, (OWN, *TWO))[talk], 2)
    assert marked(tok.backend, rendered.tokens, rendered.loss_weights) == golden
    # Every mark is one token: the ids are those of a tokenizer that reads marks as such.
    reader = tokenizers.Tokenizer.from_file(str(path))
    text = golden.replace("«", "").replace("»", "")
    assert rendered.tokens.tolist() == reader.encode(text, add_special_tokens=False).ids
    for span, index in rendered.image_spans:
        assert rendered.tokens[span : span + 2].tolist() == [tok.image] * 2 and index < 3


@pytest.mark.parametrize("name", GOLDENS)
def test_what_is_too_long_is_refused_whole(name, folder, small, spoiled):
    path = str(letters(name, folder))
    tok = tokenizer.load(path)
    made = sources.open_source("made:one", "train").example(3, np.random.default_rng(0))
    example = Example("one", "one", made.images, MANY)
    config = small(template=name, tokenizer=path, tokens=4096)
    whole = documents.document(example, config, tok)
    text = marked(tok.backend, whole.tokens, whole.loss_weights)
    assert not whole.rejects and text == GOLDENS[name][1].replace(I, I + I)
    for tokens, rejects in ((len(whole), ()), (len(whole) - 1, ("too_many_tokens",))):
        config = small(template=name, tokenizer=path, tokens=tokens)
        document = documents.document(example, config, tok)
        assert document.rejects == rejects
        assert len(document) == (0 if rejects else len(whole))
        assert document.loss_weights.any() != bool(rejects)


@pytest.mark.parametrize("kind", [letters, words])
@pytest.mark.parametrize("name", GOLDENS)
def test_a_prompt_is_the_start_of_its_training_sequence(name, kind, folder):
    tok, row = tokenizer.load(str(kind(name, folder))), templates.template(name)
    asked = 1 if name in ONE_TURN else 3
    whole = chat.render(row, tok, MANY[: asked + 1], 2)
    prompt = chat.render(row, tok, MANY[:asked], 2, reply=True)
    size = len(prompt.tokens)
    np.testing.assert_array_equal(whole.tokens[:size], prompt.tokens)
    np.testing.assert_array_equal(whole.loss_weights[:size], prompt.loss_weights)
    assert whole.loss_weights[size] and not prompt.loss_weights[-1]


@pytest.mark.parametrize("name", GOLDENS)
def test_the_end_of_an_answer_is_known(name, folder):
    tok, row = tokenizer.load(str(letters(name, folder))), templates.template(name)
    rendered = chat.render(row, tok, MANY[:2], 2)
    *learned, last = rendered.tokens[rendered.loss_weights > 0].tolist()
    assert last == tok.eos or not row.last_eos
    answer = learned if row.last_eos and row.answer[1] else [*learned, last]
    ends = chat.end_tokens(row, tok)
    assert answer[-len(ends) :] == ends and chat.end_token(row, tok) == ends[-1]


def test_a_row_of_the_cauldron_is_what_idefics2_was_taught(folder, tmp_path):
    # The rows are those of the data set; the string is that of the model card's chat template.
    source = formats.CorpusSource("own", corpora.cauldron(tmp_path).corpus, "all")
    tok = tokenizer.load(str(letters("idefics2", folder)))
    golden = (
        f"<s>User:{F}{I}{F}What?<end_of_utterance>\nAssistant:« A fox.<end_of_utterance>»\n"
        "User: Where?<end_of_utterance>\nAssistant:« In snow.<end_of_utterance>»\n",
        f"<s>User:{F}{I}{F}{I}{F}Same?<end_of_utterance>\nAssistant:« No.<end_of_utterance>»\n",
    )
    for index, expected in enumerate(golden):
        turns = source.example(index, np.random.default_rng(0)).turns
        rendered = chat.render(templates.template("idefics2"), tok, turns, 2)
        assert marked(tok.backend, rendered.tokens, rendered.loss_weights) == expected


PAGES = {
    "interleaved": f"<s>«One.\n\nTwo.»{I}{I}«Three.</s>»",
    "flamingo": f"«One.\n\nTwo.<|endofchunk|>»{I}{I}«Three.<|endofchunk|><|endoftext|>»",
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_learned_in_the_order_it_is_read(name, folder):
    tok = tokenizer.load(str(letters(name, folder)))
    rendered = chat.render(templates.template(name), tok, corpora.PAGE, 2)
    assert marked(tok.backend, rendered.tokens, rendered.loss_weights) == PAGES[name]


def test_an_answer_that_is_encoded_apart_starts_with_a_word(folder):
    tok = tokenizer.load(str(words("mistral", folder)))
    rendered = chat.render(templates.template("mistral"), tok, TWO[2:], 1)
    learned = rendered.tokens[rendered.loss_weights > 0]
    spelled = "".join(tok.backend.id_to_token(int(i)) for i in learned)
    assert spelled == "▁In▁snow.</s>"


@pytest.mark.parametrize("name", sorted(set(GOLDENS) - set(SYSTEM_TEXT)))
def test_a_system_text_without_a_place_is_refused(name, folder):
    tok = tokenizer.load(str(letters(name, folder)))
    with pytest.raises(DataError, match="role 'system'"):
        chat.render(templates.template(name), tok, (OWN, *TWO), 2)


@pytest.mark.parametrize("name", SYSTEM_TEXT)
def test_a_system_text_comes_first_and_is_never_learned(name, folder):
    tok = tokenizer.load(str(letters(name, folder)))
    row = templates.template(name)
    with pytest.raises(DataError, match="as the first 'system'"):
        chat.render(row, tok, (*TWO, OWN), 2)
    # An empty one takes the template's own away, and a mark spelled out in one is text.
    none = chat.render(row, tok, (Turn("system", ("",)), *TWO), 2)
    spelled = tok.backend.decode(none.tokens.tolist())
    assert "System" not in spelled and "SYS" not in spelled
    assert not row.system_text or row.system_text not in spelled
    marky = chat.render(row, tok, (Turn("system", ("<image>",)), *TWO), 2)
    assert (marky.tokens == tok.image).sum() == 2


def test_white_space_around_is_dropped_where_the_template_says_so(folder):
    loose = (Turn("user", (" What", ImageRef(0), "? \n")), Turn("assistant", ("\tA fox. ",)))
    for name, expected in (
        ("gemma", f"user\nWhat{I}?<end_of_turn>"),
        ("mistral", f"[INST]  What{I}? \n [/INST]«\tA fox. </s>»"),
    ):
        tok = tokenizer.load(str(letters(name, folder)))
        rendered = chat.render(templates.template(name), tok, loose, 2)
        assert expected in marked(tok.backend, rendered.tokens, rendered.loss_weights)


# Against transformers ---------------------------------------------------------------------------

# The chat_template strings that the models were published with.
FRAMES = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PUBLISHED = {
    "llama_2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n'"
        " + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "llama_3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "idefics2": "{{ bos_token }}" + FRAMES,  # its tokenizer puts the first
    "idefics3": "<|begin_of_text|>" + FRAMES,
}
# What processors make of `<image>`, for 2 visual tokens; two of Idefics2's frames share a token.
SPELLED = {
    "idefics2": lambda text: text.replace("<image>", F + I + F).replace(F + F, F),
    "idefics3": lambda text: text.replace("<image>", G + I + F),
    "smolvlm": lambda text: text.replace("<image>", G + I + F),
}
LOOSE = (
    Turn("user", ("What is it? ",)),
    Turn("assistant", (" A fox.\n",)),
    Turn("user", ("And\n\nwhere?",)),
    Turn("assistant", ("In snow.",)),
)


def backend_of(name: str, folder: pathlib.Path):
    """The tokenizer of one token per byte as transformers' class."""
    import transformers

    bos, eos = ENDS.get(name, ("<s>", "</s>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(letters(name, folder)), bos_token=bos, eos_token=eos
    )


def as_list(turn: Turn) -> list[dict]:
    """A turn as processors want it."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in turn.parts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PUBLISHED, "smolvlm"])
def test_text_is_what_transformers_makes_of_the_published_template(name, folder):
    from transformers.models.smolvlm import processing_smolvlm

    published = PUBLISHED | {"smolvlm": processing_smolvlm.DEFAULT_CHAT_TEMPLATE}
    theirs, row = backend_of(name, folder), templates.template(name)
    ours = tokenizer.load(str(letters(name, folder)))
    content = as_list if name in SPELLED else lambda turn: "".join(turn.parts)
    talks = [LOOSE] + ([(OWN, *LOOSE)] if row.system else [])
    talks += [TWO, MANY, (OWN, *MANY)] if name in SPELLED else []
    for talk in talks:
        for turns, reply in ((talk, False), (talk[:-1], True)):
            text = theirs.apply_chat_template(
                [{"role": turn.role, "content": content(turn)} for turn in turns],
                chat_template=published[name],
                tokenize=False,
                add_generation_prompt=reply,
            )
            text = SPELLED.get(name, str)(text)
            rendered = chat.render(row, ours, turns, 2, reply=reply)
            assert rendered.tokens.tolist() == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.slow
def test_paligemma_is_what_its_processor_makes(folder):
    import transformers

    theirs = backend_of("paligemma", folder)
    images = transformers.SiglipImageProcessor(size={"height": 8, "width": 8})
    images.image_seq_length = 2
    processor = transformers.PaliGemmaProcessor(images, theirs)
    ours = tokenizer.load(str(letters("paligemma", folder)))
    picture = np.zeros((8, 8, 3), np.uint8)
    for count in (1, 3):
        turns = (
            Turn("user", (*map(ImageRef, range(count)), "caption en")),
            Turn("assistant", ("a fox",)),
        )
        made = processor(
            images=[[picture] * count],
            text=["<image>" * count + "caption en"],
            suffix=["a fox"],
            return_tensors="np",
        )
        rendered = chat.render(templates.template("paligemma"), ours, turns, 2)
        np.testing.assert_array_equal(rendered.tokens, made["input_ids"][0])
        np.testing.assert_array_equal(rendered.loss_weights > 0, made["labels"][0] != -100)
