"""Chat templates: what stands around what the roles say, a row of strings each."""

import dataclasses

from vlm_jax.errors import ConfigError
from vlm_jax.schema import unknown_key


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around what the roles say.

    Attributes:
      bos: whether a document starts with the beginning-of-sequence token.
      bos_again: whether it stands before every later user turn too.
      start: text before everything but that token, whether there is a system text or not.
      system: text before and after the system text; None = there is no place for one.
      system_text: the system text of a sample that brings none; "" = none, and nothing around it.
      system_in_user: whether it stands in the first user turn, before what the user says.
      user: text before and after what the user says.
      user_lead: text between the first of these and what the user says, unless that starts with an
        image.
      assistant: text before the answer, given and not learned; generation starts after it.
      answer: text before and after the answer, learned with it.
      apart: whether an answer is encoded on its own, not as one text with what stands before it.
      eos: whether the end-of-sequence token, learned, follows every answer.
      after: text behind the end of every answer, given and not learned.
      last_eos: whether the end-of-sequence token, learned, ends the document.
      image: text before and after every image.
      image_shared: whether of two neighbouring images only the first has text before it.
      image_number: text before every picture where there are several, "{}" being its number from 0.
      tile: text before every tile of a picture, with "{row}" and "{column}" from 1; "" = tiles are
        images like all others.
      tile_row: text behind the last tile of each row.
      after_tiles: text before the whole picture where its tiles come first.
      images: where the images of a turn stand: "inline" = where it says, "turn" = at its start, its
        text stripped then, "document" = at the start of the document, "front" = even before the
        beginning-of-sequence token.
      strip: whether white space around what a role says is dropped.
      user_text: whether what the user writes is kept; if not, only its images are.
      specials: strings of this template that are single tokens of the tokenizer.
    """

    bos: bool = True
    bos_again: bool = False
    start: str = ""
    system: tuple[str, str] | None = None
    system_text: str = ""
    system_in_user: bool = False
    user: tuple[str, str] = ("", "")
    user_lead: str = ""
    assistant: str = ""
    answer: tuple[str, str] = ("", "")
    apart: bool = False
    eos: bool = True
    after: str = ""
    last_eos: bool = False
    image: tuple[str, str] = ("", "")
    image_shared: bool = False
    image_number: str = ""
    tile: str = ""
    tile_row: str = ""
    after_tiles: str = ""
    images: str = "inline"
    strip: bool = False
    user_text: bool = True
    specials: tuple[str, ...] = ()


VICUNA_V0 = Template(
    system=("", "###"),
    system_text=(
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions."
    ),
    user=("Human: ", "###"),
    assistant="Assistant:",
    answer=(" ", "###"),
    eos=False,
    image=("", "\n"),
    images="turn",
)

INTERLEAVED = Template(apart=True, eos=False, last_eos=True)

LLAMA_2 = Template(
    bos_again=True,
    system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    system_in_user=True,
    user=("[INST] ", " [/INST]"),
    answer=(" ", " "),
    strip=True,
)

LLAMA_3 = Template(
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer=("", "<|eot_id|>"),
    eos=False,
    strip=True,
    specials=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

CHATML = Template(
    bos=False,
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant="<|im_start|>assistant\n",
    after="\n",
    specials=("<|im_start|>", "<|im_end|>"),
)

MINIGPT_4 = Template(
    bos_again=True,
    user=("###Human: ", " ###Assistant: "),
    answer=("", "###"),
    apart=True,
    eos=False,
    image=("<Img>", "</Img> "),
    images="turn",
)

IDEFICS_2 = Template(
    system=("System: ", "<end_of_utterance>\n"),
    user=("User:", "<end_of_utterance>\n"),
    user_lead=" ",
    assistant="Assistant:",
    answer=(" ", "<end_of_utterance>"),
    eos=False,
    after="\n",
    image=("<fake_token_around_image>", "<fake_token_around_image>"),
    image_shared=True,
    specials=("<end_of_utterance>", "<fake_token_around_image>"),
)

# More rows and columns than any recipe cuts; a tokenizer needs those that its pictures have.
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 10) for column in range(1, 10))

IDEFICS_3 = dataclasses.replace(
    IDEFICS_2,
    image=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    image_shared=False,
    tile="<fake_token_around_image><row_{row}_col_{column}>",
    tile_row="\n",
    after_tiles="\n",
    specials=(*IDEFICS_2.specials, "<global-img>", *TILES),
)

TEMPLATES = {
    # Ours, for the embedded tokenizer: <bos><user>{images and text}<assistant>{answer}<eos>
    "tiny": Template(
        user=("<user>", ""), assistant="<assistant>", specials=("<user>", "<assistant>")
    ),
    # LLaVA's first stage (train.py, preprocess_plain): image, caption, end of line; no prompt.
    "plain": Template(answer=("", "\n"), eos=False, user_text=False),
    # BLIP-2's second stage (blip2_opt.py of LAVIS): queries, the beginning of sequence, which is
    # learned there too, caption, end of line.
    "blip2": Template(answer=("", "\n"), eos=False, user_text=False, images="front"),
    # InstructBLIP (blip2_vicuna_instruct.py of LAVIS): queries, what is asked, the answer apart.
    "instructblip": Template(apart=True, images="front"),
    # What text towers read beside an image: the caption and its end (open_clip/tokenizer.py;
    # big_vision's siglip configs, `tokenize(..., eos="sticky")`).
    "clip": Template(user_text=False),
    "siglip": Template(bos=False, user_text=False),
    # Web pages as base models read them (`interleaved.py`): texts and images, nothing between them,
    # and the end of a page is learned.
    "interleaved": INTERLEAVED,
    # The same with Idefics's frames (processing_idefics.py; Idefics2's pre-training has them too).
    "idefics": dataclasses.replace(
        INTERLEAVED,
        image=IDEFICS_2.image,
        image_shared=True,
        specials=("<fake_token_around_image>",),
    ),
    # Vicuna v0 as it is prompted (LLaVA's conversation.py, conv_vicuna_v0, SeparatorStyle.SINGLE).
    "vicuna_v0": VICUNA_V0,
    # LLaVA-1.0 as it was trained (train.py, _add_speaker_and_signal, _mask_targets), which is not
    # how it is prompted. The "###" after an answer is learned there too, as it must be for the end
    # to be known; so is "### Assistant: ", whose mask drifts by a token a turn: that is left out.
    "llava_v0": dataclasses.replace(
        VICUNA_V0,
        system=("", "\n\n### "),
        user=("Human: ", "\n### "),
        answer=(" ", "\n###"),
        after=" ",
    ),
    # LLaVA-1.5 (conversation.py, conv_vicuna_v1; train.py, preprocess_multimodal, preprocess_v1).
    "vicuna_v1": Template(
        system=("", " "),
        system_text=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions."
        ),
        user=("USER: ", " "),
        assistant="ASSISTANT:",
        answer=(" ", ""),
        image=("", "\n"),
        images="turn",
    ),
    # The chat_template of Llama-2-chat; the mask of LLaVA's preprocess_llama_2 (train.py).
    "llama_2": LLAMA_2,
    # LLaVA over Llama-2-chat (conversation.py, conv_llava_llama_2).
    "llava_llama_2": dataclasses.replace(
        LLAMA_2,
        system_text=(
            "You are a helpful language and vision assistant. You are able to understand the "
            "visual content that the user provides, and assist the user with a variety of tasks "
            "using natural language."
        ),
        image=("", "\n"),
        images="turn",
        strip=False,
    ),
    # LLaVA-NeXT over Mistral-7B-Instruct (conversation.py, conv_mistral_instruct): one beginning of
    # sequence, no system text.
    "llava_mistral": dataclasses.replace(
        LLAMA_2,
        bos_again=False,
        system=None,
        image=("", "\n"),
        images="turn",
        strip=False,
    ),
    # The chat_template of Meta-Llama-3-Instruct.
    "llama_3": LLAMA_3,
    # Cambrian-1 over it (conversation.py, conv_llama_3): no lines behind the roles.
    "cambrian": dataclasses.replace(
        LLAMA_3,
        system=("<|start_header_id|>system<|end_header_id|>", "<|eot_id|>"),
        system_text=(
            "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. \n"
            "    As a multimodal AI, you have the ability to process and analyze images. Whenever "
            "an image is present in the conversation, very carefully examine it and consider its "
            "content when formulating your response.\n"
            "    You should give concise responses to very simple questions, but provide thorough "
            "responses to more complex and open-ended questions. "
        ),
        user=("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),
        assistant="<|start_header_id|>assistant<|end_header_id|>",
        image=("", "\n"),
        images="turn",
        strip=False,
    ),
    # The chat_template of Mistral-7B-Instruct-v0.2 and Mixtral as they came out; it knows no system
    # text. Apart, the answer starts with a word, as mistral-common encodes it.
    "mistral": Template(user=("[INST] ", " [/INST]"), apart=True),
    # ChatML, for tokenizers whose end of sequence is <|im_end|>; Qwen2.5's without its system text.
    "chatml": CHATML,
    # The chat_template of SmolLM2-Instruct's tokenizer_config.json, and its system text.
    "smollm2": dataclasses.replace(
        CHATML,
        system_text="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    # The chat_template of gemma-it and gemma-2-it, which know no system text.
    "gemma": Template(
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant="<start_of_turn>model\n",
        answer=("", "<end_of_turn>"),
        eos=False,
        after="\n",
        strip=True,
        specials=("<start_of_turn>", "<end_of_turn>"),
    ),
    # MiniGPT-4's second stage (train_configs/minigpt4_stage2_finetune.yaml; minigpt_base.py,
    # preparing_embedding, tokenize_conversation; prompts/alignment.txt).
    "minigpt4": MINIGPT_4,
    # MiniGPT-v2 (minigpt_v2.py; minigpt_base.py). Its data sets end every question with a space of
    # their own (datasets/llava_dataset.py), its evaluation does not.
    "minigpt_v2": dataclasses.replace(
        MINIGPT_4, user=("[INST] ", "  [/INST]"), answer=("", ""), eos=True
    ),
    # mPLUG-Owl (README.md, instruction tuning; data_utils/xgpt3_dataset.py, which encodes the text
    # in smaller pieces: "AI: " and the question before it apart).
    "mplug_owl": Template(
        system=("", ""),
        system_text=(
            "The following is a conversation between a curious human and AI assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        user=("\nHuman: ", "\n"),
        assistant="AI: ",
        apart=True,
        image=("", "\nHuman: "),
        images="turn",
    ),
    # The chat_template of idefics2-8b, its images, of which four may be quarters of the fifth, as
    # processing_idefics2.py of transformers spells them; that only answers are learned is the
    # paper's word (section 4.2).
    "idefics2": IDEFICS_2,
    # Idefics3-8B-Llama3's, likewise.
    "idefics3": IDEFICS_3,
    # SmolVLM-Instruct's: Idefics3's, started by a token of ChatML (processing_smolvlm.py).
    "smolvlm": dataclasses.replace(
        IDEFICS_3,
        bos=False,
        start="<|im_start|>",
        specials=(*IDEFICS_3.specials, "<|im_start|>"),
    ),
    # nanoVLM v0.1 (data/datasets.py, data/collators.py), which reads only a sample's first turn.
    "nanovlm_v0": Template(
        bos=False,
        user=("Question: ", " "),
        assistant="Answer:",
        apart=True,
        images="front",
    ),
    # nanoVLM since its pictures are cut into tiles (models/config.py, data/processors.py). The line
    # behind an answer's end is learned there too.
    "nanovlm": dataclasses.replace(
        CHATML,
        image=("<|global_image|>", ""),
        image_number="<image: {}>",
        tile="<row_{row}_col_{column}>",
        specials=(*CHATML.specials, "<|global_image|>", *TILES),
    ),
    # PaliGemma: images, <bos>, prefix, end of line, suffix (processing_paligemma.py); that images
    # and prefix see each other is `data.attention`.
    "paligemma": Template(user=("", "\n"), apart=True, images="front"),
    # Prismatic over base models (base_prompter.py, PurePromptBuilder; datasets.py): images behind
    # the beginning of sequence. The space is the answer's, as the prompt is stripped of it there.
    "in_out": Template(
        user=("In: ", "\n"),
        assistant="Out:",
        answer=(" ", ""),
        images="document",
        strip=True,
    ),
    # OpenFlamingo (train/data.py; train_utils.py): the end of a chunk is learned, as is that of the
    # sequence behind a caption. Its tokenizers put no beginning of sequence.
    "flamingo": Template(
        bos=False,
        answer=("", "<|endofchunk|>"),
        apart=True,
        eos=False,
        last_eos=True,
        strip=True,
        specials=("<|endofchunk|>",),
    ),
}


def template(name: str) -> Template:
    """A template by name.

    Raises:
      ConfigError: the name is not in the table.
    """
    if name not in TEMPLATES:
        raise ConfigError(unknown_key(name, TEMPLATES).replace("config key", "data.template"))
    return TEMPLATES[name]
