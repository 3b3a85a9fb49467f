"""POST /v1/completions over engines that are Python packages, so that the same client measures them.

    python completions_server.py openvino|transformers MODEL --name NAME --port N [--threads 2] [--cache-gb 2]

As little as there can be: token-id prompts, greedy answers of exactly max_tokens tokens, streamed as text and
ids. It needs no package but the engine's own, so it runs with the Python of that engine's environment.

openvino: OpenVINO GenAI's ContinuousBatchingPipeline on an exported model, prefix caching on.
transformers: the continuous batching of transformers on a checkpoint, in bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

MOST_ROWS = 32
Emit = Callable[[list[int] | None], None]


class OpenVino:
    """Requests are added and steps made under one lock, by a thread of its own while any request lives."""

    def __init__(self, model: str, threads: int, cache_gb: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._tensor = lambda ids: openvino.Tensor(numpy.array([ids], numpy.int64))
        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = cache_gb
        scheduler.max_num_seqs = MOST_ROWS
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        tokenizer = self._pipeline.get_tokenizer()
        self.decode = lambda token_id: tokenizer.decode([token_id])
        self._live: dict[int, tuple[Any, Emit]] = {}
        self._num_requests = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, ids: list[int], max_tokens: int, emit: Emit) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, True, False
        with self._changed:
            self._num_requests += 1
            handle = self._pipeline.add_request(self._num_requests, self._tensor(ids), config)
            self._live[self._num_requests] = (handle, emit)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._live)
                live = list(self._live.items())
            self._pipeline.step()
            for key, (handle, emit) in live:
                while handle.can_read():
                    for output in handle.read().values():
                        emit(list(output.generated_ids))
                if handle.get_status() != self._genai.GenerationStatus.RUNNING:
                    emit(None)
                    with self._changed:
                        del self._live[key]


class Transformers:
    """Its manager calls back with all tokens so far of a request."""

    def __init__(self, model: str, threads: int, cache_gb: int) -> None:
        import torch
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            ContinuousBatchingConfig,
            GenerationConfig,
        )

        torch.set_num_threads(threads)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.decode = lambda token_id: tokenizer.decode([token_id])
        config = loaded.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        block_size = 256
        batching = ContinuousBatchingConfig(
            block_size=block_size,
            num_blocks=(cache_gb << 30) // (token_bytes * block_size),
            max_batch_tokens=2048,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = loaded.init_continuous_batching(generation, batching)
        self._manager.start()
        self._num_requests = 0

    def add(self, ids: list[int], max_tokens: int, emit: Emit) -> None:
        self._num_requests += 1
        request_id, num_told = f"request-{self._num_requests}", 0

        def tell(output: Any) -> None:
            nonlocal num_told
            if output.error is not None:
                print(output.error, flush=True)
            if new := list(output.generated_tokens[num_told:]):
                num_told += len(new)
                emit(new)
            if output.is_finished():
                emit(None)

        self._manager.register_result_handler(request_id, tell)
        self._manager.add_request(ids, request_id, max_new_tokens=max_tokens, streaming=True, eos_token_id=-1)


ENGINES = {"openvino": OpenVino, "transformers": Transformers}


class Front:
    """HTTP/1.1 with kept connections: GET /health, POST /v1/completions."""

    def __init__(self, engine: Any, name: str) -> None:
        self._engine = engine
        self._name = name
        self._texts: dict[int, str] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
                line, *fields = head.splitlines()
                headers = dict(field.lower().split(": ", 1) for field in fields if field)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if line.startswith("GET /health "):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                elif line.startswith("POST /v1/completions "):
                    await self._complete(writer, json.loads(body))
                else:
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _complete(self, writer: asyncio.StreamWriter, request: dict[str, Any]) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        async for event in self._events(request["prompt"], request["max_tokens"]):
            data = b"data: %b\n\n" % event
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        writer.write(b"0\r\n\r\n")

    async def _events(self, prompt: list[int], max_tokens: int) -> AsyncIterator[bytes]:
        base = {
            "id": "cmpl",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._name,
        }
        num_tokens = 0
        async for ids in self._answer(prompt, max_tokens):
            num_tokens += len(ids)
            choice = {"index": 0, "text": "".join(map(self._text, ids)), "token_ids": ids}
            yield json.dumps({**base, "choices": [{**choice, "finish_reason": None}]}).encode()
        reason = "length" if num_tokens == max_tokens else "stop"
        yield json.dumps({**base, "choices": [{"index": 0, "text": "", "finish_reason": reason}]}).encode()
        usage = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
        yield json.dumps({**base, "choices": [], "usage": usage}).encode()
        yield b"[DONE]"

    async def _answer(self, prompt: list[int], max_tokens: int) -> AsyncIterator[list[int]]:
        told: asyncio.Queue[list[int] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._engine.add(prompt, max_tokens, lambda ids: loop.call_soon_threadsafe(told.put_nowait, ids))
        while (ids := await told.get()) is not None:
            yield ids

    def _text(self, token_id: int) -> str:
        if token_id not in self._texts:
            self._texts[token_id] = self._engine.decode(token_id)
        return self._texts[token_id]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gb", type=int, default=2)
    args = parser.parse_args()
    engine = ENGINES[args.engine](args.model, args.threads, args.cache_gb)
    front = Front(engine, args.name)
    server = await asyncio.start_server(front.serve, "127.0.0.1", args.port, limit=1 << 24)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
