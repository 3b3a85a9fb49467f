"""Small tokenizers, trained on a few sentences and saved in Hugging Face format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The capital of France is Paris.",
    "The quick brown fox jumps over the lazy dog, again and again!",
    "def add(a, b):\n    return a + b  # 1 + 2 = 3",
    "Zwölf große Boxkämpfer jagen Viktor quer über den Sylter Deich.",
    "你好，世界。 今天天气很好。",
    "Привет, как дела? 🙂 👍🏽 Ok.",
    "one two three four five six seven eight nine ten",
]


def byte_level_tokenizer(vocab_size: int = 400) -> tokenizers.Tokenizer:
    """Byte-level BPE as in GPT-2, Llama 3 and Qwen: any bytes can be spelled, few tokens are characters.

    <|begin|> is id 0, <|end|> 1, and "<tool> é" (an added token that is not special) the last id.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens(["<tool> é"])
    return tokenizer


def sentencepiece_tokenizer(num_merged: int = 200) -> tokenizers.Tokenizer:
    """BPE in the shape of Llama 2: "▁" for spaces, 256 byte tokens for unknown characters, <s> put first.

    <unk>, <s> and </s> are ids 0 to 2; <0x00> is id 3.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = _spaces_to_marks()
    trainer = trainers.BpeTrainer(vocab_size=num_merged, show_progress=False, limit_alphabet=60)
    trained.train_from_iterator(SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    spellings = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={spelling: i for i, spelling in enumerate(dict.fromkeys(spellings))},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = _spaces_to_marks()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace_tokenizer() -> tokenizers.Tokenizer:
    """Unigram with the Metaspace decoder and no byte tokens, as in older SentencePiece exports."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def save_tokenizer(
    tokenizer: tokenizers.Tokenizer,
    directory: Path,
    *,
    config: Mapping[str, Any] | None = None,
    **files: Any,
) -> Path:
    """Write tokenizer.json, tokenizer_config.json and further JSON files (`generation_config={...}`)."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    files["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def _spaces_to_marks() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
