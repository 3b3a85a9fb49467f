"""JSON schemas of what requests hold, by name, for the description of the API.

A field that is null counts as unset, so each field that is not required takes null.
"""

from __future__ import annotations

from engine.sampling.params import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from engine.server.conversation import MAX_CALLS, MAX_MESSAGES, ROLES
from engine.server.embedding import ENCODINGS, MAX_INPUTS
from engine.server.generate_schema import SAMPLING_NAMES
from engine.server.openapi_words import (
    ANY_OBJECT,
    BOOLEAN,
    INTEGER,
    NONEMPTY,
    NUMBER,
    TEXT,
    Schema,
    answer,
    array,
    bounded,
    given,
    optional,
    ref,
    request,
)
from engine.server.schema import (
    MAX_CHOICES,
    MAX_COMPLETION_LOGPROBS,
    MAX_PRIORITY,
    MAX_PROMPTS,
    MAX_RID_CHARS,
    MAX_SALT_CHARS,
    MAX_STOP_TOKENS,
    MAX_STREAM_INTERVAL,
    MAX_TRUNCATION,
    MAX_USER_CHARS,
    RESERVED_VARIABLES,
)
from engine.server.thoughts import EFFORTS
from engine.server.tools import MAX_DESCRIPTION_CHARS, MAX_TOOLS, TOOL_NAME
from engine.text.stop_strings import MAX_STOP_CHARS

MAX_INTEGER = 2**63 - 1

_ID = ref("TokenId")

SAMPLING: dict[str, Schema] = {
    "temperature": bounded(NUMBER, 0, 2),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": bounded(INTEGER, -1, MAX_INTEGER),
    "min_p": bounded(NUMBER, 0, 1),
    "frequency_penalty": bounded(NUMBER, -2, 2),
    "presence_penalty": bounded(NUMBER, -2, 2),
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 2},
    "seed": bounded(INTEGER, -(2**63), 2**63 - 1),
    "min_tokens": bounded(INTEGER, 0, MAX_INTEGER),
    "max_tokens": bounded(INTEGER, 0, MAX_INTEGER),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": bounded(NUMBER, -100, 100),
    },
    "stop": {
        "anyOf": [NONEMPTY, array(NONEMPTY, MAX_STOP_STRINGS)],
        "description": f"All together have at most {MAX_STOP_CHARS} characters.",
    },
    "stop_token_ids": array(_ID, MAX_STOP_TOKENS),
    "ignore_eos": BOOLEAN,
    "include_stop_str_in_output": BOOLEAN,
    "no_stop_trim": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
}

_ANY_SCHEMA: Schema = {"anyOf": [ANY_OBJECT, BOOLEAN, TEXT]}
CONSTRAINTS: dict[str, Schema] = {
    "response_format": {
        "oneOf": [
            answer(type={"type": "string", "enum": ["text", "json_object"]}),
            answer(
                type={"type": "string", "const": "json_schema"},
                json_schema=request(
                    {"schema": _ANY_SCHEMA}, {"name": TEXT, "description": TEXT, "strict": BOOLEAN}
                ),
            ),
            answer(type={"type": "string", "const": "structural_tag"}),
        ]
    },
    "json_schema": TEXT,
    "regex": TEXT,
    "ebnf": TEXT,
    "choice": array(TEXT),
    "structural_tag": {"anyOf": [ANY_OBJECT, TEXT]},
    "structured_outputs": request(
        {},
        {
            "json": _ANY_SCHEMA,
            "json_object": BOOLEAN,
            "regex": TEXT,
            "grammar": TEXT,
            "choice": array(TEXT),
            "structural_tag": {"anyOf": [ANY_OBJECT, TEXT]},
        },
    ),
    "guided_json": _ANY_SCHEMA,
    "guided_regex": TEXT,
    "guided_grammar": TEXT,
    "guided_choice": array(TEXT),
}

