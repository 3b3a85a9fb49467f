"""JSON schemas of what answers hold, by name, for the description of the API."""

from __future__ import annotations

from engine.server.openapi_words import (
    ANY_OBJECT,
    BOOLEAN,
    INTEGER,
    NUMBER,
    TEXT,
    Schema,
    answer,
    array,
    optional,
    ref,
)

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
    {
        "prompt_tokens_details": _CACHED,
        "completion_tokens_details": answer(reasoning_tokens=INTEGER),
    },
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
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
    num_grammar_queue_reqs=INTEGER,
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


ANSWERS: dict[str, Schema] = {
    "Generated": {"anyOf": [_GENERATED, array(_GENERATED)]},
    "GeneratedChunk": answer({"index": INTEGER}, **_GENERATED["properties"]),
    "ToolCallDelta": answer(
        {"id": TEXT, "type": TEXT, "function": answer({"name": TEXT}, arguments=TEXT)}, index=INTEGER
    ),
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
    "Embeddings": answer(
        object=TEXT,
        data=array(
            answer(object=TEXT, index=INTEGER, embedding={"anyOf": [array(NUMBER), {"type": "string"}]})
        ),
        model=TEXT,
        usage=answer(prompt_tokens=INTEGER, total_tokens=INTEGER),
    ),
    "Ranking": answer(
        id=TEXT,
        model=TEXT,
        usage=answer(prompt_tokens=INTEGER, total_tokens=INTEGER),
        results=array(answer({"document": answer(text=TEXT)}, index=INTEGER, relevance_score=NUMBER)),
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
    "Tokens": answer(
        tokens={"anyOf": [array(INTEGER), array(array(INTEGER))]},
        count={"anyOf": [INTEGER, array(INTEGER)]},
        max_model_len=INTEGER,
    ),
    "Text": answer(text={"anyOf": [TEXT, array(TEXT)]}),
    "AdapterUpdate": answer(
        success=BOOLEAN,
        error_message={"type": ["string", "null"]},
        loaded_adapters={"type": "object", "additionalProperties": TEXT},
    ),
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
