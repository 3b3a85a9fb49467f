"""The adapters in memory: read off the engine's loop, lent to requests, dropped when not used for long."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from engine.core.messages import AdapterLoaded, AdapterRef
from engine.errors import EngineError, InternalError, InvalidRequest, NotFound

if TYPE_CHECKING:
    from engine.adapters.lora import LoadedAdapter

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False, slots=True)
class PoolEntry:
    """An adapter in memory, or on its way there. `weights` is None until it is loaded."""

    ref: AdapterRef
    weights: Any = None
    error: EngineError | None = None
    num_users: int = 0
    is_pinned: bool = False
    is_forgotten: bool = False
    """To be thrown out with its last user."""


class AdapterPool:
    """At most `max_loaded` adapters in memory (and one that is being checked), at most `max_in_use` of them
    lent to requests at a time.

    Belongs to the engine's thread; only `load` runs in another one, one adapter after the other. What
    nobody uses and is not pinned makes room, the least recently used first. Nothing changes but in
    the calls below.
    """

    def __init__(self, load: Callable[[str], LoadedAdapter], *, max_loaded: int, max_in_use: int) -> None:
        self._load = load
        self._max_loaded, self._max_in_use = max_loaded, max_in_use
        self._entries: OrderedDict[str, PoolEntry] = OrderedDict()  # least recently used first
        self._num_in_use = 0
        self._loads: dict[Future[LoadedAdapter], PoolEntry] = {}
        self._asked: deque[tuple[str, bool]] = deque()  # of `begin_load`, the first one is being checked
        self._checking: Future[LoadedAdapter] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")
        self.num_evictions = 0

    @property
    def num_loaded(self) -> int:
        return len(self._entries)

    @property
    def num_in_use(self) -> int:
        return self._num_in_use

    @property
    def is_loading(self) -> bool:
        return bool(self._loads or self._asked)

    # --- for requests

    def try_take(self, ref: AdapterRef) -> PoolEntry | None:
        """Lend an adapter, reading it first if need be: then `weights` or `error` is set by a later
        `settle`. None while there is no room, or too many others are lent."""
        entry = self._entries.get(ref.digest)
        if entry is None or entry.num_users == 0:
            if self._num_in_use >= self._max_in_use:
                return None
            if entry is None:
                if not self._make_room():
                    return None
                entry = PoolEntry(ref, is_pinned=ref.is_pinned and self._may_pin())
                self._entries[ref.digest] = entry
                self._loads[self._reader.submit(self._load, ref.directory)] = entry
            self._num_in_use += 1
        entry.num_users += 1
        self._entries.move_to_end(ref.digest)
        return entry

    def give_back(self, entry: PoolEntry) -> None:
        """End what `try_take` began, once for each call."""
        entry.num_users -= 1
        if entry.num_users == 0 and entry.error is None:
            self._num_in_use -= 1
            if entry.is_forgotten:
                self._drop(entry)

    def settle(self) -> bool:
        """Take over what has been read. Returns whether there was anything."""
        if not self._loads:
            return False
        done = [load for load in self._loads if load.done()]
        for load in done:
            entry = self._loads.pop(load)
            try:
                loaded = load.result()
                if loaded.digest != entry.ref.digest:
                    raise InvalidRequest("its files have changed")
                entry.weights = loaded.weights
            except Exception as error:
                entry.error = _not_found(entry.ref, error)
                self._num_in_use -= entry.num_users > 0
                self._drop(entry)
        return bool(done)

    def wait(self, timeout_s: float) -> None:
        """Sleep until something has been read, at most `timeout_s`."""
        checking = () if self._checking is None else (self._checking,)
        wait((*self._loads, *checking), timeout_s, "FIRST_COMPLETED")

    # --- for whoever manages adapters

    def begin_load(self, directory: str, is_pinned: bool) -> None:
        """Read and check an adapter; `take_answers` tells how it went, in the order of these calls."""
        self._asked.append((directory, is_pinned))
        self._check_next()

    def take_answers(self) -> list[AdapterLoaded]:
        """Results of `begin_load` since the last call."""
        answers = []
        while self._checking is not None and self._checking.done():
            load, self._checking = self._checking, None
            answers.append(self._answer(load, *self._asked.popleft()))
            self._check_next()
        return answers

    def forget(self, digest: str) -> None:
        """Throw an adapter out, when its last user is gone. Unknown ones are ignored."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        entry.is_forgotten, entry.is_pinned = True, False
        if entry.num_users == 0:
            self._drop(entry)

    def close(self) -> None:
        """End the reader; nothing can be loaded afterwards."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def counts(self) -> dict[str, int]:
        """Fields of `EngineStats`."""
        return {
            "num_adapters_loaded": self.num_loaded,
            "num_adapters_in_use": self.num_in_use,
            "num_adapter_evictions": self.num_evictions,
        }

    def check(self) -> None:
        """Audit the books. Raises: `AssertionError`."""
        assert len(self._entries) <= self._max_loaded
        in_use = sum(entry.num_users > 0 for entry in self._entries.values())
        assert in_use == self._num_in_use <= self._max_in_use
        assert all(entry.num_users >= 0 for entry in self._entries.values())

    def _check_next(self) -> None:
        """One after the other, as what has been read is in memory until it is answered."""
        if self._checking is None and self._asked:
            self._checking = self._reader.submit(self._load, self._asked[0][0])

    def _answer(self, load: Future[LoadedAdapter], directory: str, is_pinned: bool) -> AdapterLoaded:
        try:
            loaded = load.result()
            self._keep(loaded, AdapterRef(directory, loaded.digest, is_pinned))
        except EngineError as error:
            return AdapterLoaded(directory, error=error.message, slug=error.slug)
        except Exception as error:
            logger.exception("an adapter could not be read: %s", directory)
            return AdapterLoaded(
                directory, error=f"cannot read it: {type(error).__name__}", slug="invalid_adapter"
            )
        return AdapterLoaded(directory, loaded.digest, loaded.rank, loaded.num_bytes)

    def _keep(self, loaded: LoadedAdapter, ref: AdapterRef) -> None:
        entry = self._entries.get(ref.digest)
        if ref.is_pinned and not self._may_pin(entry):
            raise InvalidRequest(
                f"all but one of the {self._max_loaded} places (--max-loaded-loras) are pinned already",
                slug="too_many_pinned",
            )
        if entry is not None:
            entry.is_pinned |= ref.is_pinned
            entry.is_forgotten = False
        elif self._make_room():
            self._entries[ref.digest] = PoolEntry(ref, loaded.weights, is_pinned=ref.is_pinned)
        elif ref.is_pinned:
            raise InvalidRequest("all places (--max-loaded-loras) are in use", slug="too_many_pinned")

    def _may_pin(self, entry: PoolEntry | None = None) -> bool:
        """Whether a place for the others is left if one more, or `entry`, is pinned."""
        num_pinned = sum(other.is_pinned for other in self._entries.values() if other is not entry)
        return num_pinned < self._max_loaded - 1

    def _make_room(self) -> bool:
        if len(self._entries) < self._max_loaded:
            return True
        for entry in self._entries.values():
            if entry.num_users == 0 and not entry.is_pinned and entry.weights is not None:
                self._drop(entry)
                self.num_evictions += 1
                return True
        return False

    def _drop(self, entry: PoolEntry) -> None:
        """Forget an entry; with an error it may still have users, who do not count any more."""
        if self._entries.get(entry.ref.digest) is entry:
            del self._entries[entry.ref.digest]


def _not_found(ref: AdapterRef, error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return NotFound(
            f"The adapter at {ref.directory} is not what it was when it was loaded: {error.message}",
            slug="adapter_not_found",
            param="lora_path",
        )
    logger.error("an adapter could not be read: %s", ref.directory, exc_info=error)
    return InternalError("The adapter could not be read.")
