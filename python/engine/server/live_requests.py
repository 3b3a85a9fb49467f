"""The requests that clients wait for, under the names by which they can be aborted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from engine.errors import InvalidRequest

Abort = Callable[[], None]


class LiveRequests:
    """Names are unique among live requests; a request may have several."""

    def __init__(self) -> None:
        self._aborts: dict[str, tuple[Abort, Abort]] = {}  # of what has the name, of its whole request

    def add(self, aborts: Mapping[str, Abort], whole: Abort) -> tuple[str, ...]:
        """`aborts`, by name, end a request or a part of it; `whole` ends all of it.

        Returns the names, for `remove`. Raises `InvalidRequest`, and adds none, if one is in use.
        """
        for name in aborts:
            if name in self._aborts:
                raise InvalidRequest(f"rid {name!r} belongs to another request that still runs", param="rid")
        self._aborts |= {name: (abort, whole) for name, abort in aborts.items()}
        return tuple(aborts)

    def remove(self, names: Iterable[str]) -> None:
        """Names that are not there are ignored."""
        for name in names:
            self._aborts.pop(name, None)

    def names(self) -> list[str]:
        return list(self._aborts)

    def abort(self, name: str) -> int:
        """End the request of this name; how many there were, 0 or 1."""
        if name not in self._aborts:
            return 0
        abort, _ = self._aborts[name]
        abort()
        return 1

    def abort_all(self) -> int:
        """End every request; how many there were."""
        wholes = {whole for _, whole in self._aborts.values()}
        for whole in wholes:
            whole()
        return len(wholes)
