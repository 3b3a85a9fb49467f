"""From the JSON of a request to what it asks for, checked; nothing is parsed and then ignored.

Every field is read (and honoured), refused because it asks for something this server does not
do, or left over and reported in `ignored`. Values are judged by `SamplingParams`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from engine.sampling.constraint import Constraint
from engine.sampling.params import SamplingParams
from engine.server.constraints import read_constraint
from engine.server.conversation import read_messages
from engine.server.fields import Fields, json_type
from engine.server.ignored import shorten
from engine.server.thoughts import Thoughts, read_thoughts
from engine.server.tools import ToolUse, read_tools

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_CHOICES_IN_ALL = 2048
MAX_STOP_TOKENS = 1024
MAX_COMPLETION_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16
MAX_SALT_CHARS = 256
MAX_RID_CHARS = 256
MAX_PRIORITY = 2**31 - 1
MAX_USER_CHARS = 256
MAX_TRUNCATION = 2**31 - 1
MAX_STREAM_INTERVAL = 1024

_RID_FIELDS = ("rid", "request_id")
RESERVED_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})

# Fields that ask for something not served here, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning": (),
    "spaces_between_special_tokens": (True, False),  # our detokenizer never adds any
    "chat_template": (),
    "input_ids": (),
    "stop_regex": ("", []),
    "suffix": ("",),
    "prompt_logprobs": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "typical_p": (1,),
    "top_n_sigma": (),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "repetition_detection": (),
    "watermark": (),
    "custom_params": ({},),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "return_prompt_token_ids": (False,),
    "return_meta_info": (False,),
    "return_routed_experts": (False,),
    "return_sampling_mask": (False,),
    "return_hidden_states": (False,),
    "custom_logit_processor": (),
    "session_params": (),
}

# The same, for fields that only chat serves.
_CHAT_ONLY: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "reasoning_effort": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds when a request does not say."""

    max_tokens: int | None
    constraint_lifts_limit: bool = False
    """Whether an answer with a constraint may be as long as the context: half a JSON object is of no use."""

    sampling: Mapping[str, Any]
    """Fields of `SamplingParams`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What chat and text completions have in common."""

    model: str
    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    await_first_token: bool
    """Whether a stream says nothing but its headers before there is a token."""

    return_cached_details: bool
    return_token_ids: bool
    cache_salt: str
    lora_path: str | None
    """Name or directory of an adapter, unless `model` names one; None or empty for none."""

    priority: int
    """Higher ones are admitted first."""

    rid: str | None
    """Name under which the client may abort it."""

    user: str | None
    """On whose behalf, for the log."""

    return_timings: bool
    truncate_prompt_tokens: int | None
    """Most tokens of a prompt that are kept, its last ones; -1: as many as leave room for the answer."""

    stream_interval: int | None
    """Tokens in an event of a stream, if not what the server is told."""

    max_tokens_is_default: bool
    ignored: tuple[str, ...]
    """Names of fields that this server does not know."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """A conversation to be continued; each message has `role` and `content`, as the template takes them."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    template_variables: dict[str, Any]
    tools: ToolUse | None
    thoughts: Thoughts


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """Texts, or lists of token ids, to be continued."""

    prompts: list[str | list[int]]
    echo: bool


def model_of(body: dict[str, Any]) -> str:
    """The model that a request names. It is looked at first: the other fields depend on it."""
    fields = Fields({"model": body.get("model")})
    fields.require("model")
    return fields.text("model") or ""


def parse_chat(body: dict[str, Any], defaults: Defaults) -> ChatRequest:
    """Raises `InvalidRequest` naming the field."""
    fields = Fields(body)
    fields.require("messages")
    messages = read_messages(fields)
    tools = read_tools(fields)
    if tools is not None:  # half a call is of no use either
        defaults = dataclasses.replace(defaults, max_tokens=None)
    thoughts = read_thoughts(fields)
    wants_logprobs = fields.boolean("logprobs")
    top_logprobs = fields.integer("top_logprobs") or 0
    if top_logprobs and not wants_logprobs:
        raise fields.fail("top_logprobs", "needs logprobs to be true")
    max_tokens, newer = fields.integer("max_tokens"), fields.integer("max_completion_tokens")
    for name, value in (("max_tokens", max_tokens), ("max_completion_tokens", newer)):
        if value is not None and value < 0:  # also of the one that does not count
            raise fields.fail(name, f"must be non-negative, got {value}")
    add_generation_prompt = fields.boolean("add_generation_prompt", default=True)
    continue_final_message = fields.boolean("continue_final_message")
    template_variables = _template_variables(fields)
    common = _common(
        fields,
        defaults,
        max_tokens=newer if newer is not None else max_tokens,
        logprobs=top_logprobs if wants_logprobs else None,
    )
    return ChatRequest(
        ignored=ignored_names(fields),
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_variables=template_variables,
        tools=tools,
        thoughts=thoughts,
        **common,
    )


