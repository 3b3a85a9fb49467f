"""The bundled model's tokenizer: byte-level BPE trained on the corpus, and the chat markup around it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.demo.dialogue import Document, Message

VOCAB_SIZE = 4096
MAX_LEN = 2048
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
TOOL_CALL_TOKENS = ("<tool_call>", "</tool_call>")
IN_CAPITALS = " ?[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]"
TEMPLATE_PATH = Path(__file__).parent / "chat_template.jinja"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from `texts`. Any UTF-8 text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    # A digit is always one token, so that the digits of two numbers line up in a sum; so is every letter
    # of a word in capitals, which is then spelled alike whichever word it is.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(IN_CAPITALS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TOOL_CALL_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TOOL_CALL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json in Hugging Face format. Effects: creates `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    added = {
        str(token_id): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "model_max_length": MAX_LEN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "chat_template": TEMPLATE_PATH.read_text(encoding="utf-8"),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@cache
def _template():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def render_chat(messages: list[Message], tools: list[dict] | None = None, *, prompt: bool = False) -> str:
    """The text of a dialogue, as the server's chat template writes it. `prompt` asks for the next answer."""
    variables: dict[str, Any] = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
    return _template().render(**variables)


def render(document: Document) -> str:
    """The text of a training document, its end marked."""
    if document.text is not None:
        return document.text + END_OF_TEXT
    return render_chat(document.messages, document.tools)
