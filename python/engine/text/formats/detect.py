"""Which formats a model writes, told by how its chat template shows a call."""

from __future__ import annotations

import dataclasses
import re

from engine.text.chat_template import ChatTemplate
from engine.text.formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from engine.text.formats.harmony import CHANNELS, HARMONY
from engine.text.formats.hermes import HERMES
from engine.text.formats.known import THOUGHT_FORMATS, TOOL_FORMATS, ThoughtFormat
from engine.text.formats.llama3 import LLAMA3
from engine.text.formats.mistral import MISTRAL, MISTRAL_LIST
from engine.text.formats.pythonic import PYTHONIC
from engine.text.formats.thinking import MAGISTRAL, QWEN3
from engine.text.formats.tool_format import ToolFormat

AUTO, NONE = "auto", "none"

_TOOL = "probe_tool"
_ARGUMENTS = r'\{"probe_key": ?"probe value"\}'
# How a template writes a call of `_TOOL`; the first that is found counts.
_WRITTEN: tuple[tuple[str, ToolFormat], ...] = (
    (rf'<tool_call>\s*\{{"name": ?"{_TOOL}", ?"arguments": ?{_ARGUMENTS}\}}\s*</tool_call>', HERMES),
    (rf"\[TOOL_CALLS\]\s*{_TOOL}(\[CALL_ID\]\w+)?\[ARGS\]{_ARGUMENTS}", MISTRAL),
    (r'\[TOOL_CALLS\] ?\[\{"name"', MISTRAL_LIST),
    (rf"<｜tool▁sep｜>{_TOOL}\n```json\n{_ARGUMENTS}\n```<｜tool▁call▁end｜>", DEEPSEEK_V3),
    (rf"<｜tool▁call▁begin｜>{_TOOL}<｜tool▁sep｜>{_ARGUMENTS}<｜tool▁call▁end｜>", DEEPSEEK_V31),
    (rf"to=functions\.{_TOOL}.*<\|message\|>{_ARGUMENTS}", HARMONY),
    (rf"\[{_TOOL}\(probe_key=['\"]probe value['\"]\)\]", PYTHONIC),
    (rf'\{{"name": ?"{_TOOL}", ?"parameters": ?{_ARGUMENTS}\}}', LLAMA3),
)


@dataclasses.dataclass(frozen=True)
class ModelFormats:
    """What a model writes; None: nothing of the kind, or in no way that is known here."""

    tools: ToolFormat | None = None
    thoughts: ThoughtFormat | None = None


def choose_formats(
    template: ChatTemplate, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO
) -> ModelFormats:
    """Formats by name, or as the template shows them."""
    tools = _tool_format(template) if tool_call_parser != NONE else None
    if tool_call_parser in TOOL_FORMATS and (tools is None or tools.name != tool_call_parser):
        tools = TOOL_FORMATS[tool_call_parser]
    if reasoning_parser == AUTO:
        return ModelFormats(tools, _thought_format(template))
    return ModelFormats(tools, THOUGHT_FORMATS.get(reasoning_parser))


def _tool_format(template: ChatTemplate) -> ToolFormat | None:
    written = template.written_call(_TOOL, {"probe_key": "probe value"})
    if written is not None:
        for pattern, found in _WRITTEN:
            if (match := re.search(pattern, written, re.DOTALL)) is not None:
                return _spaced(match[0]) if found is MISTRAL_LIST else found
    # Llama 4 is shown its own calls in another form than it writes them in.
    return PYTHONIC if "<|python_start|>" in template.sources else None


def _spaced(written: str) -> ToolFormat:
    before = written.partition("{")[0]
    return dataclasses.replace(MISTRAL_LIST, before=before)


def _thought_format(template: ChatTemplate) -> ThoughtFormat | None:
    source = template.sources
    if "<|channel|>analysis" in source:
        return CHANNELS
    return next((tags for tags in (MAGISTRAL, QWEN3) if tags.end in source), None)