def parse_completion(body: dict[str, Any], defaults: Defaults, vocab_size: int) -> CompletionRequest:
    """Raises `InvalidRequest` naming the field."""
    fields = Fields(body)
    fields.require("prompt")
    fields.refuse(_CHAT_ONLY, _CHAT_ONLY)
    prompts = read_prompts(fields, "prompt", vocab_size)
    echo = fields.boolean("echo")
    logprobs = fields.integer("logprobs")
    if logprobs is not None and not 0 <= logprobs <= MAX_COMPLETION_LOGPROBS:
        raise fields.fail("logprobs", f"must be in [0, {MAX_COMPLETION_LOGPROBS}], got {logprobs}")
    max_tokens = fields.integer("max_tokens")
    if max_tokens == 0 and not echo:
        raise fields.fail("max_tokens", "must be at least 1 unless echo is true, got 0")
    best_of = fields.integer("best_of")
    common = _common(fields, defaults, max_tokens=max_tokens, logprobs=logprobs)
    if echo:
        common["params"] = msgspec.structs.replace(common["params"], prompt_logprobs=logprobs)
    if len(prompts) * common["n"] > MAX_CHOICES_IN_ALL:
        raise fields.fail("n", f"times the number of prompts must be at most {MAX_CHOICES_IN_ALL}")
    if best_of is not None and best_of != common["n"]:
        raise fields.fail("best_of", "other than n is not supported", slug="unsupported_parameter")
    return CompletionRequest(prompts=prompts, echo=echo, ignored=ignored_names(fields), **common)


def _common(
    fields: Fields, defaults: Defaults, *, max_tokens: int | None, logprobs: int | None
) -> dict[str, Any]:
    """Fields of `GenerationRequest`, all but `ignored`."""
    fields.refuse(_NEUTRAL, _NEUTRAL)
    n = fields.integer("n")
    if n is not None and not 1 <= n <= MAX_CHOICES:
        raise fields.fail("n", f"must be in [1, {MAX_CHOICES}], got {n}")
    stream_options = fields.object("stream_options")
    common = {
        "model": fields.text("model") or "",
        "n": n or 1,
        "stream": fields.boolean("stream"),
        "include_usage": stream_options.boolean("include_usage"),
        "continuous_usage": stream_options.boolean("continuous_usage_stats"),
        "await_first_token": stream_options.boolean("await_first_token"),
        "return_cached_details": fields.boolean("return_cached_tokens_details"),
        "return_token_ids": fields.boolean("return_token_ids"),
        "cache_salt": _cache_salt(fields),
        "lora_path": fields.text("lora_path"),
        "priority": _priority(fields),
        "user": read_user(fields),
        "return_timings": fields.boolean("return_timings"),
        "truncate_prompt_tokens": _truncation(fields),
        "stream_interval": _stream_interval(fields),
        "rid": read_rid(fields),
        "max_tokens_is_default": max_tokens is None,
    }
    constraint = read_constraint(fields)
    min_tokens, limit = fields.integer("min_tokens"), max_tokens
    if limit is None and (constraint is None or not defaults.constraint_lifts_limit):
        limit = defaults.max_tokens
        if limit is not None and min_tokens is not None:
            limit = max(limit, min_tokens)
    common["params"] = _sampling(fields, defaults, min_tokens, limit, logprobs, constraint)
    return common


def _sampling(
    fields: Fields,
    defaults: Defaults,
    min_tokens: int | None,
    max_tokens: int | None,
    logprobs: int | None,
    constraint: Constraint | None,
) -> SamplingParams:
    chosen = {
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "top_k": fields.integer("top_k"),
        "min_p": fields.number("min_p"),
        "frequency_penalty": fields.number("frequency_penalty"),
        "presence_penalty": fields.number("presence_penalty"),
        "repetition_penalty": fields.number("repetition_penalty"),
        "seed": fields.integer("seed"),
        "min_tokens": min_tokens,
    }
    keeps_stop = fields.boolean("include_stop_str_in_output")
    return SamplingParams(
        **{**defaults.sampling, **{name: value for name, value in chosen.items() if value is not None}},
        max_tokens=max_tokens,
        logprobs=logprobs,
        constraint=constraint,
        logit_bias=fields.biases("logit_bias"),
        stop=fields.texts("stop"),
        stop_token_ids=fields.integers("stop_token_ids", at_most=MAX_STOP_TOKENS),
        ignore_eos=fields.boolean("ignore_eos"),
        include_stop=fields.boolean("no_stop_trim") or keeps_stop,
        skip_special_tokens=fields.boolean("skip_special_tokens", default=True),
    )


