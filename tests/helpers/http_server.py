"""A real server on a loopback port, in a thread, in front of a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import tokenizers
from sanic import Sanic
from tokenizers import decoders, models, pre_tokenizers

from engine.config.engine_config import EngineConfig
from engine.config.server_config import ServerConfig
from engine.core.embedding_io import EmbeddingIO
from engine.core.messages import GenerateRequest
from engine.models.embedding_spec import EmbeddingSpec
from engine.server.app import create_app
from engine.server.context import ServerContext
from engine.server.listening import cut_off, drain, start_serving
from engine.server.model_files import ModelFiles
from helpers.engines import FakeEngineClient

# The framework rewrites its own code at start-up and can do so once a process, except in this mode.
Sanic.test_mode = True

EOS = 0
MODEL_PATH = "org/tiny-model"
DEADLINE_S = 60.0
"""For what comes at once on a machine with nothing else to do: it costs nothing where it is not reached."""
EMBEDDING = EmbeddingSpec(
    pooling=("mean",), is_normalized=True, any_dimension=True, prompts={"query": "ask: ", "x": ""}
)
T = TypeVar("T")

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}{{ suffix or '' }}"
)


def write_model(
    directory: Path, *, template: str = TEMPLATE, special: Sequence[str] = (), **generation_config: Any
) -> Path:
    """A checkpoint without weights: each token is one byte, id 0 ends a text; then `special` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<end>", *alphabet])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config": {"eos_token": "<end>", "chat_template": template},
        "config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 257 + len(special),
        },
        "generation_config": generation_config,
    }
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def write_adapter(directory: Path, weights: bytes = b"weights") -> Path:
    """The files of an adapter, for an engine that does not look into them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


class Server:
    """The server under test. `text` makes output ids; `engine` must be touched through `call` only."""

    def __init__(
        self,
        model_dir: Path,
        *,
        reply: str = "Hello there.",
        config: ServerConfig | None = None,
        context_length: int = 2048,
        loads_model: bool = True,
        embeds: bool = True,
        drain_s: float = 5,
        **engine_config: Any,
    ) -> None:
        self._config = config or ServerConfig()
        self.model = ModelFiles.load(
            str(model_dir),
            sampling_defaults=self._config.sampling_defaults,
            preferred_sampling=self._config.preferred_sampling,
            chat_template_file=self._config.chat_template,
            tool_call_parser=self._config.tool_call_parser,
            reasoning_parser=self._config.reasoning_parser,
        )
        self.context_length = context_length
        self._reply: str | Callable[[GenerateRequest, int], list[int]] = reply
        self._first_reply = reply
        self._engine_config = EngineConfig(model_path=MODEL_PATH, **engine_config)
        self._loads_model = loads_model
        self._embeds = embeds
        self._drain_s = drain_s
        self._started = threading.Event()
        self._stop = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._started.wait(DEADLINE_S)
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.begin_stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    @property
    def is_listening(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S).close()
        except OSError:
            return False
        return True

    def begin_stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.engine = FakeEngineClient(self._answer, context_length=self.context_length)
        self.context = ServerContext(
            client=self.engine,
            config=self._config,
            engine_config=self._engine_config,
            model=self.model if self._loads_model else None,
        )
        if self._embeds:
            info = self.engine.ready.embedding
            assert info is not None
            self.context.embedding = EmbeddingIO(
                name=MODEL_PATH,
                tokenizer=self.model.tokenizer,
                spec=EMBEDDING,
                info=info,
                truncates=False,
            )
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        server = await start_serving(create_app(self.context), listener, backlog=1024)
        self.connections = server.connections
        self._started.set()
        await self._stop.wait()
        self.context.is_draining = True
        await drain(server, self._drain_s)
        await cut_off(server)

    def _answer(self, request: GenerateRequest, choice: int) -> list[int]:
        if callable(self._reply):
            return self._reply(request, choice)
        return self.ids(self._reply) + [EOS]

    def reset(self) -> None:
        """Forget what earlier tests did."""
        self._reply = self._first_reply
        self.context.limits = self._config.limits

        def forget() -> None:
            self.engine.submitted.clear()
            self.engine.embedded.clear()
            self.engine.cancelled.clear()
            self.engine.cancelled_choices.clear()
            self.engine.refuse_with = self.engine.fail_with = None
            self.engine.cached_tokens = 0
            self.engine.cuts = None

        self.call(forget)

    def set_limits(self, **limits: Any) -> None:
        """Other limits than at the start, where the server reads them at each request."""
        self.context.limits = dataclasses.replace(self.context.limits, **limits)

    def wait_idle(self) -> None:
        """Fails the test unless the engine becomes idle."""
        wait_until(lambda: not self.call(lambda: self.engine.running))

    def set_reply(self, reply: str | Callable[[GenerateRequest, int], list[int]]) -> None:
        """What the model says from now on, before its end token; or the ids, by request and choice."""
        self._reply = reply

    def ids(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)

    def prompt_text(self, request: GenerateRequest) -> str:
        return self.model.tokenizer.decode(request.prompt_ids.tolist())

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the server's event loop."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(DEADLINE_S)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_S)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sdk(self, api_key: str = "EMPTY", **options: Any) -> openai.OpenAI:
        at = f"{self.url}/v1"
        return openai.OpenAI(base_url=at, api_key=api_key, max_retries=0, timeout=DEADLINE_S, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def chat(self, **fields: Any) -> httpx.Response:
        """A chat request with defaults for what is required."""
        body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], **fields}
        return self.post("/v1/chat/completions", body)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "default", "prompt": "Hi", **fields})

    def raw(self, data: bytes, timeout: float = DEADLINE_S) -> bytes:
        """All that comes back for these bytes until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextlib.contextmanager
def sent_post(url: str, path: str, body: Any, **headers: str) -> Iterator[socket.socket]:
    """A connection on which a request was sent and nothing was read. To leave it is to vanish."""
    content, at = json.dumps(body).encode(), httpx.URL(url)
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    with socket.create_connection((at.host, at.port), timeout=DEADLINE_S) as opened:
        opened.sendall("\r\n".join([*lines, "", ""]).encode() + content)
        yield opened


def wait_until(condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
    """Poll until `condition` holds; fails the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def events_of(response: httpx.Response) -> Iterator[Any]:
    """The JSON of each event of a finished stream; checks the framing byte by byte."""
    frames = response.content.decode().split("\n\n")
    assert frames.pop() == ""
    assert frames.pop() == "data: [DONE]"
    for frame in frames:
        assert frame.startswith("data: {") and "\n" not in frame
        yield json.loads(frame.removeprefix("data: "))
