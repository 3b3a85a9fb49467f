"""What the HTTP side knows about the served checkpoint, read without any model library."""

from __future__ import annotations

import dataclasses
import json
import logging
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError, InvalidRequest
from engine.models.hf_config import integer, read_config
from engine.sampling.params import SamplingParams
from engine.text.chat_template import ChatTemplate
from engine.text.formats.detect import AUTO, ModelFormats, choose_formats
from engine.text.formats.tag_tokens import TagIds
from engine.text.formats.thinking import ThinkTags
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SAMPLING_FIELDS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A checkpoint's text side. `sampling_defaults` holds fields of `SamplingParams`."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    vocab_size: int
    model_type: str
    architectures: tuple[str, ...]
    sampling_defaults: Mapping[str, Any]
    formats: ModelFormats
    """How it writes tool calls and thoughts."""
    tags: TagIds | None
    """The tokens around its thoughts, if it has such."""

    @classmethod
    def load(
        cls,
        directory: str,
        *,
        sampling_defaults: str,
        preferred_sampling: Mapping[str, Any] = types.MappingProxyType({}),
        chat_template_file: str | None = None,
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
    ) -> ModelFiles:
        """`chat_template_file` takes the place of its templates; `preferred_sampling` comes before
        what it says of sampling, unless `sampling_defaults` is "openai".

        Effects: reads files for some 100 ms. Raises: `ConfigError` naming what is missing.
        """
        config = read_config(directory)
        tokenizer = Tokenizer.from_checkpoint(directory)
        nested, names = config.get("text_config"), config.get("architectures")
        if chat_template_file is None:
            chat_template = ChatTemplate.from_tokenizer(tokenizer)
        else:
            chat_template = _read_template(chat_template_file, tokenizer)
        formats = choose_formats(chat_template, tool_call_parser, reasoning_parser)
        vocab_size = integer(
            nested if isinstance(nested, dict) else config, "vocab_size", tokenizer.vocab_size
        )
        return cls(
            tokenizer=tokenizer,
            chat_template=chat_template,
            formats=formats,
            tags=_tag_ids(formats, tokenizer, vocab_size),
            vocab_size=vocab_size,
            model_type=str(config.get("model_type") or ""),
            architectures=tuple(map(str, names)) if isinstance(names, list) else (),
            sampling_defaults=(
                {}
                if sampling_defaults == "openai"
                else _sampling_defaults(Path(directory)) | _checked(preferred_sampling)
            ),
        )


def _tag_ids(formats: ModelFormats, tokenizer: Tokenizer, vocab_size: int) -> TagIds | None:
    if not isinstance(formats.thoughts, ThinkTags):
        return None
    marks = formats.thoughts.marks(tokenizer)
    return None if marks is None else TagIds(*marks, tokenizer.blank_ids(vocab_size))


def _read_template(path: str, tokenizer: Tokenizer) -> ChatTemplate:
    try:
        source = Path(path).read_text(encoding="utf-8")
        if not source.strip():
            raise ConfigError("the file is empty")
        return ChatTemplate(source, tokenizer.special_tokens)
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text ({error.reason} at byte {error.start})"
    except ConfigError as error:
        reason = error.message
    raise ConfigError(f"--chat-template {path}: {reason}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ConfigError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return content


def _sampling_defaults(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    if not path.exists():
        return {}
    content = read_json(path)
    given = {name: content[name] for name in SAMPLING_FIELDS if content.get(name) is not None}
    try:
        return _typed(given)
    except InvalidRequest as error:
        logger.warning("%s is not used for sampling: %s", path.name, error)
        return {}


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Raises `InvalidRequest` naming the parameter."""
    typed = {}
    for name, value in given.items():
        try:
            typed[name] = msgspec.convert(value, SAMPLING_FIELDS[name])
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{name} has the wrong type: {str(error).lower()}") from None
    SamplingParams(**typed)
    return typed


def _checked(preferred: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody chose for this server has to be right, unlike what a checkpoint brings along."""
    for name in preferred:
        if name not in SAMPLING_FIELDS:
            raise ConfigError(f"--sampling-defaults takes {', '.join(SAMPLING_FIELDS)}, got {name!r:.80}")
    try:
        return _typed(preferred)
    except InvalidRequest as error:
        reason = error.message.removeprefix("Invalid request: ")
        raise ConfigError(f"--sampling-defaults: {reason}") from None
