"""Messages to prompt text, by the Jinja template of the checkpoint.

The environment offers what `transformers` offers, so that a template renders the same text.
Templates come from the checkpoint and run in Jinja's immutable sandbox: no files, no attributes
of Python's internals, ranges and output of bounded size. What a request brings (messages, tools,
template variables) is data and is never read as a template. As in `transformers`, a special token
spelled out in a message is not escaped: `Tokenizer.encode` makes it that token.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.errors import ConfigError, InvalidRequest
from engine.text.tokenizer import Tokenizer

MAX_PROMPT_CHARS = 16 * 1024 * 1024
_MAX_ERROR_CHARS = 300

# Written behind the final message to find where its text ends. Private-use characters keep it apart
# from real text; the trailing space tells whether the template trims messages.
_END_MARK = "\ue2c5end of final message\ue2c6"
_PROBE = "\ue2c5probe\ue2c6"
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


class ChatTemplate:
    """Renders chat messages to the text that the model was trained on.

    `source` is a template, or templates by name (then "tool_use" serves requests with tools and
    "default" all others), or None for a model without one: every `render` then refuses.
    `special_tokens` are variables for the template, "bos_token" and the like.

    Raises: `ConfigError` if a template is not valid Jinja.
    """

    def __init__(self, source: str | Mapping[str, str] | None, special_tokens: Mapping[str, str]) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        environment = _make_environment()
        self.sources = "\n".join(sources.values())
        """The text of all templates."""

        self._special_tokens = dict(special_tokens)
        self._layouts = {name: _Layout(_compile(environment, name, text)) for name, text in sources.items()}
        self.variables = frozenset[str]().union(
            *(jinja2.meta.find_undeclared_variables(environment.parse(text)) for text in sources.values())
        )
        """Names that the templates read, those of the request among them."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that the checkpoint brings, if any."""
        return cls(tokenizer.chat_templates, tokenizer.special_tokens)

    @property
    def exists(self) -> bool:
        """Whether the model has a chat template at all."""
        return bool(self._layouts)

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Whether the model is told of the tools of a request."""
        return self._shows_tool({"name": "probe_tool", "description": "", "parameters": {"type": "object"}})

    @functools.cached_property
    def needs_descriptions(self) -> bool:
        """Whether tools can be shown with a description only, if an empty one."""
        without = {"name": "probe_tool", "parameters": {"type": "object"}}
        return self.shows_tools and not self._shows_tool(without)

    def _shows_tool(self, function: Mapping[str, Any]) -> bool:
        tool = {"type": "function", "function": function}
        try:
            return function["name"] in self.render([{"role": "user", "content": ""}], tools=[tool])
        except InvalidRequest:
            return False

    def written_call(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        """A conversation with a call of one tool, as the model is shown it; None if that fails."""
        function = {"name": name, "description": name, "parameters": {"type": "object", "properties": {}}}
        try:
            return self.render(
                _call_messages(name, json.dumps(arguments)),
                tools=[{"type": "function", "function": function}],
            )
        except InvalidRequest:
            return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`, to be encoded with `add_special_tokens=False`.

        `continue_final_message` leaves the last message open for the model to go on with it, and
        turns `add_generation_prompt` off. `variables` are further variables for the template; they
        may replace special tokens, but not the messages.

        Raises: `InvalidRequest` with the template's own words if it refuses the messages.
        """
        layout = self._choose(tools)
        if "messages" in variables:
            raise _invalid("chat_template_kwargs may not set 'messages'", "chat_template_kwargs")
        if not messages:
            raise _invalid("messages must not be empty")
        prepared = normalize_messages(
            messages, keep_parts=layout.takes_parts, parse_arguments=not layout.takes_text_arguments
        )
        if any("tool_calls" in message for message in prepared):
            layout.adapt_calls(prepared)
        if continue_final_message:
            _mark_end(prepared[-1])
        text = layout.render(
            {
                **self._special_tokens,
                "documents": None,
                **variables,
                "messages": prepared,
                "tools": list(tools) if tools is not None else None,
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
            }
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> _Layout:
        if tools is not None and "tool_use" in self._layouts:
            return self._layouts["tool_use"]
        if "default" in self._layouts:
            return self._layouts["default"]
        if not self._layouts:
            raise _invalid(
                "no chat template comes with this model; use /v1/completions, or start with --chat-template"
            )
        raise _invalid(f"this model has no default chat template, only {', '.join(sorted(self._layouts))}")


def normalize_messages(
    messages: Sequence[Mapping[str, Any]], *, keep_parts: bool, parse_arguments: bool
) -> list[dict[str, Any]]:
    """Copies of messages in the shape that templates expect.

    Content null becomes "", other null fields are left out. Text parts are kept as a list if the
    template iterates over them, else joined with line ends. The JSON text of tool-call arguments
    becomes an object, unless the template adds it to text; if it is not a JSON object it stays.
    """
    normalized = []
    for message in messages:
        copied = {key: value for key, value in message.items() if value is not None}
        copied["content"] = _content(message.get("content"), keep_parts)
        if parse_arguments and "tool_calls" in copied:
            copied["tool_calls"] = [_with_parsed_arguments(call) for call in copied["tool_calls"]]
        normalized.append(copied)
    return normalized


def _content(content: str | Sequence[Any] | None, keep_parts: bool) -> str | list[Any]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise _invalid("the content of a message is a text or a list of parts")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else dict(part) for part in content]
    if keep_parts:
        return parts
    return "\n".join(part["text"] for part in parts if "text" in part)


