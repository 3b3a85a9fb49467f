"""JSON schemas of what goes in and out, by name, for the description of the API.

A request field that is null counts as unset, so each field that is not required takes null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.sampling.params import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from engine.server.conversation import MAX_CALLS, MAX_MESSAGES, ROLES
from engine.server.embedding import ENCODINGS, MAX_INPUTS
from engine.server.generate_schema import SAMPLING_NAMES
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

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NONEMPTY: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
MAX_INTEGER = 2**63 - 1
NUMBER: Schema = {"type": "number"}
ANY_OBJECT: Schema = {"type": "object", "additionalProperties": True}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Schema, most: int | None = None, least: int | None = None) -> Schema:
    bounds = {"minItems": least, "maxItems": most}
    return {"type": "array", "items": items} | {k: v for k, v in bounds.items() if v is not None}


def optional(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def bounded(schema: Schema, least: float | None = None, most: float | None = None) -> Schema:
    bounds = {"minimum": least, "maximum": most}
    return schema | {name: value for name, value in bounds.items() if value is not None}


def answer(may_have: Mapping[str, Schema] | None = None, /, **properties: Schema) -> Schema:
    """An object that has at least these fields; some have those of `may_have` too."""
    return {"type": "object", "properties": {**properties, **(may_have or {})}, "required": list(properties)}


def request(required: dict[str, Schema], may_have: dict[str, Schema]) -> Schema:
    """Unknown fields are allowed; they are named in the header x-ignored-params."""
    properties = required | {name: optional(schema) for name, schema in may_have.items()}
    return {"type": "object", "properties": properties, "required": list(required)}


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
    "stop": {"anyOf": [NONEMPTY, array(NONEMPTY, MAX_STOP_STRINGS)]},
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
_ANSWER: Schema = {
    "type": "object",
    "properties": {
        "role": TEXT,
        "content": {"type": ["string", "null"]},
        "reasoning_content": TEXT,
        "tool_calls": array(ref("ToolCall")),
    },
    "required": ["role", "content"],
}
_FINISH_REASON: Schema = {"type": ["string", "null"], "enum": ["stop", "length", "tool_calls", "abort", None]}
_CACHED = optional(answer(cached_tokens=INTEGER))
_USAGE = answer(
    {"prompt_tokens_details": _CACHED}, prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER
)
_TIMINGS = answer(queue_ms=NUMBER, prefill_ms=NUMBER, decode_ms=NUMBER, ttft_ms=NUMBER, total_ms=NUMBER)
_IDS = array(INTEGER)
_DETAILS: dict[str, Schema] = {
    "sglext": answer(cached_tokens_details=answer(device=INTEGER, host=INTEGER)),
    "truncated_prompt_tokens": INTEGER,
    "timings": _TIMINGS,
}
"""Beside the choices, when the request asks."""

_MATCHED: Schema = {"anyOf": [TEXT, INTEGER, {"type": "null"}]}
_SCORE: dict[str, Schema] = {"token": TEXT, "logprob": NUMBER, "bytes": array(INTEGER)}
_CHAT_LOGPROBS = answer(content=array(answer(**_SCORE, top_logprobs=array(answer(**_SCORE)))))
_TEXT_LOGPROBS = answer(
    text_offset=array(INTEGER),
    token_logprobs=array(optional(NUMBER)),
    tokens=array(TEXT),
    top_logprobs=array(optional({"type": "object", "additionalProperties": NUMBER})),
)
_ERROR_FIELDS: dict[str, Schema] = {
    "object": {"type": "string", "const": "error"},
    "message": TEXT,
    "type": TEXT,
    "param": {"type": ["string", "null"]},
}
_MODEL = answer(id=TEXT, object=TEXT, created=INTEGER, owned_by=TEXT, root=TEXT, max_model_len=INTEGER)
_LOAD = answer(
    num_running_reqs=INTEGER,
    num_waiting_reqs=INTEGER,
    num_total_reqs=INTEGER,
    num_used_tokens=INTEGER,
    max_total_num_tokens=INTEGER,
    token_usage=NUMBER,
    cache_hit_rate=NUMBER,
    num_preemptions=INTEGER,
    num_free_tokens=INTEGER,
    num_cached_tokens=INTEGER,
    num_evicted_tokens=INTEGER,
    lora_pool_slots_used=INTEGER,
    lora_pool_slots_total=INTEGER,
    lora_num_in_use=INTEGER,
    lora_num_evictions=INTEGER,
    spec_num_draft_tokens=INTEGER,
    spec_num_accepted_tokens=INTEGER,
)


def _completion(beside: dict[str, Schema], in_choice: dict[str, Schema], **choice: Schema) -> Schema:
    """`beside` and `in_choice` are fields that an answer has on request."""
    fields = answer(in_choice, index=INTEGER, **choice, finish_reason=_FINISH_REASON, matched_stop=_MATCHED)
    common = {"id": TEXT, "object": TEXT, "created": INTEGER, "model": TEXT}
    return answer({**_DETAILS, **beside}, **common, choices=array(fields), usage=ref("Usage"))


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
_ENTRIES = array(array({"type": ["number", "string", "null"]}))
_META_INFO = answer(
    {
        "e2e_latency": NUMBER,
        "input_token_logprobs": _ENTRIES,
        "output_token_logprobs": _ENTRIES,
        "input_top_logprobs": array(optional(_ENTRIES)),
        "output_top_logprobs": array(_ENTRIES),
    },
    id=TEXT,
    finish_reason=optional(answer(type=TEXT)),
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    cached_tokens=INTEGER,
    weight_version=TEXT,
    seed=INTEGER,
)
_GENERATED = answer(text=TEXT, output_ids=_IDS, meta_info=_META_INFO)


def _chunk(choice: Schema) -> Schema:
    """An event of a stream. The event that reports usage has no choice; only the last one has details."""
    fields = {"id": TEXT, "object": TEXT, "created": INTEGER, "model": TEXT}
    return answer({**_DETAILS, "usage": optional(ref("Usage"))}, **fields, choices=array(choice))


def event(chunk: str) -> Schema:
    """A server-sent event: a chunk, an error that ends the stream early, or the mark of its end."""
    chunk_or_error = {"anyOf": [ref(chunk), ref("Error")]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk_or_error}
    return answer(data={"anyOf": [{"type": "string", "const": "[DONE]"}, data]})


def _given(name: str, **wanted: Any) -> Schema:
    """A further condition on an object: it has the field, with a value that is not null."""
    return {"required": [name], "properties": {name: wanted or {"not": {"type": "null"}}}}


_NAMES = {name: GENERATION[name] for name in ("rid", "request_id", "user")}

SCHEMAS: dict[str, Schema] = {
    "TokenId": {"type": "integer", "minimum": 0, "description": "Below vocab_size of /get_model_info."},
    "GenerateRequest": request({}, _NATIVE) | {"oneOf": [_given("text"), _given("input_ids")]},
    "Generated": {"anyOf": [_GENERATED, array(_GENERATED)]},
    "GeneratedChunk": answer({"index": INTEGER}, **_GENERATED["properties"]),
    "Message": _MESSAGE,
    "Tool": _TOOL,
    "ToolCall": _TOOL_CALL,
    "ToolCallDelta": answer(
        {"id": TEXT, "type": TEXT, "function": answer({"name": TEXT}, arguments=TEXT)}, index=INTEGER
    ),
    "ChatRequest": request({"model": TEXT, "messages": _MESSAGES}, {**GENERATION, **_CHAT})
    | {"anyOf": [_given("logprobs", const=True), {"properties": {"top_logprobs": {"enum": [0, None]}}}]},
    "CompletionRequest": request(
        {"model": TEXT, "prompt": _prompts(MAX_PROMPTS)},
        {
            **GENERATION,
            "echo": BOOLEAN,
            "logprobs": bounded(INTEGER, 0, MAX_COMPLETION_LOGPROBS),
            "best_of": bounded(INTEGER, 1, MAX_CHOICES),
        },
    )
    | {"anyOf": [_given("echo", const=True), {"properties": {"max_tokens": {"not": {"const": 0}}}}]},
    "ChatCompletion": _completion(
        {"prompt_token_ids": _IDS},
        {"token_ids": _IDS},
        message=_ANSWER,
        logprobs=optional(_CHAT_LOGPROBS),
    ),
    "Completion": _completion(
        {}, {"prompt_token_ids": _IDS, "token_ids": _IDS}, text=TEXT, logprobs=optional(_TEXT_LOGPROBS)
    ),
    "ChatChunk": _chunk(
        answer(
            {"matched_stop": _MATCHED, "token_ids": _IDS},
            index=INTEGER,
            delta=answer({**_ANSWER["properties"], "tool_calls": array(ref("ToolCallDelta"))}),
            logprobs=optional(_CHAT_LOGPROBS),
            finish_reason=_FINISH_REASON,
        )
    ),
    "CompletionChunk": _chunk(
        answer(
            {"matched_stop": _MATCHED, "token_ids": _IDS, "prompt_token_ids": _IDS},
            index=INTEGER,
            text=TEXT,
            logprobs=optional(_TEXT_LOGPROBS),
            finish_reason=_FINISH_REASON,
        )
    ),
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
    "Embeddings": answer(
        object=TEXT,
        data=array(
            answer(object=TEXT, index=INTEGER, embedding={"anyOf": [array(NUMBER), {"type": "string"}]})
        ),
        model=TEXT,
        usage=answer(prompt_tokens=INTEGER, total_tokens=INTEGER),
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
    "Ranking": answer(
        id=TEXT,
        model=TEXT,
        usage=answer(prompt_tokens=INTEGER, total_tokens=INTEGER),
        results=array(answer({"document": answer(text=TEXT)}, index=INTEGER, relevance_score=NUMBER)),
    ),
    "ScoreRequest": request(
        {"model": TEXT, "text_1": _SCORED, "text_2": _SCORED},
        {"lora_path": TEXT, **_NAMES},
    ),
    "Scores": answer(
        id=TEXT,
        object=TEXT,
        created=INTEGER,
        model=TEXT,
        data=array(answer(index=INTEGER, object=TEXT, score=NUMBER)),
        usage=answer(prompt_tokens=INTEGER, total_tokens=INTEGER),
    ),
    "Usage": _USAGE,
    "TokenizeRequest": request(
        {},
        {
            "model": TEXT,
            "prompt": _TEXTS,
            "messages": _MESSAGES,
            "add_special_tokens": BOOLEAN,
        },
    )
    | {"oneOf": [_given("prompt"), _given("messages")]},
    "Tokens": answer(
        tokens={"anyOf": [array(INTEGER), array(array(INTEGER))]},
        count={"anyOf": [INTEGER, array(INTEGER)]},
        max_model_len=INTEGER,
    ),
    "DetokenizeRequest": request(
        {"tokens": {"anyOf": [array(_ID), array(array(_ID))]}},
        {"model": TEXT, "skip_special_tokens": BOOLEAN},
    ),
    "Text": answer(text={"anyOf": [TEXT, array(TEXT)]}),
    "LoadAdapterRequest": request({"lora_name": TEXT, "lora_path": TEXT}, {"pinned": BOOLEAN}),
    "UnloadAdapterRequest": request({"lora_name": TEXT}, {}),
    "AdapterUpdate": answer(
        success=BOOLEAN,
        error_message={"type": ["string", "null"]},
        loaded_adapters={"type": "object", "additionalProperties": TEXT},
    ),
    "AbortRequest": request({}, {"rid": TEXT, "abort_all": BOOLEAN})
    | {"anyOf": [_given("rid", **NONEMPTY), _given("abort_all", const=True)]},
    "Aborted": answer(aborted=INTEGER),
    "Flushed": answer(status=TEXT, message=TEXT),
    "Model": _MODEL,
    "ModelList": answer(object=TEXT, data=array(ref("Model"))),
    "Info": ANY_OBJECT,
    "Load": _LOAD,
    "Loads": answer(timestamp=NUMBER, version=TEXT, loads=array(ref("Load")), aggregate=ref("Load")),
    "Status": answer(status=TEXT),
    "Version": answer(version=TEXT),
    "Root": answer(name=TEXT, version=TEXT, status=TEXT, links=ANY_OBJECT),
    "Error": answer(**_ERROR_FIELDS, code=INTEGER, error=answer(**_ERROR_FIELDS, code=TEXT)),
}
