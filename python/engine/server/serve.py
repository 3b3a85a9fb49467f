"""The life of a server: answer at once, get ready, serve until a signal, end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.config.engine_config import EngineConfig
from engine.config.model_location import locate_model
from engine.config.server_config import ServerConfig
from engine.core.embedding_io import EmbeddingIO
from engine.core.garbage import spare_what_lives
from engine.core.process import ProcessClient
from engine.errors import ConfigError, EngineError
from engine.server.app import create_app
from engine.server.context import ServerContext
from engine.server.listening import cut_off, drain, start_serving
from engine.server.model_files import ModelFiles
from engine.server.open_files import Room, room_for
from engine.server.probe import compute_something

logger = logging.getLogger(__name__)

LAST_WORDS_S = 1.0
_NUM_THREADS = 4


async def serve(
    client: ProcessClient, listener: socket.socket, *, config: ServerConfig, engine_config: EngineConfig
) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT; a second signal cuts running requests off.

    Raises: `ConfigError` if the engine or the model's text side cannot be loaded, or if the engine died
    so often that it is given up.
    """
    client.attach()
    context = ServerContext(client=client, config=config, engine_config=engine_config)
    room = _make_room(context)
    signals: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(_thread_pool())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, None)
    server = await start_serving(create_app(context), listener, room.backlog)
    is_in_time = False
    try:
        host, port = listener.getsockname()[:2]
        logger.info("listening on http://%s:%d, loading %s", host, port, context.names.primary)
        if await _unless(signals, _load(client, context)):
            spare_what_lives()
            _log_ready(context)
            if await _unless(signals, client.wait_failed()):
                raise ConfigError(f"giving up: {client.state_reason}")
            logger.info("shutting down, in at most %g s", config.drain_timeout)
            context.is_draining = True
            is_in_time = await _unless(signals, drain(server, config.drain_timeout))
    finally:
        context.is_draining = True
        await client.close(at_once=not is_in_time)  # what still runs ends in an error, which is sent
        await drain(server, LAST_WORDS_S)
        await cut_off(server)
        logger.info("stopped")


def _thread_pool() -> ThreadPoolExecutor:
    """For what is large. All its threads are there from the start: no load adds any, nor their memory."""
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="large")
    all_there = threading.Barrier(_NUM_THREADS + 1)
    for _ in range(_NUM_THREADS):
        pool.submit(all_there.wait)
    all_there.wait()
    return pool


def _make_room(context: ServerContext) -> Room:
    wanted = context.limits.connections
    room = room_for(wanted)
    if room.connections < wanted:
        message = "the limit on open files leaves room for %d connections at once, not %d; see ulimit -Hn"
        logger.warning(message, room.connections, wanted)
        context.limits = dataclasses.replace(context.limits, connections=room.connections)
    return room


async def _load(client: ProcessClient, context: ServerContext) -> None:
    """Wait until requests can be served; the engine loads in its own process meanwhile."""
    ready = asyncio.create_task(client.wait_ready())
    files = asyncio.create_task(asyncio.to_thread(_load_files, context))
    try:
        done, _ = await asyncio.wait((ready, files), return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        context.embedding = await asyncio.to_thread(_load_embedding, client, context, files.result())
        await context.adapters.load_first()
        await _warm_up(client)
        context.model = files.result()
    finally:
        ready.cancel()
        files.cancel()


async def _warm_up(client: ProcessClient) -> None:
    """Have something computed: the first step of all takes longer, and should be nobody's."""
    try:
        if client.info is not None:
            await compute_something(client, client.info)
    except EngineError as error:  # what is wrong will show in requests, and in /health_generate
        logger.warning("the first step failed: %s", error.message)


def _load_files(context: ServerContext) -> ModelFiles:
    config = context.engine_config
    directory = str(locate_model(config.tokenizer_path or config.model_path, with_weights=False))
    return ModelFiles.load(
        directory,
        sampling_defaults=context.config.sampling_defaults,
        preferred_sampling=context.config.preferred_sampling,
        chat_template_file=context.config.chat_template,
        tool_call_parser=context.config.tool_call_parser,
        reasoning_parser=context.config.reasoning_parser,
    )


def _load_embedding(client: ProcessClient, context: ServerContext, model: ModelFiles) -> EmbeddingIO | None:
    info, config = client.info, context.engine_config
    if info is None or info.embedding is None:
        return None
    return EmbeddingIO.load(config, info.embedding, model.tokenizer)


async def _unless(signals: asyncio.Queue[None], work: Coroutine[Any, Any, Any]) -> bool:
    """Do `work` unless a signal comes first. Returns whether it was done."""
    task, signalled = asyncio.create_task(work), asyncio.create_task(signals.get())
    await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
    if not signalled.cancel() and task.done():
        signals.put_nowait(None)  # both in one turn of the loop: the signal ends what is done next
    if task.done():
        task.result()
        return True
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return False


def _log_ready(context: ServerContext) -> None:
    limit = context.config.default_max_tokens_chat
    info = context.client.info
    assert info is not None
    logger.info(
        "ready: %d tokens of KV cache, %d running requests, context of %d; "
        "chat answers without max_tokens stop after %s",
        info.max_total_tokens,
        info.max_running_requests,
        info.context_length,
        "the context" if limit is None else f"{limit} tokens (--default-max-tokens-chat)",
    )
