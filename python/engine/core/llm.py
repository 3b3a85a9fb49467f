"""Offline use: many prompts in, all answers out, in this process."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.core.build import build_engine
from engine.core.embedding_io import EmbeddingInput, EmbeddingIO, only_embeds_error
from engine.core.engine_core import EngineCore
from engine.core.messages import (
    AdapterLoaded,
    AdapterRef,
    CancelChoice,
    CancelRequest,
    Embedded,
    EmbedRequest,
    Failed,
    LoadAdapter,
    TokenChunk,
)
from engine.core.outputs import (
    Messages,
    Prompt,
    RequestInProgress,
    RequestOutput,
    encode_chat,
    encode_prompt,
    script_config,
)
from engine.core.script_adapters import AdapterFiles, adapter_files, loaded_ref
from engine.errors import EngineError, InvalidRequest
from engine.sampling.params import SamplingParams
from engine.scheduling.admission import check_choices
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

EMBED_AT_ONCE = 1024
"""Texts; what waits in the engine is bounded."""

Adapters = str | Sequence[str | None] | None
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model to run prompts through. Not for more than one thread at a time.

    `model_path` is a directory or a hub id, None for the bundled model; `config` takes the fields
    of `EngineConfig`. Also a context manager; after `close` its memory is free again.
    Raises: `ConfigError` or `CheckpointError`, one line, when the model cannot be loaded.
    """

    def __init__(self, model_path: str | None = None, **config: Any) -> None:
        engine_config = script_config(model_path, config)
        self.tokenizer = Tokenizer.from_checkpoint(engine_config.tokenizer_path or engine_config.model_path)
        self._template = ChatTemplate.from_tokenizer(self.tokenizer)
        self._core: EngineCore | None
        self._core, self.info = build_engine(engine_config)
        self._ids = map(str, itertools.count())
        self._model_path = engine_config.model_path
        self._adapters: dict[AdapterFiles, AdapterRef] = {}
        self._embedding: EmbeddingIO | None = None
        if self.info.embedding is not None:
            self._embedding = EmbeddingIO.load(engine_config, self.info.embedding, self.tokenizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        n: int = 1,
        use_tqdm: bool = True,
        lora_path: Adapters = None,
    ) -> list[RequestOutput]:
        """Continue prompts (texts or token ids, one or many); answers in the order of the prompts.

        `params` is for all, or one for each prompt; so is `lora_path`, the directory of an adapter, or
        the name of one that comes with the model. Interrupted, it leaves nothing running.
        Raises: `InvalidRequest` when a prompt cannot be served; the others are given up then.
        """
        encoded = [encode_prompt(self.tokenizer, p) for p in _as_list(prompts)]
        return self._run(encoded, params, n, use_tqdm, lora_path)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params = None,
        *,
        n: int = 1,
        use_tqdm: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora_path: Adapters = None,
    ) -> list[RequestOutput]:
        """Answer conversations (one or many), rendered with the model's chat template."""
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        encoded = [encode_chat(self.tokenizer, self._template, chat, tools=tools) for chat in chats]
        return self._run(encoded, params, n, use_tqdm, lora_path)

    def embed(
        self,
        inputs: EmbeddingInput | Sequence[EmbeddingInput],
        *,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        lora_path: Adapters = None,
    ) -> np.ndarray:
        """Vectors of texts (or token ids, one or many), float32 [inputs, size], in their order.

        `dimensions` cuts them where the model allows that; `prompt_name` names the checkpoint's prompt
        that goes before each text; `lora_path` is as for `generate`. Interrupted, it leaves nothing
        running.
        Raises: `InvalidRequest` when an input cannot be served, or when the model does not embed.
        """
        if self._core is None:
            raise EngineError("this LLM is closed")
        if self._embedding is None:
            raise InvalidRequest(
                "Invalid request: this model does not embed; LLM(..., pooling='mean') makes it"
            )
        self._embedding.check_dimensions(dimensions)
        texts = self._embedding.encode(_as_list(inputs), prompt_name)
        adapters = [self._adapter(path) for path in _adapter_of_each(lora_path, len(texts))]
        vectors = np.empty((len(texts), self._embedding.info.size), np.float32)
        for adapter in dict.fromkeys(adapters):
            places = [place for place, own in enumerate(adapters) if own == adapter]
            for i in range(0, len(places), EMBED_AT_ONCE):
                some = places[i : i + EMBED_AT_ONCE]
                vectors[some] = self._embed([texts[place] for place in some], adapter)
        return self._embedding.cut(vectors, dimensions)

    def _embed(self, texts: Sequence[Sequence[int]], adapter: AdapterRef | None) -> np.ndarray:
        core, embedding = self._core, self._embedding
        assert core is not None and embedding is not None
        request_id = next(self._ids)
        with _interruptible_between_steps() as check_interrupt:
            core.handle(EmbedRequest.of(request_id, texts, adapter=adapter))
            try:
                while True:
                    for message in core.step():
                        if isinstance(message, Failed):
                            raise message.to_error()
                        if isinstance(message, Embedded):
                            return message.matrix(embedding.info.size)
                    check_interrupt()
            finally:
                core.handle(CancelRequest(request_id))

    def close(self) -> None:
        """Free the model. Nothing else can be called afterwards."""
        if self._core is not None:
            self._core.close()
        self._core = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        encoded: Sequence[tuple[str | None, list[int]]],
        params: Params,
        n: int,
        use_tqdm: bool,
        lora_path: Adapters,
    ) -> list[RequestOutput]:
        if self._core is None:
            raise EngineError("this LLM is closed")
        if not self.info.generates:
            raise only_embeds_error()
        check_choices(n, self.info.num_places)
        adapters = [self._adapter(path) for path in _adapter_of_each(lora_path, len(encoded))]
        requests = [
            RequestInProgress(next(self._ids), prompt, ids, own, n, adapter)
            for (prompt, ids), own, adapter in zip(
                encoded, _params_of_each(params, len(encoded)), adapters, strict=True
            )
        ]
        running: dict[str, RequestInProgress] = {}
        bar = tqdm(total=len(requests), desc="generating", unit="prompt", disable=not use_tqdm)
        try:
            with bar, _interruptible_between_steps() as check_interrupt:
                self._run_all(deque(requests), running, bar, check_interrupt)
        finally:
            for request_id in running:  # after an error or ctrl-C
                self._core.handle(CancelRequest(request_id))
            self._core.step()
        return [request.output for request in requests]

    def _adapter(self, lora_path: str | None) -> AdapterRef | None:
        """What requests carry; read and checked at the first use. Raises: `InvalidRequest`."""
        if not lora_path:
            return None
        files = adapter_files(self._model_path, lora_path)
        if files not in self._adapters:
            core = self._core
            assert core is not None
            core.handle(LoadAdapter(files.directory))
            answer = None
            while answer is None:
                answer = next((m for m in core.step() if isinstance(m, AdapterLoaded)), None)
            self._adapters[files] = loaded_ref(answer)
        return self._adapters[files]

    def _run_all(
        self,
        todo: deque[RequestInProgress],
        running: dict[str, RequestInProgress],
        bar: tqdm,
        check_interrupt: Callable[[], None],
    ) -> None:
        """Keep the engine full until nothing is left; `running` holds what it has."""
        core = self._core
        assert core is not None
        num_choices = 0
        while todo or running:
            check_interrupt()
            while todo and (not running or num_choices + todo[0].n <= self.info.max_running_requests):
                request = todo.popleft()
                running[request.request_id] = request
                num_choices += request.n
                core.handle(request.start(self.tokenizer))
            core.wait()
            for message in core.step():
                request = running.get(getattr(message, "request_id", ""))
                if request is None:
                    continue
                if isinstance(message, Failed):
                    del running[message.request_id]
                    raise message.to_error()
                if isinstance(message, TokenChunk):
                    if request.add(message):
                        core.handle(CancelChoice(message.request_id, message.choice))
                    if request.is_finished:
                        del running[message.request_id]
                        num_choices -= request.n
                        bar.update()


@contextlib.contextmanager
def _interruptible_between_steps() -> Iterator[Callable[[], None]]:
    """Hold ctrl-C back until the yielded function is called, or the block ends: in the middle of a
    step it would leave the books half written. A second one is not held back. Other threads never
    see ctrl-C anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    was_interrupted = False
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        signal.signal(signal.SIGINT, before)

    def check() -> None:
        if was_interrupted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt, as text or as token ids, becomes a list of one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], (str, Sequence))):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _adapter_of_each(lora_path: Adapters, count: int) -> Sequence[str | None]:
    if lora_path is None or isinstance(lora_path, str):
        return [lora_path] * count
    if len(lora_path) != count:
        raise InvalidRequest(f"Invalid request: {len(lora_path)} adapters for {count} prompts")
    return lora_path


def _params_of_each(params: Params, count: int) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequest(f"Invalid request: {len(params)} sampling parameters for {count} prompts")
    return params