_RID: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_RID_CHARS}
GENERATION: dict[str, Schema] = {
    **SAMPLING,
    **CONSTRAINTS,
    "n": bounded(INTEGER, 1, MAX_CHOICES),
    "stream": BOOLEAN,
    "stream_options": {
        "type": "object",
        "properties": dict.fromkeys(
            ("include_usage", "continuous_usage_stats", "await_first_token"), optional(BOOLEAN)
        ),
    },
    "return_cached_tokens_details": BOOLEAN,
    "return_token_ids": BOOLEAN,
    "lora_path": TEXT,
    "cache_salt": {"type": "string", "maxLength": MAX_SALT_CHARS},
    "extra_key": {"type": "string", "maxLength": MAX_SALT_CHARS},
    "priority": bounded(INTEGER, -MAX_PRIORITY, MAX_PRIORITY),
    "user": {"type": "string", "maxLength": MAX_USER_CHARS},
    "return_timings": BOOLEAN,
    "stream_interval": bounded(INTEGER, 1, MAX_STREAM_INTERVAL),
    "truncate_prompt_tokens": {**bounded(INTEGER, -1, MAX_TRUNCATION), "not": {"const": 0}},
    "rid": _RID,
    "request_id": _RID,
}

_MESSAGE: Schema = request(
    {"role": {"type": "string", "enum": list(ROLES)}},
    {
        "content": {"anyOf": [TEXT, array(answer(type={"type": "string", "const": "text"}, text=TEXT))]},
        "name": TEXT,
        "tool_call_id": TEXT,
        "tool_calls": array(ref("ToolCall"), MAX_CALLS),
        "reasoning_content": TEXT,
        "reasoning": TEXT,
    },
)
# Only the assistant may have said nothing.
_MESSAGE["anyOf"] = [{"required": ["content"]}, {"properties": {"role": {"const": "assistant"}}}]
_TOOL_CALL: Schema = request(
    {"function": request({"name": TEXT}, {"arguments": {"anyOf": [TEXT, ANY_OBJECT]}})},
    {"id": TEXT, "type": {"type": "string", "const": "function"}},
)
_FUNCTION: Schema = request(
    {"name": {"type": "string", "pattern": f"^{TOOL_NAME}$"}},
    {
        "description": {"type": "string", "maxLength": MAX_DESCRIPTION_CHARS},
        "parameters": ANY_OBJECT,
        "strict": BOOLEAN,
    },
)
_TOOL: Schema = request({"type": {"type": "string", "const": "function"}, "function": _FUNCTION}, {})
_NAMED_TOOL: Schema = request(
    {"type": {"type": "string", "const": "function"}, "function": request({"name": TEXT}, {})}, {}
)
_ALLOWED_TOOLS: Schema = request(
    {
        "type": {"type": "string", "const": "allowed_tools"},
        "allowed_tools": request(
            {"tools": {**array(_NAMED_TOOL), "minItems": 1}},
            {"mode": {"type": "string", "enum": ["auto", "required"]}},
        ),
    },
    {},
)
_TOOL_CHOICE: Schema = {
    "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, _NAMED_TOOL, _ALLOWED_TOOLS]
}
_TEXTS: Schema = {"anyOf": [TEXT, array(TEXT, MAX_PROMPTS)]}
_IDS_GIVEN = array(_ID, least=1)


_SCORED: Schema = {"anyOf": [NONEMPTY, array(NONEMPTY, MAX_INPUTS, least=1)]}


def _prompts(most: int) -> Schema:
    several = array({"anyOf": [NONEMPTY, _IDS_GIVEN]}, most, least=1)
    return {"anyOf": [NONEMPTY, _IDS_GIVEN, several]}


_CHAT: dict[str, Schema] = {
    "max_completion_tokens": bounded(INTEGER, 0, MAX_INTEGER),
    "logprobs": BOOLEAN,
    "top_logprobs": bounded(INTEGER, 0, MAX_TOP_LOGPROBS),
    "add_generation_prompt": BOOLEAN,
    "continue_final_message": BOOLEAN,
    "chat_template_kwargs": {**ANY_OBJECT, "propertyNames": {"not": {"enum": sorted(RESERVED_VARIABLES)}}},
    "tools": array(ref("Tool"), MAX_TOOLS),
    "tool_choice": _TOOL_CHOICE,
    "parallel_tool_calls": BOOLEAN,
    "reasoning_effort": {"type": "string", "enum": list(EFFORTS)},
    "separate_reasoning": BOOLEAN,
    "stream_reasoning": BOOLEAN,
    "thinking_budget": bounded(INTEGER, 0, MAX_INTEGER),
    "thinking_token_budget": bounded(INTEGER, 0, MAX_INTEGER),
}
_MESSAGES = array(ref("Message"), MAX_MESSAGES, least=1)