def _with_parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class _Layout:
    """One compiled template and what it is known to expect, found out by rendering a short chat."""

    def __init__(self, template: jinja2.Template) -> None:
        self._template = template

    def render(self, variables: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(variables):
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS:
                    raise _invalid(f"the rendered prompt is longer than {MAX_PROMPT_CHARS} characters")
                pieces.append(piece)
        except InvalidRequest:
            raise
        except _Refusal as error:
            raise _invalid(_one_line(error)) from None
        except Exception as error:  # templates fail in any way that Python does
            raise _invalid(f"the chat template failed: {_one_line(error)}") from None
        return "".join(pieces)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template reads content that is a list of parts, rather than printing the list."""
        text = self._try([{"role": "user", "content": [{"type": "text", "text": _PROBE, "extra": "\ue2c7"}]}])
        return text is not None and _PROBE in text and "\ue2c7" not in text

    def adapt_calls(self, messages: list[dict[str, Any]]) -> None:
        """Write calls, and the messages around them, in the way that the template insists on."""
        for message in messages:
            if self.wants_short_ids:
                message |= _with_short_ids(message)
            if self.wants_null_content and message.get("tool_calls") and not message["content"]:
                message["content"] = None

    @functools.cached_property
    def wants_short_ids(self) -> bool:
        """Whether only ids of nine letters and digits will do, as with Mistral."""
        messages = _call_messages("f", {"a": 1}, call_id="call_0123456789")
        return self._try(messages) is None and self._try(_call_messages("f", {"a": 1})) is not None

    @functools.cached_property
    def wants_null_content(self) -> bool:
        """Whether calls are shown only where the message has no content at all."""
        shown = [
            self._try(_call_messages(_PROBE + "f", arguments, content=content))
            for content in ("", None)
            for arguments in ('{"a": 1}' if self.takes_text_arguments else {"a": 1},)
        ]
        return [text is not None and _PROBE + "f" in text for text in shown] == [False, True]

    @functools.cached_property
    def takes_text_arguments(self) -> bool:
        """Whether the template wants tool-call arguments as JSON text: it fails on an object, or prints
        it as Python does."""
        for content in ("", None):
            text = self._try(_call_messages("f", {"a": 1}, content=content))
            as_text = self._try(_call_messages("f", '{"a": 1}', content=content))
            if (text is None or "{'a': 1}" in text) and as_text is not None:
                return True
        return False

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        tokens = {"bos_token": "", "eos_token": "", "documents": None, "tools": None}
        try:
            return self.render({**tokens, "messages": messages, "add_generation_prompt": False})
        except InvalidRequest:
            return None


def _call_messages(
    name: str, arguments: Any, *, content: str | None = "", call_id: str = "call00000"
) -> list[dict[str, Any]]:
    """A short chat with a call and its result. The id is one that every template takes."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": _PROBE},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": _PROBE, "name": name, "tool_call_id": call_id},
    ]


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message that hold ids of calls, each id made short; equal ones stay equal."""
    changed: dict[str, Any] = {}
    if isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = _short_id(message["tool_call_id"])
    if "tool_calls" in message:
        calls = message["tool_calls"]
        changed["tool_calls"] = [{**call, "id": _short_id(str(call.get("id")))} for call in calls]
    return changed


def _short_id(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def _mark_end(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _END_MARK + " "
        return
    for part in reversed(content):
        if "text" in part:
            part["text"] += _END_MARK + " "
            return
    raise _invalid("continue_final_message needs text in the final message")


def _cut_at_mark(text: str) -> str:
    position = text.rfind(_END_MARK)
    if position < 0:
        raise _invalid("continue_final_message: the chat template does not show the final message's text")
    is_untrimmed = text.startswith(" ", position + len(_END_MARK))
    return text[:position] if is_untrimmed else text[:position].rstrip()


class _Refusal(jinja2.TemplateError):
    """A template called raise_exception: the message is written for the user."""


class _GenerationBlock(jinja2.ext.Extension):
    """Tolerates {% generation %} blocks, which mark assistant text for training."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(environment: jinja2.Environment, name: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"chat template {name!r}, line {error.lineno}: {_one_line(error.message)}"
        ) from None
    except Exception as error:  # the compiler evaluates constant expressions
        raise ConfigError(f"chat template {name!r}: {_one_line(error)}") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which models have not seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_ERROR_CHARS else text[:_MAX_ERROR_CHARS] + "…"


def _invalid(what: str, param: str = "messages") -> InvalidRequest:
    return InvalidRequest(f"Invalid request: {what}", param=param)