def read_rid(fields: Fields) -> str | None:
    """The client's own name of a request; `request_id`, as vLLM calls it, counts where there is no `rid`."""
    if not fields.has_any(_RID_FIELDS):
        return None
    given = Fields({name: fields.peek(name) for name in _RID_FIELDS})
    names = {name: given.text(name) for name in _RID_FIELDS}
    for name, rid in names.items():  # also the one that does not count
        if rid is not None and not 1 <= len(rid) <= MAX_RID_CHARS:
            raise fields.fail(name, f"must have 1 to {MAX_RID_CHARS} characters, got {len(rid)}")
    return fields.raw("request_id" if names["rid"] is None else "rid")


def _priority(fields: Fields) -> int:
    priority = fields.integer("priority") or 0
    if abs(priority) > MAX_PRIORITY:
        raise fields.fail("priority", f"must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}], got {priority}")
    return priority


def read_user(fields: Fields) -> str | None:
    user = fields.text("user")
    if user is not None and len(user) > MAX_USER_CHARS:
        raise fields.fail("user", f"must have at most {MAX_USER_CHARS} characters, got {len(user)}")
    return user


def _stream_interval(fields: Fields) -> int | None:
    interval = fields.integer("stream_interval")
    if interval is not None and not 1 <= interval <= MAX_STREAM_INTERVAL:
        raise fields.fail("stream_interval", f"must be in [1, {MAX_STREAM_INTERVAL}], got {interval}")
    return interval


def _truncation(fields: Fields) -> int | None:
    most = fields.integer("truncate_prompt_tokens")
    if most is not None and (most == 0 or not -1 <= most <= MAX_TRUNCATION):
        raise fields.fail("truncate_prompt_tokens", f"must be -1 or in [1, {MAX_TRUNCATION}], got {most}")
    return most


def _cache_salt(fields: Fields) -> str:
    salt, other = fields.text("cache_salt") or "", fields.text("extra_key") or ""
    for name, value in (("cache_salt", salt), ("extra_key", other)):
        if len(value) > MAX_SALT_CHARS:
            raise fields.fail(name, f"must have at most {MAX_SALT_CHARS} characters, got {len(value)}")
    # Lengths in front keep ("a", "bc") and ("ab", "c") apart.
    return f"{len(salt)}:{salt}:{other}" if salt or other else ""


def read_prompts(
    fields: Fields, name: str, vocab_size: int, most: int = MAX_PROMPTS
) -> list[str | list[int]]:
    """A string, strings, token ids, or lists of those, as a list of prompts; none of them empty."""
    value = fields.raw(name)
    if isinstance(value, str) or (isinstance(value, list) and value and _is_integer(value[0])):
        value = [value]
    if not isinstance(value, list):
        raise fields.fail(name, f"must be a string or an array, got {json_type(value)}")
    if not value or not all(value):
        raise fields.fail(name, "cannot be empty")
    if len(value) > most:
        raise fields.fail(name, f"may hold at most {most} prompts, got {len(value)}")
    return [p if isinstance(p, str) else token_ids(fields, name, p, vocab_size) for p in value]


def token_ids(fields: Fields, name: str, value: Any, vocab_size: int) -> list[int]:
    """`value`, which the field `name` holds, as token ids. Raises `InvalidRequest`."""
    if not isinstance(value, list):
        raise fields.fail(name, f"must hold texts or token ids, got {json_type(value)}")
    ids = value
    if set(map(type, value)) != {int}:  # the common case is checked without a loop in Python
        if odd := [item for item in value if not _is_integer(item)]:
            raise fields.fail(name, f"must hold texts or token ids, got {json_type(odd[0])}")
        ids = [int(item) for item in value]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise fields.fail(name, f"holds a token id outside of [0, {vocab_size})")
    return ids


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    )


def ignored_names(fields: Fields) -> tuple[str, ...]:
    """Unknown names, once each however many messages have them; the first ones, shortened."""
    unread = fields.unread()
    return tuple(shorten(dict.fromkeys(re.sub(r"\[\d+\]", "", name) for name in unread))) if unread else ()


def _template_variables(fields: Fields) -> dict[str, Any]:
    value = fields.raw("chat_template_kwargs")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise fields.fail("chat_template_kwargs", f"must be an object, got {json_type(value)}")
    for name in RESERVED_VARIABLES.intersection(value):
        raise fields.fail("chat_template_kwargs", f"may not set {name!r}")
    return value


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raises `InvalidRequest` if a parameter names a token that the model does not have."""
    for name, token_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"{name} names token {token_id}, outside of [0, {vocab_size})", param=name
                )
