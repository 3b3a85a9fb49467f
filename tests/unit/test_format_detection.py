"""Formats are told from chat templates as models have them: each shape of a template, and shapes of none that
is known. docs/tools-and-thoughts.md has the templates of real models, by their hashes."""

from __future__ import annotations

import re

import pytest

from engine.text.chat_template import ChatTemplate
from engine.text.formats.detect import choose_formats
from engine.text.formats.known import THOUGHT_FORMATS, TOOL_FORMATS
from helpers import real_templates

# What these have around the part in question: who speaks, in which order, and what is not taken.
CHATML = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}"
    "\n</tools><|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- if m.content is string %}{{ m.content }}{% endif %}"
    "{%- for call in m.tool_calls or [] %}{% set call = call.function or call %}CALL{% endfor %}<|im_end|>\n"
    "{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{{ bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "[INST]{{ m.content }}[/INST]"
    "{%- elif m.tool_calls is defined and m.tool_calls %}"
    "{%- if m.tool_calls | length != 1 or m.tool_calls[0].id | length != 9 %}"
    "{{ raise_exception('an id has nine characters') }}{% endif %}CALL{{ eos_token }}"
    "{%- elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{%- else %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{%- for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% endif %}"
    "{%- if m.role == 'assistant' %}<｜Assistant｜>{% if m.tool_calls %}<｜tool▁calls▁begin｜>"
    "{%- for call in m.tool_calls %}CALL{% endfor %}<｜tool▁calls▁end｜>"
    "{%- else %}{{ m.content }}{% endif %}"
    "<｜end▁of▁sentence｜>{% endif %}"
    "{%- if m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% endif %}"
    "{%- endfor %}"
)
NAME, ARGUMENTS = "{{ call.name }}", "{{ call.arguments | tojson }}"
ARGUMENTS_EITHER = (
    "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}"
)
HERMES = f'<tool_call>\n{{"name": "{NAME}", "arguments": {ARGUMENTS}}}\n</tool_call>'
THINKS = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"


def chatml(call: str) -> str:
    return CHATML.replace("CALL", call)


@pytest.mark.parametrize(
    ("template", "tools", "thoughts"),
    [
        (chatml(HERMES), "hermes", None),
        (chatml(THINKS + HERMES), "hermes", "qwen3"),
        (chatml(f'<tool_call>{{"name":"{NAME}","arguments":{ARGUMENTS_EITHER}}}</tool_call>'),
         "hermes", None),
        (chatml("<tool_call>\n{{ {'name': call.name, 'arguments': call.arguments} | tojson }}\n</tool_call>"),
         "hermes", None),
        (chatml(f'{{"name": "{NAME}", "parameters": {ARGUMENTS}}}'), "llama3", None),
        (chatml(f'<|python_tag|>{{"name": "{NAME}", "parameters": {ARGUMENTS}}}'), "llama3", None),
        (STRICT.replace("CALL", '[TOOL_CALLS] [{"name": "{{ m.tool_calls[0].function.name }}", "arguments": '
                        '{{ m.tool_calls[0].function.arguments | tojson }}, '
                        '"id": "{{ m.tool_calls[0].id }}"}]'),
         "mistral", None),
        (STRICT.replace("CALL", "[TOOL_CALLS]{{ m.tool_calls[0].function.name }}"
                        "[CALL_ID]{{ m.tool_calls[0].id }}"
                        "[ARGS]{{ m.tool_calls[0].function.arguments | tojson }}"), "mistral", None),
        (STRICT.replace("CALL", "[THINK]{{ m.reasoning_content }}[/THINK][TOOL_CALLS]"
                        "{{ m.tool_calls[0].function.name }}[ARGS]"
                        "{{ m.tool_calls[0].function.arguments | tojson }}"), "mistral", "mistral"),
        (chatml(f"[{NAME}({{% for k, v in call.arguments.items() %}}{{{{ k }}}}={{{{ v | tojson }}}}"
                "{% endfor %})]"), "pythonic", None),
        (chatml("<|python_start|>{{ call | tojson }}<|python_end|>"), "pythonic", None),
        (DEEPSEEK.replace("CALL", "<｜tool▁call▁begin｜>{{ call.type }}<｜tool▁sep｜>"
                          "{{ call.function.name }}\n"
                          "```json\n{{ call.function.arguments | tojson }}\n```<｜tool▁call▁end｜>"),
         "deepseekv3", None),
        (DEEPSEEK.replace("CALL", "<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>"
                          "{{ call.function.arguments | tojson }}<｜tool▁call▁end｜>") + "{# </think> #}",
         "deepseekv31", "qwen3"),
        (chatml(f" to=functions.{NAME}<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>")
         + "{% if thinks %}<|channel|>analysis<|message|>{% endif %}", "gpt-oss", "gpt-oss"),
        # Calls in ways of their own, which must not be taken for one of these.
        (chatml(f"<tool_call>\n<function={NAME}>\n{{% for k, v in call.arguments.items() %}}"
                "<parameter={{ k }}>\n{{ v }}\n</parameter>{% endfor %}\n</function>\n</tool_call>"),
         None, None),
        (chatml(f"<tool_call>{NAME}\n{{% for k, v in call.arguments.items() %}}<arg_key>{{{{ k }}}}</arg_key>"
                "<arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>"), None, None),
        (chatml(f"<|tool_call_begin|>functions.{NAME}:0<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|>"),
         None, None),
        (chatml("{{ call | tojson }}"), None, None),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None, None),
        ("{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
         "{{ raise_exception('no') }}{% endif %}"
         "{{ m.content }}{% endfor %}", None, None),
    ],
)  # fmt: skip
def test_the_shape_of_a_template_tells_the_formats(template, tools, thoughts):
    found = choose_formats(ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}))
    assert (found.tools and found.tools.name, found.thoughts and found.thoughts.name) == (tools, thoughts)


