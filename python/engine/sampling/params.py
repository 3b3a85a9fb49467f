"""What a request may ask of sampling and of the end of generation."""

from __future__ import annotations

import functools
import math

import msgspec

from engine.errors import InvalidRequest
from engine.sampling.constraint import Constraint, Thinking, ThoughtMessages

MAX_STOP_STRINGS = 32
MAX_TOP_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request. Defaults are those of the OpenAI API.

    `max_tokens` None means as many as fit the context. `logprobs` is None for none, else the
    number of alternatives to report beside the sampled token (0: the sampled one only);
    `prompt_logprobs` is the same for the tokens of the prompt, all but the first, from position
    `prompt_logprobs_start` on: what comes before may be taken from the cache.
    `seed` None means that the engine draws one, and reports it. `repetition_penalty` follows
    Hugging Face (prompt and output); frequency and presence penalties see output tokens only.

    `constraint` is what the answer must look like; it comes before everything else here, `min_tokens`
    and `logit_bias` included. `thinking` tells what comes before the answer.

    Source: OpenAI API reference; Keskar et al. 2019 (repetition penalty).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    constraint: Constraint | None = None
    thinking: Thinking | ThoughtMessages | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        if self.temperature < 0:
            _fail("temperature", "must be non-negative")
        if self.temperature > 2:
            _fail("temperature", f"must be at most 2, got {self.temperature:.12g}")
        if not 0 < self.top_p <= 1:
            _fail("top_p", f"must be in (0, 1], got {self.top_p:.12g}")
        if self.top_k < -1:
            _fail("top_k", f"must be -1 (off), 0 (off) or positive, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            _fail("min_p", f"must be in [0, 1], got {self.min_p:.12g}")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not -2 <= value <= 2:
                _fail(name, f"must be in [-2, 2], got {value:.12g}")
        if not 0 < self.repetition_penalty <= 2:
            _fail("repetition_penalty", f"must be in (0, 2], got {self.repetition_penalty:.12g}")
        if self.max_tokens is not None and self.max_tokens < 0:
            _fail("max_tokens", f"must be non-negative, got {self.max_tokens}")
        if self.min_tokens < 0:
            _fail("min_tokens", f"must be non-negative, got {self.min_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _fail("min_tokens", f"must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            _fail("seed", "must fit a signed 64-bit integer")
        if len(self.stop) > MAX_STOP_STRINGS:
            _fail("stop", f"may hold at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        if any(not text for text in self.stop):
            _fail("stop", "must not hold an empty string")
        if any("\ud800" <= char <= "\udfff" for text in self.stop for char in text):
            _fail("stop", "stop strings must not hold unpaired surrogates")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            _fail("top_logprobs", f"must be in [0, {MAX_TOP_LOGPROBS}], got {self.logprobs}")
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= MAX_TOP_LOGPROBS:
            _fail("prompt_logprobs", f"must be in [0, {MAX_TOP_LOGPROBS}], got {self.prompt_logprobs}")
        if self.prompt_logprobs_start < 0:
            _fail("prompt_logprobs_start", f"must be non-negative, got {self.prompt_logprobs_start}")
        for token_id, bias in self.logit_bias.items():
            if token_id < 0:
                _fail("logit_bias", f"token ids must be non-negative, got {token_id}")
            if not -100 <= bias <= 100:
                _fail("logit_bias", f"must be in [-100, 100], got {bias:.12g} for token {token_id}")

    def num_prompt_scores(self, prompt_len: int) -> int:
        """How many tokens of a prompt get a log-probability: the last ones, never the first token."""
        if self.prompt_logprobs is None:
            return 0
        return max(0, prompt_len - max(1, self.prompt_logprobs_start))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken: no random number is drawn."""
        return self.temperature < 1e-6


def _is_plain(sample: object, kind: object) -> bool:
    """Whether a field of this kind takes any value of the sample's type."""
    try:
        msgspec.convert(sample, kind)
    except msgspec.ValidationError:
        return False
    return True


_TYPES = tuple(
    (field.name, field.type, frozenset(type(v) for v in (None, True, 1, 0.5, "") if _is_plain(v, field.type)))
    for field in msgspec.structs.fields(SamplingParams)
)


def _check_types(params: SamplingParams) -> None:
    """Structs made in Python are not checked by msgspec, only those that it decodes."""
    values = msgspec.structs.astuple(params)
    for i in _places_to_check(tuple(map(type, values))):
        (name, kind, plain), value = _TYPES[i], values[i]
        if type(value) not in plain:
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                _fail(name, f"has the wrong type: {str(error).lower()}")
        if isinstance(value, float) and not math.isfinite(value):
            _fail(name, "must be a finite number")


@functools.lru_cache(maxsize=256)
def _places_to_check(types: tuple[type, ...]) -> tuple[int, ...]:
    """Of fields whose values may be wrong although they have these types."""
    pairs = enumerate(zip(types, _TYPES, strict=True))
    return tuple(i for i, (kind, (_, _, plain)) in pairs if kind not in plain or issubclass(kind, float))


def _fail(param: str, what: str) -> None:
    raise InvalidRequest(f"Invalid request: {param} {what}", param=param)
