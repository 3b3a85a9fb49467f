"""Outputs of models as their formats write them, and what they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from engine.text.formats.events import (
    CallArguments,
    CallEnd,
    CallRejected,
    CallStart,
    Content,
    Event,
    Reasoning,
)
from engine.text.formats.known import THOUGHT_FORMATS, TOOL_FORMATS
from engine.text.formats.output import OutputFormat, OutputParser

TOOLS = ("get_weather", "add")


@dataclasses.dataclass
class Found:
    """An output, put together from its events. `calls` are (name, arguments)."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def fold(events: Iterable[Event]) -> Found:
    """Put an output together; checks the order of events."""
    found = Found()
    calls: dict[int, list[str]] = {}
    is_open: int | None = None
    for event in events:
        match event:
            case Content(text):
                found.content += text
            case Reasoning(text):
                assert not calls and not found.content, "thoughts come first"
                found.reasoning += text
            case CallStart(index, name):
                assert is_open is None and index not in calls
                calls[index], is_open = [name, ""], index
            case CallArguments(index, text):
                assert index == is_open and text
                calls[index][1] += text
            case CallEnd(index):
                assert index == is_open
                is_open = None
            case CallRejected(index):
                assert index == is_open
                is_open = None
                del calls[index]
    found.calls = [(name, arguments) for name, arguments in calls.values()]
    return found


def read(output_format: OutputFormat, pieces: Iterable[str], *, is_cut: bool = False) -> Found:
    """What a parser finds in a text that arrives in these pieces."""
    parser = OutputParser(output_format)
    events = [event for piece in pieces for event in parser.push(piece)]
    return fold([*events, *parser.finish(is_cut=is_cut)])


def format_named(tools: str | None = None, thoughts: str | None = None, **fields) -> OutputFormat:
    return OutputFormat(
        thoughts=None if thoughts is None else THOUGHT_FORMATS[thoughts],
        tools=None if tools is None else TOOL_FORMATS[tools],
        tool_names=TOOLS,
        **fields,
    )


