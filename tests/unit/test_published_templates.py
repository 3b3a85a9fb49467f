"""Chat templates as their publishers write them, from packages that carry them or make them."""

from __future__ import annotations

from typing import Any

import pytest
from mistral_common.integrations.chat_templates.template_generator import TemplateConfig, build_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from transformers.models.llama4 import processing_llama4
from transformers.models.smolvlm import processing_smolvlm

from engine.text.chat_template import ChatTemplate
from engine.text.formats.detect import ModelFormats, choose_formats


def formats_of(source: str) -> ModelFormats:
    return choose_formats(ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.mark.parametrize(
    ("version", "fields", "before", "thoughts"),
    [
        ("v2", {"spm": True}, "[TOOL_CALLS] [", None),
        ("v3", {"spm": True}, "[TOOL_CALLS] [", None),
        ("v3", {}, "[TOOL_CALLS][", None),
        ("v7", {"spm": True}, "[TOOL_CALLS] [", None),
        ("v7", {}, "[TOOL_CALLS][", None),
        ("v11", {}, "", None),
        ("v11", {"plain_thinking_support": True}, "", "qwen3"),
        ("v13", {}, "", None),
        ("v13", {"thinking_support": True}, "", "mistral"),
        (
            "v15",
            {
                "thinking_support": True,
                "reasoning_effort_values": ("none", "high"),
                "reasoning_effort_default": "none",
            },
            "",
            "mistral",
        ),
    ],
)
def test_templates_of_mistral(
    version: str, fields: dict[str, Any], before: str, thoughts: str | None
) -> None:
    """Lists of calls, with a space where their tokenizer puts one, and since v11 a name behind each mark."""
    found = formats_of(build_chat_template(TemplateConfig(version=TokenizerVersion(version), **fields)))
    assert found.tools is not None and (found.tools.name, found.tools.before) == ("mistral", before)
    assert (found.thoughts and found.thoughts.name) == thoughts


def test_a_template_of_mistral_without_tools() -> None:
    source = build_chat_template(TemplateConfig(version=TokenizerVersion("v1"), spm=True))
    assert formats_of(source) == ModelFormats()


def test_templates_that_transformers_carries() -> None:
    found = formats_of(processing_llama4.chat_template)
    assert found.tools is not None and (found.tools.name, found.thoughts) == ("llama3", None)
    assert formats_of(processing_smolvlm.DEFAULT_CHAT_TEMPLATE) == ModelFormats()
