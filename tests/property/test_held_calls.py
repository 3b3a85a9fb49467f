"""Whatever a model writes with tool_choice auto: what is read as a call was held to its tool's schema.

Texts are put together from calls in right and in wrong spellings. The constraint that the server gives to
its engine decides how much of a text a model could have written; that much is read, cut in any way.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest

from engine.core.messages import TokenChunk
from engine.core.output_processor import OutputProcessor
from engine.grammar.compiler import CompiledGrammar
from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.thinking import ThinkingMatcher
from engine.grammar.vocabulary import VocabularyData, allows
from engine.sampling.params import SamplingParams
from engine.server.choice_reader import ChoiceReader
from engine.text.formats.harmony import HARMONY, MARKERS
from engine.text.formats.known import TOOL_FORMATS
from engine.text.formats.output import OutputFormat
from engine.text.formats.tool_format import NAME, ToolFormat
from helpers.grammars import Grammars
from helpers.http_server import EOS, Server, events_of, write_model
from helpers.outputs import Found, fold, template_writing

NUM_TEXTS = 600
NUM_PLAYED = 20
"""Of them, over HTTP."""

AnyMatcher = ConstraintMatcher | ThinkingMatcher
Pieces = list[tuple[str, bool]]
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
VALIDATORS = {name: jsonschema.Draft202012Validator(schema) for name, schema in SCHEMAS.items()}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
ANSWER = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ANSWER}}}
ASKED: list[dict[str, Any]] = [{}, {}, {"parallel_tool_calls": False}, FORM]

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


class Written(NamedTuple):
    """What a model could write of a text: its tokens and their text, and whether the answer may end there."""

    ids: list[int]
    text: str
    has_ended: bool


class Model:
    """A server, and what the constraint of its requests allows."""

    def __init__(self, server: Server) -> None:
        self.server = server
        tokenizer = server.model.tokenizer
        self.grammars = Grammars(VocabularyData.from_tokenizer(tokenizer, tokenizer.vocab_size))
        self._row = np.empty(-(-tokenizer.vocab_size // 32), np.int32)
        self._asked: dict[str, tuple[SamplingParams, CompiledGrammar]] = {}

    def write(self, pieces: Pieces, fields: dict[str, Any]) -> Written:
        """As much of a text as a request with these fields allows."""
        tokenizer, tokens = self.server.model.tokenizer, self.grammars.vocabulary.tokens
        wanted: list[int] = []
        for text, is_spelled in pieces:
            wanted += (
                [tokens.index(bytes([b])) for b in text.encode()] if is_spelled else tokenizer.encode(text)
            )
        matcher, ids = self._matcher(fields), []
        for token_id in [*wanted, EOS]:
            mask = matcher.mask(self._row)
            if token_id == EOS or not allows(mask, np.array([token_id])):
                break
            matcher.take(token_id)
            ids.append(token_id)
        has_ended = len(ids) == len(wanted) and allows(mask, np.array([EOS]))
        return Written(ids, tokenizer.decode(ids, skip_special_tokens=False), has_ended)

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

    def read(self, written: Written, fields: dict[str, Any], size: int = 10_000) -> Found:
        """What is found in the tokens, that many of them at a time."""
        model, is_held = self.server.model, "response_format" in fields
        output_format = OutputFormat(
            thoughts=model.formats.thoughts,
            tools=model.formats.tools,
            tool_names=list(SCHEMAS),
            is_calls_or_answer=is_held,
            ends_with_answer=True,
            tags=model.tags,
            keeps_space=is_held,
        )
        shown, tags = output_format.special_ids(model.tokenizer), frozenset((model.tags or ())[:2])
        processor = OutputProcessor(model.tokenizer, SamplingParams(), [], 1, None, shown, tags)
        reader, events = ChoiceReader(output_format, model.tokenizer), []
        for at in range(0, len(written.ids) or 1, size):
            is_last = at + size >= len(written.ids)
            reason = ("stop" if written.has_ended else "length") if is_last else None
            delta = processor.process(TokenChunk("x", 0, written.ids[at : at + size], finish_reason=reason))
            assert delta is not None
            reader.read(delta)
            events += delta.events or []
        return fold(events)

    def play(self, written: Written, fields: dict[str, Any], found: Found) -> None:
        """The same is found over HTTP, whole and in a stream."""
        # Where the answer may not end, a limit cuts it.
        most = max(1, len(written.ids) + written.has_ended)
        self.server.set_reply(lambda _request, _choice: [*written.ids, EOS])
        (choice,) = self.server.chat(tools=TOOLS, max_tokens=most, **fields).json()["choices"]
        message = choice["message"]
        reason = ("tool_calls" if found.calls else "stop") if written.has_ended else "length"
        assert choice["finish_reason"] == reason or not written.ids
        assert calls_of(message) == found.calls
        assert (message["content"] or "", message.get("reasoning_content", "")) == (
            found.content,
            found.reasoning,
        )
        self.server.call(lambda: setattr(self.server.engine, "cuts", frozenset([most // 2 or 1])))
        streamed = put_together(self.server.chat(tools=TOOLS, max_tokens=most, stream=True, **fields))
        assert calls_of(streamed) == found.calls
        self.server.reset()


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

RIGHT_ARGUMENTS = [
    *[{"a": 1}, {"a": -20, "t": "x"}],
    {"a": 1, "t": '</think>[add(a="x")]<tool_call>{"name": "add", "arguments": {}}</tool_call>'},
    {"a": 2, "t": "</think>[add(a='x')] [TOOL_CALLS]add[ARGS]{} <|channel|>"},
]
WRONG_ARGUMENTS = [{"a": "x"}, {"b": 1}, {"t": "y"}, {"a": 1, "z": 2}, {"a": None}, {}]
MARKED = [
    *["<think>", "</think>", "<think>Hm.</think>", "[THINK]", "[/THINK]", "[THINK]Hm.[/THINK]"],
    *["<|python_start|>", "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|end|>", "<|start|>"],
]
PROSE = ["Well. ", "\n", " ", ", ", "f(x)", "[1] {", "a, add(a='x')", "]", "}"]
MESSAGES = [
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant",
    "<|channel|>commentary<|message|>So.<|end|><|start|>assistant",
    "<|channel|>final<|message|>",
]
SEPARATORS = [";", "; ", ";\n", ",", ", ", "\n", "", " "]


def right_call(draw: random.Random, tools: ToolFormat) -> str:
    """One or two calls, as the format writes them."""
    values = [draw.randint(-9, 99) for _ in range(draw.randint(1, 2))]
    arguments = [f"a={a}" if tools.has_python_arguments else f'{{"a": {a}}}' for a in values]
    begin = tools.begin.replace(NAME, "add")
    return tools.before + tools.between.join(begin + text + tools.end for text in arguments) + tools.after


def any_call(draw: random.Random, tools: ToolFormat) -> str:
    """A call as some model might write it; most of them are wrong in some way."""
    name = draw.choice(["add", "add", "add", "add", "now", "other"])
    arguments = draw.choice(RIGHT_ARGUMENTS + WRONG_ARGUMENTS)
    text = json.dumps(arguments, separators=draw.choice([None, None, (",", ":")]), ensure_ascii=False)
    space = [draw.choice([""] * 9 + [" ", "\n"]) for _ in range(5)]
    written = {"pythonic": _in_python, "gpt-oss": _in_a_message, "mistral": _marked}.get(tools.name)
    if written is not None:
        return written(draw, name, arguments, text, space)
    if tools.name.startswith("deepseek"):
        return _in_a_group(draw, name, arguments, text, space)
    named = _object(draw, name, text)
    if tools.name == "llama3":
        return draw.choice(["<|python_tag|>", *[""] * 7]) + space[0] + named
    end = draw.choice(["\n</tool_call>", "\n</tool_call>", "</tool_call>", ""])
    return f"<tool_call>{draw.choice([chr(10), chr(10), '', ' '])}{space[1]}{named}{space[2]}{end}"


def _object(draw: random.Random, name: str, text: str) -> str:
    key = draw.choice(["arguments", "parameters"])
    return draw.choice(
        [
            f'{{"name": "{name}", "{key}": {text}}}',
            f'{{"name":"{name}","{key}":{text}}}',
            f'{{ "name": "{name}", "{key}": {text}}}',
            f'{{"type": "function", "name": "{name}", "{key}": {text}}}',
            f'{{"{key}": {text}, "name": "{name}"}}',
            f'{{"id": "x", "name": "{name}", "{key}": {text}}}',
            f'{{"name": "{name}"}}',
        ]
    )


def _marked(draw: random.Random, name: str, arguments: Any, text: str, space: list[str]) -> str:
    if draw.random() < 0.5:
        return f"[TOOL_CALLS]{space[0]}{name}{space[1]}[ARGS]{space[2]}{text}"
    named = _object(draw, name, text)
    more = draw.choice(["", ", " + named, "," + named])
    return f"[TOOL_CALLS]{space[0]}[{space[1]}{named}{more}{space[2]}]"


def _in_python(draw: random.Random, name: str, arguments: Any, text: str, space: list[str]) -> str:
    written = draw.choice([json.dumps, repr])
    pairs = [f"{key}{space[0]}={space[1]}{written(value)}" for key, value in arguments.items()]
    one = f"{name}({', '.join(pairs)})"
    more = draw.choice(["", "", f", {one}", f",{one}", ", add(a='x')", ",now()"])
    before = draw.choice(["", "", "<|python_start|>"])
    brackets = draw.choice(["[]", "[]", "[]", ["", ""], ["[", ""], ["[ ", "]"]])
    end = draw.choice(["<|python_end|>", ""]) if before else ""
    return f"{before}{space[3]}{brackets[0]}{one}{more}{brackets[1]}{space[4]}{end}"


def _in_a_message(draw: random.Random, name: str, arguments: Any, text: str, space: list[str]) -> str:
    header = draw.choice(
        [
            f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
            f"<|channel|>commentary to=functions.{name}<|message|>",
            f" to=functions.{name}<|channel|>commentary json<|message|>",
            f"<|channel|>final to=functions.{name}<|message|>",
        ]
    )
    start = draw.choice(["", "", "", "<|start|>assistant"])
    return start + header + space[0] + text + draw.choice(["", "", "<|call|>", "<|end|>"])


def _in_a_group(draw: random.Random, name: str, arguments: Any, text: str, space: list[str]) -> str:
    begin, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    fenced = f"{begin}{space[0]}function{separator}{name}\n{space[1]}```json\n{text}\n```{space[2]}{end}"
    one = draw.choice([fenced, f"{begin}{name}{separator}{text}{space[1]}{end}"])
    more = draw.choice(["", "", "\n" + one, one])
    grouped = f"<｜tool▁calls▁begin｜>{space[3]}{one}{more}{space[4]}<｜tool▁calls▁end｜>"
    return draw.choice([one, grouped, grouped])


def output(draw: random.Random, tools: ToolFormat) -> Pieces:
    """Calls and what is around them; pieces with a flag have no special tokens."""

    def prose() -> str:
        return draw.choice([""] * 8 + (MESSAGES * 3 if tools is HARMONY else PROSE) + draw.sample(MARKED, 2))

    match draw.randrange(4):
        case 0:
            texts = [
                prose(),
                right_call(draw, tools),
                draw.choice(SEPARATORS),
                any_call(draw, tools),
                prose(),
            ]
        case 1:
            texts = [prose(), any_call(draw, tools), prose(), right_call(draw, tools)]
        case 2:
            texts = [json.dumps({"s": any_call(draw, tools)}, separators=(",", ":"), ensure_ascii=False)]
        case _:
            texts = [prose(), prose(), any_call(draw, tools), prose(), any_call(draw, tools)]
    if draw.random() < 0.25:  # a slip of the pen
        at = draw.randrange(len(texts))
        place = draw.randint(0, len(texts[at]))
        slip = draw.choice([" ", "\n", '"', "x", ""])
        texts[at] = texts[at][:place] + slip + texts[at][place + 1 :]
    return [(text, draw.random() < 0.1) for text in texts if text] or [("x", False)]


# --- what holds


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_is_read_as_a_call_was_held(models: dict[str, Model], name: str) -> None:
    model = models[name]
    tools = model.server.model.formats.tools
    assert tools is not None
    num_calls = num_contents = 0
    for seed in range(NUM_TEXTS):
        draw = random.Random(seed)
        fields = dict(draw.choice(ASKED))
        written = model.write(output(draw, tools), fields)
        found = model.read(written, fields)
        check(written, found, fields, is_whole=tools is not HARMONY)
        assert model.read(written, fields, size=draw.randint(1, 9)) == found, written
        if seed % (NUM_TEXTS // NUM_PLAYED) == 0:
            model.play(written, fields, found)
        num_calls, num_contents = num_calls + len(found.calls), num_contents + (not found.calls)
    assert min(num_calls, num_contents) > NUM_TEXTS // 10, (num_calls, num_contents)


def check(written: Written, found: Found, fields: dict[str, Any], *, is_whole: bool) -> None:
    for i, (called, arguments) in enumerate(found.calls):
        try:
            value = json.loads(arguments)
        except ValueError:
            assert not written.has_ended and i == len(found.calls) - 1, (written, "a part of a call")
        else:
            assert not list(VALIDATORS[called].iter_errors(value)), (written, called, value)
    assert len(found.calls) <= 1 or fields.get("parallel_tool_calls", True), written
    if not found.calls and is_whole:
        assert squeezed(found.reasoning + found.content) == squeezed(written.text), (written, found)


def squeezed(text: str) -> str:
    """Without white space, and without what marks thoughts."""
    return re.sub(r"\s|</?think>|\[/?THINK\]", "", text)
