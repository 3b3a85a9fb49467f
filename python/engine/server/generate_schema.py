"""The native request of SGLang (POST /generate), read as the text completion that it is.

Its fields are translated and read by `parse_completion`, so both mean the same and have the same
bounds; errors name the field as the client wrote it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from engine.server.fields import Fields
from engine.server.schema import (
    MAX_CHOICES_IN_ALL,
    MAX_RID_CHARS,
    CompletionRequest,
    Defaults,
    ignored_names,
    parse_completion,
)

DEFAULT_MAX_NEW_TOKENS = 128

# What a sampling parameter is called in a text completion.
SAMPLING_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
} | {
    name: name
    for name in (
        "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
        "repetition_penalty", "stop", "stop_token_ids", "stop_regex", "n", "ignore_eos", "logit_bias",
        "skip_special_tokens", "no_stop_trim", "json_schema", "regex", "ebnf", "stream_interval",
        "spaces_between_special_tokens", "structural_tag",
    )
}  # fmt: skip
_SHARED = ("stream", "priority", "cache_salt", "extra_key", "lora_path", "model")
"""Fields that have the same name and place in both."""

# Fields that ask for something not served here, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "input_embeds": (),
    "image_data": ([],),
    "video_data": ([],),
    "audio_data": ([],),
    "modalities": ([],),
    "token_ids_logprob": ([],),
    "log_metrics": (True,),
    "no_logs": (False,),
    "background": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_sampling_mask": (False,),
    "require_reasoning": (False,),
    "custom_logit_processor": ("",),
    "session_params": ({},),
    "session_id": ("",),
    "bootstrap_host": (),
    "bootstrap_room": (),
    "data_parallel_rank": (0,),
    "routed_dp_rank": (0,),
    "watermark": (),
}
_NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {"custom_params": ({},), "beam_width": (1,), "watermark": ()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeRequest:
    """Prompts with what each asks. `parts` together hold all prompts, in order, and share `n`."""

    parts: list[CompletionRequest]
    is_single: bool
    """Whether one prompt was given by itself, not a list of them."""

    rids: tuple[str, ...]
    """Names of the prompts; empty if the client gave none."""

    logprob_starts: list[int | None]
    """By prompt: from which position on it is scored; None for not at all."""

    has_text_in_logprobs: bool
    is_incremental: bool
    """Whether events of a stream hold what is new, instead of all so far."""

    ignored: tuple[str, ...]

    @property
    def common(self) -> CompletionRequest:
        """What holds for all prompts; `params` are those of the first one."""
        return dataclasses.replace(self.parts[0], ignored=self.ignored)


def parse_generate(body: dict[str, Any], defaults: Defaults, vocab_size: int) -> NativeRequest:
    """Raises `InvalidRequest` naming the field."""
    fields = Fields(body)
    fields.refuse(_NEUTRAL, _NEUTRAL)
    source, prompts, is_single = _prompts(fields)
    num = len(prompts)
    wants = _for_each(fields, "return_logprob", num, False, bool)
    starts = _for_each(fields, "logprob_start_len", num, -1, int)
    num_top = _for_each(fields, "top_logprobs_num", num, 0, int)
    for i in range(num):
        if not wants[i] and (num_top[i] or starts[i] != -1):
            name = "top_logprobs_num" if num_top[i] else "logprob_start_len"
            raise fields.fail(name, "needs return_logprob to be true")
        if starts[i] < -1:
            raise fields.fail("logprob_start_len", f"must be -1 or more, got {starts[i]}")
    shared = {name: fields.raw(name) for name in _SHARED}
    rids = _rids(fields, num)
    samplings = _samplings(fields)
    asked = [
        {"echo": True, "logprobs": top if want else None} for want, top in zip(wants, num_top, strict=True)
    ]
    if len(samplings) == 1 and all(one == asked[0] for one in asked):
        groups = [(prompts, samplings[0], asked[0])]
    else:
        if len(samplings) not in (1, num):
            raise fields.fail("sampling_params", f"must be one object, or one for each of {num} prompts")
        samplings = samplings if len(samplings) == num else samplings * num
        groups = list(zip(([prompt] for prompt in prompts), samplings, asked, strict=True))
    with native_names(source):
        parts = [
            parse_completion({**shared, **sampling, **extra, "prompt": prompt}, defaults, vocab_size)
            for prompt, sampling, extra in groups
        ]
    if any(part.n != parts[0].n for part in parts):
        raise fields.fail("sampling_params", "must have the same n for all prompts")
    if num * parts[0].n > MAX_CHOICES_IN_ALL:
        raise fields.fail(
            "sampling_params", f"n for each prompt makes more than {MAX_CHOICES_IN_ALL} choices"
        )
    logprob_starts = [
        start if want and start >= 0 else None for want, start in zip(wants, starts, strict=True)
    ]
    return NativeRequest(
        parts=_scored(parts, logprob_starts),
        is_single=is_single,
        rids=rids,
        logprob_starts=logprob_starts,
        has_text_in_logprobs=fields.boolean("return_text_in_logprobs"),
        is_incremental=fields.boolean("incremental_streaming_output"),
        ignored=ignored_names(fields),
    )


def _scored(parts: list[CompletionRequest], starts: list[int | None]) -> list[CompletionRequest]:
    """The same, scoring only the prompts that are to be scored."""
    if len(parts) == 1 and any(start is not None for start in starts):
        return parts
    return [
        part
        if start is not None
        else dataclasses.replace(part, params=msgspec.structs.replace(part.params, prompt_logprobs=None))
        for part, start in zip(parts, starts, strict=False)
    ]


@contextlib.contextmanager
def native_names(source: str) -> Iterator[None]:
    """Errors about a text completion, in the words of the native request; its prompts came from `source`."""
    names = {given: f"sampling_params.{name}" for name, given in SAMPLING_NAMES.items()}
    names |= {"prompt": source, "logprobs": "top_logprobs_num", "top_logprobs": "top_logprobs_num"}
    names |= {"prompt_logprobs": "top_logprobs_num"}
    try:
        yield
    except InvalidRequest as error:
        name = names.get(error.param or "")
        if name is None:
            raise
        message = error.message.replace(error.param or "", name, 1)
        raise InvalidRequest(message, slug=error.slug, param=name) from None


def _prompts(fields: Fields) -> tuple[str, list[Any], bool]:
    """The name of the field, its prompts, and whether it held one prompt and not a list."""
    text, input_ids = fields.raw("text"), fields.raw("input_ids")
    if text is not None and input_ids is not None:
        raise fields.fail("input_ids", "may not be given together with text")
    if text is None and input_ids is None:
        raise fields.fail("text", "or input_ids is required", slug="missing_required_parameter")
    source, value = ("text", text) if text is not None else ("input_ids", input_ids)
    if source == "text":
        fits = isinstance(value, str) or (isinstance(value, list) and all(isinstance(p, str) for p in value))
        if not fits:
            raise fields.fail(source, "must be a string or an array of strings")
        is_single = isinstance(value, str)
    else:
        if not isinstance(value, list):
            raise fields.fail(source, "must be an array of token ids, or of arrays of them")
        is_single = bool(value) and not isinstance(value[0], list)
    if not value:
        raise fields.fail(source, "cannot be empty")
    return source, [value] if is_single else value, is_single


def _samplings(fields: Fields) -> list[dict[str, Any]]:
    """Sampling parameters under their other names, one for all prompts or one for each."""
    given = fields.peek("sampling_params")
    objects = (
        fields.objects("sampling_params") if isinstance(given, list) else [fields.object("sampling_params")]
    )
    if not objects:
        raise fields.fail("sampling_params", "cannot be empty")
    samplings = []
    for one in objects:
        one.refuse(_NEUTRAL_SAMPLING, _NEUTRAL_SAMPLING)
        samplings.append({name: one.raw(native) for native, name in SAMPLING_NAMES.items()})
    return samplings


def _for_each(fields: Fields, name: str, num: int, default: Any, kind: type) -> list[Any]:
    """One value for all prompts, or a list with one for each."""
    value = fields.raw(name)
    values = value if isinstance(value, list) else [value] * num
    if len(values) != num:
        raise fields.fail(name, f"must be one value, or one for each of {num} prompts")
    values = [default if value is None else value for value in values]
    if not all(type(value) is kind for value in values):
        what = "true or false" if kind is bool else "an integer"
        raise fields.fail(name, f"must be {what}, or one for each prompt")
    return values


def _rids(fields: Fields, num: int) -> tuple[str, ...]:
    rids = fields.texts("rid")
    if len(rids) == 1 and num > 1:
        rids = tuple(f"{rids[0]}_{i}" for i in range(num))
    if rids and len(rids) != num:
        raise fields.fail("rid", f"must be one name, or one for each of {num} prompts")
    if len(set(rids)) != len(rids):
        raise fields.fail("rid", "must be different for each prompt")
    if any(not 1 <= len(rid) <= MAX_RID_CHARS for rid in rids):
        raise fields.fail("rid", f"must have 1 to {MAX_RID_CHARS} characters")
    return rids
