"""Whatever a model writes with tool_choice auto: what is read as a call was held to its tool's schema.

Texts are put together from calls in right and in wrong spellings. The constraint that the server gives to
its engine decides how much of a text a model could have written; that much is played, at many cuts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.grammar.compiler import CompiledGrammar
from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.thinking import ThinkingMatcher
from engine.grammar.vocabulary import VocabularyData, allows
from engine.sampling.params import SamplingParams
from engine.text.formats.harmony import HARMONY, MARKERS
from engine.text.formats.known import TOOL_FORMATS
from engine.text.formats.tool_format import NAME, ToolFormat
from helpers.grammars import Grammars
from helpers.http_server import EOS, Server, events_of, write_model
from helpers.outputs import template_writing

AnyMatcher = ConstraintMatcher | ThinkingMatcher
THINK = ("<think>", "</think>")
SCHEMAS = {
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "t": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
ANSWER = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}

MODELS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "hermes": ("hermes", "qwen3", ("<tool_call>", "</tool_call>")),  # its thoughts are marked in letters
    "llama3": ("llama3", None, TOOL_FORMATS["llama3"].markers),
    "mistral": ("mistral", "mistral", ("[THINK]", "[/THINK]", *TOOL_FORMATS["mistral"].markers)),
    "mistral list": ("mistral", None, TOOL_FORMATS["mistral"].markers),
    "pythonic": ("pythonic", "qwen3", (*THINK, *TOOL_FORMATS["pythonic"].markers)),
    "pythonic in letters": ("pythonic", "qwen3", ()),
    "deepseekv3": ("deepseekv3", "qwen3", (*THINK, *TOOL_FORMATS["deepseekv3"].markers)),
    "deepseekv31": ("deepseekv31", None, TOOL_FORMATS["deepseekv31"].markers),
    "gpt-oss": ("gpt-oss", "gpt-oss", MARKERS),
}
"""Format of calls, format of thoughts, special tokens."""

LIST_TEMPLATE = template_writing("mistral").replace(
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
    '[TOOL_CALLS][{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}]',
)


class Model:
    """A server that plays what it is told, as far as the constraint of its requests allows."""

    def __init__(self, server: Server) -> None:
        self.server = server
        tokenizer = server.model.tokenizer
        data = VocabularyData.from_tokenizer(tokenizer, tokenizer.vocab_size)
        self.grammars = Grammars(data)
        self._num_words = -(-tokenizer.vocab_size // 32)
        self._asked: dict[str, tuple[SamplingParams, CompiledGrammar]] = {}

    def ids(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """Tokens of a text."""
        ids: list[int] = []
        for text, is_spelled in pieces:
            ids += self._spelled(text) if is_spelled else self.server.ids(text)
        return ids

    def _spelled(self, text: str) -> list[int]:
        return [self.grammars.vocabulary.tokens.index(bytes([byte])) for byte in text.encode()]

    def play(self, pieces: list[tuple[str, bool]], **fields: Any) -> tuple[str, bool, dict[str, Any]]:
        """What of the text could be written, whether it ends there, and the message that came of it."""
        played, has_ended = self._allowed(self._matcher(fields), self.ids(pieces))
        most = max(1, len(played) + has_ended)  # where the answer may not end, a limit cuts it
        self.server.set_reply(lambda _request, _choice: [*played, EOS])
        answers = []
        for cut in {0, len(played) // 2}:
            self.server.engine.cuts = frozenset([cut]) if cut else None
            response = self.server.chat(tools=TOOLS, max_tokens=most, **fields)
            assert response.status_code == 200, response.text
            (choice,) = response.json()["choices"]
            answers.append({**choice["message"], "finish_reason": choice["finish_reason"]})
        self.server.engine.cuts = None
        assert all(without_ids(answer) == without_ids(answers[0]) for answer in answers)
        streamed = put_together(self.server.chat(tools=TOOLS, max_tokens=most, stream=True, **fields))
        assert calls_of(streamed) == calls_of(answers[0])
        text = b"".join(self.grammars.vocabulary.tokens[i] for i in played).decode(errors="ignore")
        return text, has_ended, answers[0]

    def _allowed(self, matcher: AnyMatcher, wanted: list[int]) -> tuple[list[int], bool]:
        """As many of these as the matcher allows, and whether the answer may end there."""
        row = np.empty(self._num_words, np.int32)
        played: list[int] = []
        for token_id in [*wanted, EOS]:
            matcher.fill(row)
            if not allows(row, np.array([token_id])):
                return played, False
            if token_id != EOS:
                matcher.take(token_id)
                played.append(token_id)
        return played, True

    def _matcher(self, fields: dict[str, Any]) -> AnyMatcher:
        """Of a request with these fields, as the engine would make it."""
        key = json.dumps(fields)
        if key not in self._asked:
            self.server.chat(tools=TOOLS, max_tokens=1, **fields)
            params = self.server.engine.submitted[-1].params
            assert params.constraint is not None
            self._asked[key] = params, self.grammars.compile(params.constraint.kind, params.constraint.text)
        params, grammar = self._asked[key]
        if params.thinking is None:
            return ConstraintMatcher(grammar, [EOS])
        return ThinkingMatcher(params.thinking, lambda: ConstraintMatcher(grammar, [EOS]))


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "tool_calls": calls_of(message)}


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]


def put_together(response: Any) -> dict[str, Any]:
    calls: list[dict[str, Any]] = []
    for at in events_of(response):
        for part in at["choices"][0]["delta"].get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append({"function": dict(part["function"])})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return {"tool_calls": calls}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    started: dict[str, Model] = {}
    for name, (tools, thoughts, special) in MODELS.items():
        template = LIST_TEMPLATE if name == "mistral list" else template_writing(tools, thoughts)
        path = write_model(tmp_path_factory.mktemp("model"), template=template, special=special)
        started[name] = Model(Server(path, context_length=8192).__enter__())
        assert started[name].server.get("/get_model_info").json()["tool_call_parser"] == tools
    yield started
    for model in started.values():
        model.server.__exit__()


# --- texts

SPACE = st.sampled_from([""] * 17 + [" ", "\n", "  "])
ARGUMENTS = st.sampled_from(
    [
        *[{"a": 1}, {"a": 1, "t": "x"}, {}, {"a": -20}],
        *[{"a": "x"}, {"b": 1}, {"t": "y"}, {"a": 1, "z": 2}, {"a": None}],
        {"a": 1, "t": '</think>[add(a="x")]<tool_call>{"name": "add", "arguments": {}}</tool_call>'},
        {"a": 2, "t": "</think>[add(a='x')] [TOOL_CALLS]add[ARGS]{} <|channel|>"},
    ]
)
NAMES = st.sampled_from(["add", "add", "add", "now", "other"])


@st.composite
def call(draw: st.DrawFn, tools: str) -> str:
    """One call, and what is around it, as the format writes them or a little otherwise."""
    name, arguments = draw(NAMES), draw(ARGUMENTS)
    s = [draw(SPACE) for _ in range(6)]
    compact = draw(st.sampled_from([None] * 7 + [(",", ":")]))
    text = json.dumps(arguments, separators=compact, ensure_ascii=False)
    keys = ["arguments", "parameters"]
    key = draw(st.sampled_from([*keys, keys[tools == "llama3"], keys[tools == "llama3"]]))
    named = json.dumps({"name": name, key: "?"}, separators=compact).replace('"?"', text)
    if draw(st.integers(0, 5)) == 0:
        named = draw(
            st.sampled_from(
                [
                    f'{{"type": "function", "name": "{name}", "{key}": {text}}}',
                    f'{{"{key}": {text}, "name": "{name}"}}',
                    f'{{"id": "x", "name": "{name}", "{key}": {text}}}',
                    f'{{"name": "{name}"}}',
                ]
            )
        )
    match tools:
        case "hermes":
            end = draw(st.sampled_from(["\n</tool_call>", "\n</tool_call>", "</tool_call>", ""]))
            return f"<tool_call>{draw(st.sampled_from(chr(10) * 3 + ' '))}{s[1]}{named}{s[2]}{end}"
        case "llama3":
            return draw(st.sampled_from(["<|python_tag|>", "", ""])) + s[0] + named
        case "mistral":
            if draw(st.booleans()):
                return f"[TOOL_CALLS]{s[0]}{name}{s[1]}[ARGS]{s[2]}{text}"
            more = draw(st.sampled_from(["", ", " + named, "," + named]))
            return f"[TOOL_CALLS]{s[0]}[{s[1]}{named}{more}{s[2]}]"
        case "pythonic":
            pairs = [
                f"{k}{s[1]}={s[2]}{draw(st.sampled_from([json.dumps, repr]))(v)}"
                for k, v in arguments.items()
            ]
            one = f"{name}({', '.join(pairs)})"
            more = draw(st.sampled_from(["", "", f", {one}", f",{one}", ", add(a='x')", ",now()"]))
            before, after = draw(
                st.sampled_from([("", ""), ("<|python_start|>", "<|python_end|>"), ("<|python_start|>", "")])
            )
            brackets = draw(st.sampled_from(["[]", "[]", "[]", ["", ""], ["[", ""]]))
            return f"{before}{s[0]}{brackets[0]}{s[3]}{one}{more}{brackets[1]}{s[4]}{after}"
        case "gpt-oss":
            header = draw(
                st.sampled_from(
                    [
                        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
                        f"<|channel|>commentary to=functions.{name}<|message|>",
                        f" to=functions.{name}<|channel|>commentary json<|message|>",
                        f"<|channel|>final to=functions.{name}<|message|>",
                    ]
                )
            )
            start = draw(st.sampled_from(["", "", "", "<|start|>assistant"]))
            return start + header + s[0] + text + draw(st.sampled_from(["", "", "<|call|>", "<|end|>"]))
    begin, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    one = (
        f"{begin}{s[0]}function{separator}{name}\n{s[1]}```json\n{text}\n```{s[2]}{end}"
        if draw(st.booleans())
        else f"{begin}{name}{separator}{text}{s[1]}{end}"
    )
    more = draw(st.sampled_from(["", "", "\n" + one, one]))
    if draw(st.integers(0, 3)):
        return f"<｜tool▁calls▁begin｜>{s[3]}{one}{more}{s[4]}<｜tool▁calls▁end｜>"
    return one


MARKED = [
    *["<think>", "</think>", "<think>Hm.</think>", "[THINK]", "[/THINK]", "[THINK]Hm.[/THINK]"],
    *["<|python_start|>", "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|end|>", "<|start|>"],
]
SEPARATORS = st.sampled_from([";", "; ", ";\n", ",", ", ", "\n", "", " "])
PROSE = ["Well. ", "\n", " ", ", ", "f(x)", "[1] {", "a, add(a='x')", "]", "}"]
MESSAGES = [
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant",
    "<|channel|>commentary<|message|>So.<|end|><|start|>assistant",
    "<|channel|>final<|message|>",
]


@st.composite
def right_call(draw: st.DrawFn, tools: ToolFormat) -> str:
    calls = []
    for a in draw(st.lists(st.integers(-9, 99), min_size=1, max_size=2)):
        arguments = f"a={a}" if tools.has_python_arguments else f'{{"a": {a}}}'
        calls.append(tools.begin.replace(NAME, "add") + arguments + tools.end)
    return tools.before + tools.between.join(calls) + tools.after


@st.composite
def pieces(draw: st.DrawFn, tools: ToolFormat) -> list[tuple[str, bool]]:
    """A text; those of its parts with a flag have no special tokens."""
    others = MESSAGES if tools is HARMONY else PROSE
    prose = st.sampled_from([""] * (len(others) + 2) + others) | st.sampled_from([*[""] * 9, *MARKED])
    some_call = call(tools.name)
    match draw(st.sampled_from("abbc")):
        case "a":
            texts = [draw(prose), draw(right_call(tools)), draw(SEPARATORS), draw(some_call), draw(prose)]
        case "b":
            texts = [draw(prose), draw(some_call | right_call(tools)), draw(prose), draw(some_call)]
        case _:
            texts = [json.dumps({"s": draw(some_call)}, separators=(",", ":"), ensure_ascii=False)]
    if draw(st.integers(0, 3)) == 0:  # a slip of the pen
        at = draw(st.integers(0, len(texts) - 1))
        place = draw(st.integers(0, len(texts[at])))
        slip = draw(st.sampled_from([" ", "\n", '"', "x", ""]))
        texts[at] = texts[at][:place] + slip + texts[at][place + 1 :]
    return [(text, draw(st.integers(0, 9)) == 0) for text in texts if text] or [("x", False)]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_is_read_as_a_call_was_held(models: dict[str, Model], name: str) -> None:
    model = models[name]
    tools = model.server.model.formats.tools
    assert tools is not None
    num_calls = num_answers = 0

    @settings(max_examples=80, deadline=None)
    @given(
        texts=pieces(tools),
        form=st.sampled_from([None, None, None, ANSWER]),
        is_parallel=st.sampled_from([True, True, False]),
    )
    def holds(texts: list[tuple[str, bool]], form: Any, is_parallel: bool) -> None:
        nonlocal num_calls, num_answers
        fields: dict[str, Any] = {} if is_parallel else {"parallel_tool_calls": False}
        if form is not None:
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}
        text, has_ended, message = model.play(texts, **fields)
        if not text:
            return
        calls = calls_of(message)
        num_calls, num_answers = num_calls + len(calls), num_answers + 1
        for i, (called, arguments) in enumerate(calls):
            try:
                value = json.loads(arguments)
            except ValueError:
                assert not has_ended and i == len(calls) - 1, "only a limit leaves a part of a call"
                continue
            jsonschema.validate(value, SCHEMAS[called])
        assert is_parallel or len(calls) <= 1
        assert (message["finish_reason"] == "tool_calls") == (has_ended and bool(calls))
        if not calls and tools is not HARMONY:
            found = message.get("reasoning_content", "") + message["content"]
            assert squeezed(found) == squeezed(text), (text, message)

    holds()
    assert num_calls >= 3, f"{num_calls} calls in {num_answers} answers"


def squeezed(text: str) -> str:
    """Without white space, and without what marks thoughts."""
    return re.sub(r"\s|</?think>|\[/?THINK\]", "", text)