def _for_each(one: Schema, item: Schema | None = None) -> Schema:
    """One for all prompts, or a list with an item for each."""
    return {"anyOf": [one, array(item or one, MAX_PROMPTS, least=1)]}


_NATIVE_SAMPLING = request(
    {}, {name: GENERATION[given] for name, given in SAMPLING_NAMES.items() if given in GENERATION}
)
_START, _NUM_TOP = bounded(INTEGER, -1), bounded(INTEGER, 0, MAX_COMPLETION_LOGPROBS)
_NATIVE: dict[str, Schema] = {
    "text": _for_each(NONEMPTY),
    "input_ids": _for_each(_IDS_GIVEN),
    "sampling_params": _for_each(_NATIVE_SAMPLING),
    "stream": BOOLEAN,
    "incremental_streaming_output": BOOLEAN,
    "return_logprob": _for_each(BOOLEAN, optional(BOOLEAN)),
    "logprob_start_len": _for_each(_START, optional(_START)),
    "top_logprobs_num": _for_each(_NUM_TOP, optional(_NUM_TOP)),
    "return_text_in_logprobs": BOOLEAN,
    "rid": _for_each(_RID),
    "priority": GENERATION["priority"],
    "cache_salt": GENERATION["cache_salt"],
    "extra_key": GENERATION["extra_key"],
    "lora_path": TEXT,
    "model": TEXT,
}

_NAMES = {name: GENERATION[name] for name in ("rid", "request_id", "user")}

REQUESTS: dict[str, Schema] = {
    "TokenId": {"type": "integer", "minimum": 0, "description": "Below vocab_size of /get_model_info."},
    "GenerateRequest": request({}, _NATIVE) | {"oneOf": [given("text"), given("input_ids")]},
    "Message": _MESSAGE,
    "Tool": _TOOL,
    "ToolCall": _TOOL_CALL,
    "ChatRequest": request({"model": TEXT, "messages": _MESSAGES}, {**GENERATION, **_CHAT})
    | {"anyOf": [given("logprobs", const=True), {"properties": {"top_logprobs": {"enum": [0, None]}}}]},
    "CompletionRequest": request(
        {"model": TEXT, "prompt": _prompts(MAX_PROMPTS)},
        {
            **GENERATION,
            "echo": BOOLEAN,
            "logprobs": bounded(INTEGER, 0, MAX_COMPLETION_LOGPROBS),
            "best_of": bounded(INTEGER, 1, MAX_CHOICES),
        },
    )
    | {"anyOf": [given("echo", const=True), {"properties": {"max_tokens": {"not": {"const": 0}}}}]},
    "EmbeddingRequest": request(
        {"model": TEXT, "input": _prompts(MAX_INPUTS)},
        {
            "encoding_format": {"type": "string", "enum": list(ENCODINGS)},
            "dimensions": bounded(INTEGER, 1),
            "prompt_name": TEXT,
            "lora_path": TEXT,
            **_NAMES,
        },
    ),
    "RerankRequest": request(
        {
            "model": TEXT,
            "query": NONEMPTY,
            "documents": array({"anyOf": [NONEMPTY, answer(text=NONEMPTY)]}, MAX_INPUTS, least=1),
        },
        {
            "top_n": bounded(INTEGER, 1),
            "return_documents": BOOLEAN,
            "lora_path": TEXT,
            **_NAMES,
        },
    ),
    "ScoreRequest": request(
        {"model": TEXT, "text_1": _SCORED, "text_2": _SCORED},
        {"lora_path": TEXT, **_NAMES},
    ),
    "TokenizeRequest": request(
        {},
        {
            "model": TEXT,
            "prompt": _TEXTS,
            "messages": _MESSAGES,
            "add_special_tokens": BOOLEAN,
        },
    )
    | {"oneOf": [given("prompt"), given("messages")]},
    "DetokenizeRequest": request(
        {"tokens": {"anyOf": [array(_ID), array(array(_ID))]}},
        {"model": TEXT, "skip_special_tokens": BOOLEAN},
    ),
    "LoadAdapterRequest": request({"lora_name": TEXT, "lora_path": TEXT}, {"pinned": BOOLEAN}),
    "UnloadAdapterRequest": request({"lora_name": TEXT}, {}),
    "AbortRequest": request({}, {"rid": TEXT, "abort_all": BOOLEAN})
    | {"anyOf": [given("rid", **NONEMPTY), given("abort_all", const=True)]},
}
