"""The requests that clients wait for, under the names by which they can be aborted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from engine.errors import InvalidRequest


class LiveRequests:
    """Names are unique among live requests; a request may have several."""

    def __init__(self) -> None:
        self._aborts: dict[str, Callable[[], None]] = {}

    def add(self, names: Iterable[str], abort: Callable[[], None]) -> tuple[str, ...]:
        """Returns the names, for `remove`. Raises `InvalidRequest`, and adds none, if one is in use."""
        added = tuple(names)
        for name in added:
            if name in self._aborts:
                raise InvalidRequest(f"rid {name!r} belongs to another request that still runs", param="rid")
        self._aborts |= dict.fromkeys(added, abort)
        return added

    def remove(self, names: Iterable[str]) -> None:
        """Names that are not there are ignored."""
        for name in names:
            self._aborts.pop(name, None)

    def abort(self, name: str) -> int:
        """End the request of this name; how many there were, 0 or 1."""
        abort = self._aborts.get(name)
        if abort is None:
            return 0
        abort()
        return 1

    def abort_all(self) -> int:
        """End every request; how many there were."""
        aborts = set(self._aborts.values())
        for abort in aborts:
            abort()
        return len(aborts)
