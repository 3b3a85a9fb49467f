"""The formats that are known, by the names that flags give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.text.formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from engine.text.formats.harmony import CHANNELS, HARMONY, Channels
from engine.text.formats.hermes import HERMES
from engine.text.formats.llama3 import LLAMA3
from engine.text.formats.mistral import MISTRAL
from engine.text.formats.pythonic import PYTHONIC
from engine.text.formats.thinking import DEEPSEEK_R1, MAGISTRAL, QWEN3, ThinkTags

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

ThoughtFormat = ThinkTags | Channels

TOOL_FORMATS = {
    "hermes": HERMES,
    "qwen25": HERMES,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "pythonic": PYTHONIC,
    "deepseekv3": DEEPSEEK_V3,
    "deepseekv31": DEEPSEEK_V31,
    "gpt-oss": HARMONY,
}
THOUGHT_FORMATS: dict[str, ThoughtFormat] = {
    "qwen3": QWEN3,
    "deepseek-r1": DEEPSEEK_R1,
    "mistral": MAGISTRAL,
    "gpt-oss": CHANNELS,
}


def marker_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Special tokens that mark calls. Where an answer is constrained they are text like any other:
    the grammar asks for them, and they are not left out of what the client is given.
    """
    known = [tools for tools in TOOL_FORMATS.values() if tokenizer.token_id(tools.markers[0]) is not None]
    markers = {marker for tools in known for marker in tools.markers}
    return tokenizer.special_ids.intersection(map(tokenizer.token_id, markers)) - tokenizer.eos_token_ids