def test_flags_come_before_what_a_template_shows():
    template = ChatTemplate(chatml(THINKS + HERMES), {})
    for name in TOOL_FORMATS:
        assert choose_formats(template, name).tools == TOOL_FORMATS[name]
    for name in THOUGHT_FORMATS:
        assert choose_formats(template, reasoning_parser=name).thoughts == THOUGHT_FORMATS[name]
    found = choose_formats(template, "none", "none")
    assert found.tools is None and found.thoughts is None


# --- the table of real templates


def test_the_table_names_formats_that_there_are():
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| (\S+) \| `(\w+)` \|$", real_templates.TABLE.read_text(), re.MULTILINE
    )
    assert len(rows) > 60 and len({name for name, *_ in rows}) == len(rows)
    assert {len(digest) for *_, digest in rows} == {64}
    tools, thoughts = ({row[column] for row in rows} for column in (1, 2))
    assert tools <= {*TOOL_FORMATS, "–"} and thoughts <= {*THOUGHT_FORMATS, "–"}
    assert tools >= {"hermes", "llama3", "mistral", "pythonic", "deepseekv3", "deepseekv31", "gpt-oss"}
    by_hash: dict[str, set[tuple[str, str]]] = {}
    for _, tool, thought, digest in rows:
        by_hash.setdefault(digest, set()).add((tool, thought))
    assert all(len(found) == 1 for found in by_hash.values())


def test_the_check_of_a_folder_of_templates_finds_what_is_not_in_the_table(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "one.jinja").write_text(chatml(THINKS + HERMES))
    (folder / "two.jinja").write_text(DEEPSEEK)
    assert real_templates.main(str(folder)) == 1
    assert "not as in the table: one hermes qwen3" in capsys.readouterr().out
    assert real_templates.main(str(folder), "--print") == 0
    table = tmp_path / "table.md"
    table.write_text(capsys.readouterr().out)
    monkeypatch.setattr(real_templates, "TABLE", table)
    assert real_templates.main(str(folder)) == 0
    table.write_text(table.read_text().replace("hermes", "llama3"))
    assert real_templates.main(str(folder)) == 1
