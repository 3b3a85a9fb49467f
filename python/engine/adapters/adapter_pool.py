"""The adapters in memory: read off the engine's loop, lent to requests, dropped when not used for long."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol

from engine.core.messages import AdapterLoaded, AdapterRef
from engine.errors import EngineError, InternalError, InvalidRequest, NotFound

if TYPE_CHECKING:
    from engine.adapters.lora import CheckedAdapter, LoadedAdapter

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
    """To be thrown out when it has been read and has no user."""

    @property
    def is_being_read(self) -> bool:
        return self.weights is None and self.error is None


@dataclasses.dataclass(eq=False, slots=True)
class _Asked:
    """A call of `begin_load`: first its check ends, then, if there was room for it, its reading."""

    directory: str
    is_pinned: bool
    check: Future[CheckedAdapter] | None = None
    answer: AdapterLoaded | None = None
    entry: PoolEntry | None = None


class Reader(Protocol):
    """`adapters.lora.AdapterReader`."""

    def check(self, directory: str) -> CheckedAdapter: ...
    def load(self, directory: str) -> LoadedAdapter: ...


class AdapterPool:
    """At most `max_loaded` adapters in memory, those that are being read included; at most `max_in_use` of
    them lent to requests at a time.

    Room is made before an adapter is read, and only for one that passed its check or was known before: what
    cannot be used drives nothing out. Beside them, the files of the one adapter that is being checked or
    read are in memory.

    Belongs to the engine's thread; only the `reader` works in another one, on one adapter after the other.
    What nobody uses and is not pinned makes room, the least recently used first. Nothing changes but in
    the calls below.
    """

    def __init__(self, reader: Reader, *, max_loaded: int, max_in_use: int) -> None:
        self._reader = reader
        self._max_loaded, self._max_in_use = max_loaded, max_in_use
        self._entries: OrderedDict[str, PoolEntry] = OrderedDict()  # least recently used first
        self._num_in_use = 0
        self._loads: dict[Future[LoadedAdapter], PoolEntry] = {}
        self._asked: deque[_Asked] = deque()  # the first one is being checked or read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")
        self._has_more_room = False
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
                entry = self._begin_read(ref, is_pinned=ref.is_pinned and self._may_pin())
            self._num_in_use += 1
        entry.num_users += 1
        self._entries.move_to_end(ref.digest)
        return entry

    def give_back(self, entry: PoolEntry) -> None:
        """End what `try_take` began, once for each call."""
        entry.num_users -= 1
        if entry.num_users == 0 and entry.error is None:
            self._num_in_use -= 1
            self._drop_if_forgotten(entry)

    def settle(self) -> bool:
        """Take over what has been read. Returns whether there may be more to lend than before."""
        has_more, self._has_more_room = self._has_more_room, False
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
            else:
                self._drop_if_forgotten(entry)
        return has_more or bool(done)

    def wait(self, timeout_s: float) -> None:
        """Sleep until something has been read, at most `timeout_s`."""
        check = self._asked[0].check if self._asked else None
        checking = () if check is None or check.done() else (check,)
        wait((*self._loads, *checking), timeout_s, "FIRST_COMPLETED")

    # --- for whoever manages adapters

    def begin_load(self, directory: str, is_pinned: bool) -> None:
        """Read and check an adapter; `take_answers` tells how it went, in the order of these calls."""
        self._asked.append(_Asked(directory, is_pinned))
        self._check_first()

    def take_answers(self) -> list[AdapterLoaded]:
        """Results of `begin_load` since the last call, as far as `settle` knows them."""
        answers = []
        while self._asked and (answer := self._answer(self._asked[0])) is not None:
            answers.append(answer)
            self._asked.popleft()
            self._check_first()
        return answers

    def unpin(self, digest: str) -> None:
        """Let an adapter make room for others again. Unknown ones are ignored."""
        entry = self._entries.get(digest)
        if entry is not None and entry.is_pinned:
            entry.is_pinned = False
            self._has_more_room = True

    def forget(self, digest: str) -> None:
        """Throw an adapter out, when its last user is gone. Unknown ones are ignored."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        entry.is_forgotten, entry.is_pinned = True, False
        self._has_more_room = True
        self._drop_if_forgotten(entry)

    def close(self) -> None:
        """End the reader's thread; nothing can be loaded afterwards."""
        self._thread.shutdown(wait=False, cancel_futures=True)

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

    def _check_first(self) -> None:
        if self._asked and self._asked[0].check is None:
            self._asked[0].check = self._thread.submit(self._reader.check, self._asked[0].directory)

    def _answer(self, asked: _Asked) -> AdapterLoaded | None:
        """None while it is being checked or read."""
        if asked.check is None or not asked.check.done():
            return None
        if asked.answer is None:
            asked.answer = self._checked_answer(asked, asked.check)
        if asked.entry is None:
            return asked.answer
        if (error := asked.entry.error) is not None:
            return AdapterLoaded(asked.directory, error=error.message, slug=error.slug)
        return None if asked.entry.is_being_read else asked.answer

    def _checked_answer(self, asked: _Asked, check: Future[CheckedAdapter]) -> AdapterLoaded:
        try:
            checked = check.result()
            asked.entry = self._keep(AdapterRef(asked.directory, checked.digest, asked.is_pinned))
        except EngineError as error:
            return AdapterLoaded(asked.directory, error=error.message, slug=error.slug)
        except Exception as error:
            logger.exception("an adapter could not be read: %s", asked.directory)
            return AdapterLoaded(
                asked.directory, error=f"cannot read it: {type(error).__name__}", slug="invalid_adapter"
            )
        return AdapterLoaded(asked.directory, checked.digest, checked.rank)

    def _keep(self, ref: AdapterRef) -> PoolEntry | None:
        """Read it, if there is room for it. Raises: `InvalidRequest` if it is to be pinned and cannot be."""
        entry = self._entries.get(ref.digest)
        if ref.is_pinned and not self._may_pin(entry):
            raise InvalidRequest(
                f"all but one of the {self._max_loaded} places (--max-loaded-loras) are pinned already",
                slug="too_many_pinned",
            )
        if entry is not None:
            entry.is_pinned |= ref.is_pinned  # another name of the same contents may be pinned
            entry.is_forgotten = False
        elif self._make_room():
            entry = self._begin_read(ref, is_pinned=ref.is_pinned)
        elif ref.is_pinned:
            raise InvalidRequest("all places (--max-loaded-loras) are in use", slug="too_many_pinned")
        return entry

    def _begin_read(self, ref: AdapterRef, *, is_pinned: bool) -> PoolEntry:
        entry = self._entries[ref.digest] = PoolEntry(ref, is_pinned=is_pinned)
        self._loads[self._thread.submit(self._reader.load, ref.directory)] = entry
        return entry

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

    def _drop_if_forgotten(self, entry: PoolEntry) -> None:
        if entry.is_forgotten and entry.num_users == 0 and not entry.is_being_read:
            self._drop(entry)

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
