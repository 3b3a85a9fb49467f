"""The adapters that requests may name: registered ones, and directories loaded at their first use."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from engine.config.adapter_source import AdapterSource
from engine.core.client import EngineClient
from engine.core.messages import AdapterLoaded, AdapterRef
from engine.errors import ConfigError, EngineError, InvalidRequest, NotFound
from engine.server.adapter_paths import AdapterRoots
from engine.server.model_names import ModelNames

T = TypeVar("T")

MAX_NAME_CHARS = 256
MAX_UNNAMED = 1024
"""Adapters that are known by nothing but their directory; the one not used for longest is forgotten."""
MAX_UNLOADED = 4096
"""Names that adapters had which are remembered, the latest."""


@dataclasses.dataclass(eq=False)
class Adapter:
    """One adapter as requests see it. `path` is as it was given; `num_live` counts its requests."""

    name: str
    path: str
    ref: AdapterRef
    rank: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    signature: tuple[int, ...] = ()
    """Of the files of one that is known by its directory: when they change, it is read again."""

    num_live: int = 0
    is_idle: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class AdapterRegistry:
    """Names and paths of adapters, and who uses them. Belongs to one event loop.

    The engine knows adapters by the contents of their files, which requests carry: so it may die and come
    back, and a name that is loaded again with other weights shares nothing with what it was.
    """

    def __init__(
        self, client: EngineClient, names: ModelNames, sources: Iterable[str], roots: Iterable[str]
    ) -> None:
        self._client = client
        self._model_names = names
        names.adapters = self
        self._sources = [AdapterSource.parse(text) for text in sources]
        self._roots = AdapterRoots(roots, [source.path for source in self._sources])
        self._named: dict[str, Adapter] = {}
        self._unnamed: OrderedDict[str, Adapter] = OrderedDict()  # by directory
        self._unloaded: OrderedDict[str, None] = OrderedDict()  # names, some of which mean another one now
        self._reading: dict[str, asyncio.Task[Adapter]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # which go on when whoever asked for them is gone
        for source in self._sources:
            self._check_name(source.name, ConfigError)

    def __iter__(self) -> Iterator[Adapter]:
        yield from self._named.values()
        yield from self._unnamed.values()

    def find(self, name: str) -> Adapter | None:
        """The adapter that is listed under `name`."""
        return self._named.get(name) or self._unnamed.get(name)

    def was_unloaded(self, name: str) -> bool:
        """Whether it was the name of an adapter, and is none any more."""
        return name in self._unloaded and self.find(name) is None

    @property
    def may_be_named(self) -> bool:
        """Whether requests have, had or could have adapters to name here."""
        return bool(self._named or self._unnamed or self._unloaded or self._sources or self._roots)

    @property
    def paths(self) -> dict[str, str]:
        """By name."""
        return {adapter.name: adapter.path for adapter in self}

    # --- for requests

    async def use(self, model: str, lora_path: str | None) -> Adapter | None:
        """The adapter of a request, to be released; None for the base model. The model's name goes first.

        Raises: `NotFound` (adapter_not_found), or `InvalidRequest` for a path that may not be read or
        files that cannot be used.
        """
        name = self._model_names.adapter_of(model) if model else None
        if name is not None:
            adapter = self.find(name)
            assert adapter is not None
        elif lora_path:
            self._require_taken()
            adapter = await self._at(lora_path)
        else:
            return None
        adapter.num_live += 1
        adapter.is_idle.clear()
        return adapter

    def release(self, adapter: Adapter) -> None:
        """End what `use` began."""
        adapter.num_live -= 1
        if adapter.num_live == 0:
            adapter.is_idle.set()

    async def _at(self, lora_path: str) -> Adapter:
        if (adapter := self._named.get(lora_path)) is not None:
            return adapter
        for adapter in self._named.values():
            if adapter.path == lora_path:
                return adapter
        directory, signature = await asyncio.to_thread(self._roots.find, lora_path)
        for adapter in self._named.values():
            if adapter.ref.directory == directory and adapter.signature == signature:
                return adapter
        known = self._unnamed.get(directory)
        if known is None or known.signature != signature:
            known = await self._read_once(directory, signature)
        if directory in self._unnamed:
            self._unnamed.move_to_end(directory)
        return known

    async def _read_once(self, directory: str, signature: tuple[int, ...]) -> Adapter:
        """Requests that come while it is read wait for the same reading."""
        if directory not in self._reading:
            task = asyncio.create_task(self._read(directory, directory, directory, False, signature))
            self._reading[directory] = task
            task.add_done_callback(lambda _: self._reading.pop(directory))
            task.add_done_callback(self._keep_unnamed)
        return await asyncio.shield(self._reading[directory])

    def _keep_unnamed(self, task: asyncio.Task[Adapter]) -> None:
        if task.cancelled() or task.exception() is not None:
            return
        adapter = task.result()
        before = self._unnamed.pop(adapter.name, None)
        self._unnamed[adapter.name] = adapter
        if before is not None:
            self._end(before)
        idle = (other for other in self._unnamed.values() if other.num_live == 0)
        while len(self._unnamed) > MAX_UNNAMED and (oldest := next(idle, None)) is not None:
            self._end(self._unnamed.pop(oldest.name))
            idle = (other for other in self._unnamed.values() if other.num_live == 0)

    # --- for whoever manages adapters

    async def load_first(self) -> None:
        """Load what --lora-paths names. Raises: `ConfigError` with the reason."""
        for source in self._sources:
            try:
                await self.load(source.name, source.path, source.is_pinned)
            except EngineError as error:
                raise ConfigError(f"--lora-paths: {source.path}: {error.message}") from None

    async def load(self, name: str, path: str, is_pinned: bool = False) -> Adapter:
        """Register an adapter, or register it anew: requests that run keep what they began with.

        Once begun it is done also if the caller is cancelled: the engine must hold nothing that has no name.
        Raises: `InvalidRequest` or `NotFound`.
        """
        self._require_taken()
        self._check_name(name, InvalidRequest)
        return await asyncio.shield(self._start(self._register(name, path, is_pinned)))

    async def _register(self, name: str, path: str, is_pinned: bool) -> Adapter:
        directory, signature = await asyncio.to_thread(self._roots.find, path)
        adapter = await self._read(name, path, directory, is_pinned, signature)
        before = self._named.get(name)
        self._named[name] = adapter
        if before is not None:
            self._end(before)
        return adapter

    async def unload(self, name: str) -> None:
        """Forget a name at once, and return when no request uses its adapter any more.

        Raises: `NotFound`.
        """
        adapter = self._named.pop(name, None) or self._unnamed.pop(name, None)
        if adapter is None:
            raise adapter_not_found(name)
        await asyncio.shield(self._end(adapter))

    async def _read(
        self, name: str, path: str, directory: str, is_pinned: bool, signature: tuple[int, ...]
    ) -> Adapter:
        answer: AdapterLoaded = await self._client.load_adapter(directory, is_pinned)
        if answer.error is not None:
            raise InvalidRequest(answer.error, slug=answer.slug or None, param="lora_path")
        ref = AdapterRef(directory, answer.digest, is_pinned)
        return Adapter(name, path, ref, answer.rank, signature=signature)

    def _end(self, adapter: Adapter) -> asyncio.Task[None]:
        """Throw out what is no longer named, as soon as its last request is over."""
        self._unloaded[adapter.name] = None
        self._unloaded.move_to_end(adapter.name)
        if len(self._unloaded) > MAX_UNLOADED:
            self._unloaded.popitem(last=False)
        if adapter.ref.is_pinned:
            self._unpin(adapter.ref.digest)
        return self._start(self._unload_when_idle(adapter))

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _unpin(self, digest: str) -> None:
        """Of several names of the same contents one is enough to pin them."""
        if not any(other.ref.is_pinned for other in self if other.ref.digest == digest):
            self._client.unpin_adapter(digest)

    async def _unload_when_idle(self, adapter: Adapter) -> None:
        if adapter.num_live:
            await adapter.is_idle.wait()
        if all(other.ref.digest != adapter.ref.digest for other in self):
            self._client.unload_adapter(adapter.ref.digest)

    def _require_taken(self) -> None:
        info = self._client.info
        if info is not None and not info.takes_adapters:
            reason = ", as it runs through transformers" if info.implementation == "transformers" else ""
            raise InvalidRequest(
                f"the model {self._model_names.primary!r} takes no adapters{reason}",
                slug="unsupported_parameter",
                param="lora_path",
            )

    def _check_name(self, name: str, kind: type[EngineError]) -> None:
        if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
            wanted = f"1 to {MAX_NAME_CHARS} printable characters"
            raise kind(f"the name of an adapter must have {wanted}", param="lora_name")
        if self._model_names.is_base(name) or self._model_names.is_embedding(name):
            raise kind(
                f"{name!r} is a name of the model itself and cannot be one of an adapter", param="lora_name"
            )


def adapter_not_found(name: str) -> NotFound:
    return NotFound(f"There is no adapter {name[:200]!r}.", slug="adapter_not_found", param="lora_path")
