"""The engine for asynchronous scripts: many requests at once, answers as they grow."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from engine.core.client import EngineClient
from engine.core.embedding_io import EmbeddingInput, EmbeddingIO, only_embeds_error
from engine.core.messages import AdapterRef, EmbedRequest
from engine.core.outputs import (
    Messages,
    Prompt,
    RequestInProgress,
    RequestOutput,
    encode_chat,
    encode_prompt,
    script_config,
)
from engine.core.process import ProcessClient
from engine.core.script_adapters import AdapterFiles, adapter_files, loaded_ref
from engine.errors import InvalidRequest
from engine.sampling.params import SamplingParams
from engine.scheduling.admission import check_choices
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer


class AsyncEngine:
    """A model in a process of its own, for one event loop.

        async with AsyncEngine("path/to/model") as engine:
            async for output in engine.generate("Once upon a time"):
                print(output.outputs[0].text)

    Arguments as for `LLM`; `client` replaces the process by another engine.
    Raises: on entering, `ConfigError` with one line when the model cannot be loaded.
    """

    def __init__(
        self, model_path: str | None = None, *, client: EngineClient | None = None, **config: Any
    ) -> None:
        engine_config = script_config(model_path, config)
        self.client: EngineClient = ProcessClient(engine_config) if client is None else client
        self._tokenizer_path = engine_config.tokenizer_path or engine_config.model_path
        self._config = engine_config
        self._embedding: EmbeddingIO | None = None
        self._ids = map(str, itertools.count())
        self._model_path = engine_config.model_path
        self._adapters: dict[AdapterFiles, AdapterRef] = {}

    async def start(self) -> None:
        """Load everything; returns when requests can be served."""
        if isinstance(self.client, ProcessClient):
            self.client.attach()
        try:
            self.tokenizer = await asyncio.to_thread(Tokenizer.from_checkpoint, self._tokenizer_path)
            self._template = ChatTemplate.from_tokenizer(self.tokenizer)
            if isinstance(self.client, ProcessClient):
                await self.client.wait_ready()
            info = self.client.info
            if info is not None and info.embedding is not None:
                load = functools.partial(EmbeddingIO.load, self._config, info.embedding, self.tokenizer)
                self._embedding = await asyncio.to_thread(load)
        except BaseException:
            await self.client.close()
            raise

    async def close(self) -> None:
        """Stop the engine's process; running requests fail."""
        await self.client.close()

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        lora_path: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Continue a prompt. The same object comes again with every new piece, complete at last.

        `lora_path` is the directory of an adapter, or the name of one that comes with the model.

        Leaving the iteration early cancels the request.
        Raises: `EngineError` when it is refused or dies.
        """
        return self._run(*encode_prompt(self.tokenizer, prompt), params, n, lora_path)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora_path: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Answer a conversation, rendered with the model's chat template; as `generate`."""
        text, ids = encode_chat(self.tokenizer, self._template, messages, tools=tools)
        return self._run(text, ids, params, n, lora_path)

    async def embed(
        self,
        inputs: Sequence[EmbeddingInput],
        *,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        lora_path: str | None = None,
    ) -> np.ndarray:
        """Vectors of texts or token ids, float32 [inputs, size]; arguments and errors as `LLM.embed`."""
        if self._embedding is None:
            raise InvalidRequest("Invalid request: this model does not embed; pooling='mean' makes it")
        self._embedding.check_dimensions(dimensions)
        texts = await asyncio.to_thread(self._embedding.encode, inputs, prompt_name)
        adapter = await self._adapter(lora_path) if lora_path else None
        request = EmbedRequest.of(next(self._ids), texts, adapter=adapter)
        try:
            answer = await (await self.client.embed(request))
        except asyncio.CancelledError:
            self.client.cancel(request.request_id)
            raise
        return self._embedding.cut(answer.matrix(self._embedding.info.size), dimensions)

    async def _run(
        self,
        prompt: str | None,
        ids: list[int],
        params: SamplingParams | None,
        n: int,
        lora_path: str | None,
    ) -> AsyncIterator[RequestOutput]:
        if self.client.info is not None:  # else the client says why
            if not self.client.info.generates:
                raise only_embeds_error()
            check_choices(n, self.client.info.num_places)
        adapter = await self._adapter(lora_path) if lora_path else None
        request = RequestInProgress(next(self._ids), prompt, ids, params or SamplingParams(), n, adapter)
        stream = await self.client.submit(request.start(self.tokenizer))
        try:
            async for chunk in stream:
                if request.add(chunk):
                    self.client.cancel_choice(chunk.request_id, chunk.choice)
                yield request.output
        finally:
            if not request.is_finished:
                self.client.cancel(request.request_id)

    async def _adapter(self, lora_path: str) -> AdapterRef:
        files = adapter_files(self._model_path, lora_path)
        if files not in self._adapters:
            self._adapters[files] = loaded_ref(await self.client.load_adapter(files.directory))
        return self._adapters[files]