_CALLS = {
    "hermes": '<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>',
    "llama3": '{"name": "NAME", "parameters": ARGUMENTS}',
    "mistral": "[TOOL_CALLS]NAME[ARGS]ARGUMENTS",
    "pythonic": "[NAME({% for key, value in c.function.arguments.items() %}{{ key }}={{ value | tojson }}"
    "{% endfor %})]",
    "deepseekv3": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```"
    "<｜tool▁call▁end｜>",
    "deepseekv31": "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>",
    "gpt-oss": "<|start|>assistant to=functions.NAME<|channel|>commentary json<|message|>ARGUMENTS<|call|>",
}
_TAGS = {"qwen3": "</think>", "mistral": "[/THINK]", "gpt-oss": "<|channel|>analysis"}


def template_writing(tools: str | None = None, thoughts: str | None = None) -> str:
    """A chat template that shows calls in this format, and thoughts too; `opening` ends the prompt."""
    call = _CALLS.get(tools, "")
    call = call.replace("NAME", "{{ c.function.name }}").replace(
        "ARGUMENTS", "{{ c.function.arguments | tojson }}"
    )
    shown = "{% for t in tools or [] %}{{ t | tojson }};{% endfor %}" if tools else ""
    said = "{{ m.reasoning_content }}" + _TAGS[thoughts] if thoughts else ""
    return (
        f"{shown}{{% for m in messages %}}{{{{ m.role[0] }}}}:"
        f"{{% if m.reasoning_content %}}{said}{{% endif %}}{{{{ m.content or '' }}}}"
        f"{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}};{{% endfor %}}"
        "{% if add_generation_prompt %}a:{{ opening or '' }}{% endif %}"
        "{% if enable_thinking is false %}quick{% endif %}"
    )


_PARIS = '{"city": "Paris"}'
_ADD = '{"a": 1, "b": [2, {"c": "}]"}]}'
_DS = "<｜tool▁calls▁begin｜>"
_DS_CALL = "<｜tool▁call▁begin｜>"
_DS_SEP = "<｜tool▁sep｜>"
_DS_END = "<｜tool▁call▁end｜>"
_DS_ALL_END = "<｜tool▁calls▁end｜>"
BOTH = [("get_weather", _PARIS), ("add", _ADD)]
ONE = BOTH[:1]

RIGHT: list[tuple[str, str, Found]] = [
    (
        "hermes",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {_PARIS}}}\n</tool_call>',
        Found(calls=ONE),
    ),
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {_PARIS}}}\n</tool_call>\n'
        f'<tool_call>{{"name":"add","arguments":{_ADD}}}</tool_call>\n',
        Found("Let me see.", calls=BOTH),
    ),
    # The members of the object in another order, without the end tag, and with text behind.
    ("hermes", f'<tool_call>{{"arguments": {_PARIS}, "name": "get_weather"}}', Found(calls=ONE)),
    (
        "hermes",
        f'a <tool_call>{{"name": "get_weather", "arguments": {_PARIS}}}</tool_call> b',
        Found("a  b", calls=ONE),
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', Found(calls=[("add", "{}")])),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', Found(calls=[("add", "{}")])),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        Found(calls=[("add", '{"a": 1}')]),
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"t": "</tool_call> \\" \\\\"}}</tool_call>',
        Found(calls=[("add", '{"t": "</tool_call> \\" \\\\"}')]),
    ),
    ("llama3", f'{{"name": "get_weather", "parameters": {_PARIS}}}', Found(calls=ONE)),
    (
        "llama3",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {_PARIS}}}; '
        f'{{"name": "add", "parameters": {_ADD}}}',
        Found(calls=BOTH),
    ),
    (
        "llama3",
        f'\n{{"type": "function", "name": "get_weather", "parameters": {_PARIS}}}\n',
        Found(calls=ONE),
    ),
    (
        "llama3",
        f'I look it up: {{"name": "get_weather", "parameters": {_PARIS}}}',
        Found("I look it up:", calls=ONE),
    ),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {_PARIS}}}, '
        f'{{"name": "add", "arguments": {_ADD}, "id": "abcdefghi"}}]',
        Found(calls=BOTH),
    ),
    (
        "mistral",
        f"Well.[TOOL_CALLS]get_weather[ARGS]{_PARIS}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{_ADD}",
        Found("Well.", calls=BOTH),
    ),
    ("pythonic", '[get_weather(city="Paris")]', Found(calls=ONE)),
    (
        "pythonic",
        "<|python_start|>[get_weather(city='Paris'), add(a=1, b=[2, {'c': '}]'},])]<|python_end|>",
        Found(calls=[("get_weather", _PARIS), ("add", '{"a": 1, "b": [2, {"c": "}]"}]}')]),
    ),
    (
        "pythonic",
        r"""[add(a=True, b=None, c=-1.5, d='it\'s \u00e9 \x41\n', e=(1, 2), f={}, g=1_000)]""",
        Found(
            calls=[
                (
                    "add",
                    '{"a": true, "b": null, "c": -1.5, "d": "it\'s é A\\n", "e": [1, 2], "f": {}, "g": 1000}',
                )
            ]
        ),
    ),
    ("pythonic", "[add()]", Found(calls=[("add", "{}")])),
    (
        "deepseekv3",
        f"Sure.{_DS}{_DS_CALL}function{_DS_SEP}get_weather\n```json\n{_PARIS}\n```{_DS_END}\n"
        f"{_DS_CALL}function{_DS_SEP}add\n```json\n{_ADD}\n```{_DS_END}{_DS_ALL_END}",
        Found("Sure.", calls=BOTH),
    ),
    (
        "deepseekv31",
        f"{_DS}{_DS_CALL}get_weather{_DS_SEP}{_PARIS}{_DS_END}{_DS_CALL}add{_DS_SEP}{_ADD}{_DS_END}{_DS_ALL_END}",
        Found(calls=BOTH),
    ),
    (
        "gpt-oss",
        f"<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{_PARIS}<|call|>",
        Found("Wait.", calls=ONE),
    ),
    (
        "gpt-oss",
        f"<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{_ADD}",
        Found(calls=BOTH[1:]),
    ),
]
"""(format, text, meaning) of outputs that are as their format asks."""

WRONG: list[tuple[str, str]] = [
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": }}</tool_call>'),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>nothing</tool_call>"),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": [}}</tool_call> more'),
    ("hermes", "<tool_call>"),
    ("hermes", "a < b <tool"),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": [<tool_call>{"name": "add", "arguments": {}}} more',
    ),
    ("llama3", '{"name": "Bob", "parameters": {}}'),
    ("llama3", '{"answer": [1, 2]}'),
    ("llama3", '<|python_tag|>print("hi")'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS]add[ARGS][1]"),
    ("mistral", "[TOOL_CALLS] [add]"),
    ("pythonic", "[1] and [2]"),
    ("pythonic", "[add(1, 2)]"),
    ("pythonic", "[add(a=__import__('os').system('true'))]"),
    ("pythonic", "[add(a='x"),
    ("pythonic", '[add(a={1: 2}, b="c")]'),
    ("pythonic", "[add([add()}"),
    ("deepseekv3", f"{_DS}{_DS_CALL}function{_DS_SEP}add\n```python\n1\n```{_DS_END}{_DS_ALL_END}"),
    ("deepseekv3", f"{_DS}oh"),
    ("deepseekv31", f"{_DS}{_DS_CALL}add{_DS_SEP}[]{_DS_END}{_DS_ALL_END}"),
]
"""(format, text) of outputs that are no calls, and come back as they are."""
