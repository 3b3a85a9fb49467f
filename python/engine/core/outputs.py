"""What `LLM` and `AsyncEngine` give back, put together from token chunks."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.config.engine_config import EngineConfig
from engine.config.env import read_environment
from engine.config.model_location import BUNDLED_POOLING, bundled_model, locate_model
from engine.core.messages import AdapterRef, GenerateRequest, TokenChunk, TokenLogprobs
from engine.core.output_processor import OutputProcessor
from engine.errors import ConfigError, InvalidRequest
from engine.sampling.params import SamplingParams
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass
class CompletionOutput:
    """One choice. `token_ids` holds every generated token, a stop token included.

    `finish_reason` is "stop", "length", or None while it runs; `matched_stop` the stop string or
    the id of the stop token. `logprobs` has one entry for each token that the text holds.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: str | int | None = None
    logprobs: list[tuple[int, TokenLogprobs]] | None = None


@dataclasses.dataclass
class RequestOutput:
    """One prompt with its choices. `prompt` is None when token ids were given.

    `prompt_logprobs`, if asked for, has one entry for each prompt token but the first, from
    `prompt_logprobs_start` on.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None


class RequestInProgress:
    """A request on its way: the message for the engine, and the answer as it grows."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        ids: Sequence[int],
        params: SamplingParams,
        n: int,
        adapter: AdapterRef | None = None,
    ) -> None:
        self.request_id = request_id
        self._adapter = adapter
        self.params = params
        self.n = n
        keeps_logprobs = params.logprobs is not None
        outputs = [CompletionOutput(i, logprobs=[] if keeps_logprobs else None) for i in range(n)]
        self.output = RequestOutput(prompt, list(ids), outputs)
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = []

    def start(self, tokenizer: Tokenizer) -> GenerateRequest:
        """The message that asks for it."""
        ids = self.output.prompt_token_ids
        self._processor = OutputProcessor(tokenizer, self.params, ids, self.n)
        prompt = np.array(ids, "<i4").tobytes()
        return GenerateRequest(self.request_id, prompt, self.params, self.n, adapter=self._adapter)

    def add(self, chunk: TokenChunk) -> bool:
        """Add what the engine computed; whether its choice must now be ended in the engine."""
        if chunk.prompt_logprobs is not None and self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs += chunk.prompt_logprobs
        delta = self._processor.process(chunk)
        if delta is None:
            return False
        if chunk.choice == 0:
            self.output.num_cached_tokens = chunk.cached_tokens
        choice = self.output.outputs[chunk.choice]
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.finish_reason, choice.matched_stop = delta.finish_reason, delta.matched_stop
        if choice.logprobs is not None:
            choice.logprobs += delta.tokens
        return delta.finish_reason is not None and chunk.finish_reason is None

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.output.outputs)


def script_config(model_path: str | None, fields: Mapping[str, Any]) -> EngineConfig:
    """Configuration of an engine that a script makes; without a path that of the bundled model.

    Effects: may download a model that is named by a hub id. Raises: `ConfigError`.
    """
    unknown = set(fields) - {field.name for field in dataclasses.fields(EngineConfig)}
    if unknown:
        raise ConfigError(f"unknown option: {', '.join(sorted(unknown))}")
    if model_path is None:
        path = bundled_model()
    else:
        path = locate_model(str(model_path), with_code=bool(fields.get("trust_remote_code")))
    defaults = {"cpu_isa": read_environment().cpu_isa}
    if model_path is None and not fields.get("embedding_model"):
        defaults["pooling"] = BUNDLED_POOLING if fields.get("device", "cpu") == "cpu" else None
    return EngineConfig(**(defaults | dict(fields)), model_path=str(path))


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> tuple[str | None, list[int]]:
    """Text (if it was text) and token ids. Raises: `InvalidRequest` for anything else."""
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    try:
        ids = [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise InvalidRequest("Invalid request: a prompt is a string or a list of token ids") from None
    if any(not -(2**31) <= token_id < 2**31 for token_id in ids):
        raise InvalidRequest("Invalid request: token ids are 32-bit integers", param="prompt")
    return None, ids


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, **options: Any
) -> tuple[str, list[int]]:
    """Rendered text and token ids of a conversation; `options` go to the template.

    Raises: `InvalidRequest` for anything else than a list of messages.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise InvalidRequest("Invalid request: a conversation is a list of messages with role and content")
    text = template.render(messages, **options)
    return text, tokenizer.encode(text, add_special_tokens=False)
