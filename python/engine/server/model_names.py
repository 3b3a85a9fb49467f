"""Which names a request may give for the model, alone or with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engine.errors import InvalidRequest, NotFound

ANY_NAME = "default"
_MOST_NAMED = 20


class _Adapters(Protocol):
    def find(self, name: str) -> Any: ...
    def was_unloaded(self, name: str) -> bool: ...
    @property
    def may_be_named(self) -> bool: ...
    @property
    def paths(self) -> Mapping[str, str]: ...


class ModelNames:
    """The served names, the first of which is the model's id, and the names that also work.

    An adapter is named by itself, or after a name of the model and a colon. Where every other name is
    accepted as well, one is named after any of them: see `_behind_any_name`.
    """

    def __init__(
        self,
        served: Sequence[str],
        model_path: str,
        *,
        accepts_any: bool = False,
        embedding: str | None = None,
        embedding_path: str | None = None,
    ) -> None:
        self.served = tuple(dict.fromkeys(served))
        self.adapters: _Adapters | None = None
        self._accepted = {*self.served, model_path, ANY_NAME}
        self._accepts_any = accepts_any
        self.embedding = embedding
        """The id of a second model, that embeds."""
        self._embedding_path = embedding_path

    @property
    def primary(self) -> str:
        return self.served[0]

    def is_base(self, name: str) -> bool:
        """Whether it names the model without an adapter."""
        return name in self._accepted

    def is_embedding(self, name: str) -> bool:
        """Whether it names the second model: by its id or its path."""
        return name in (self.embedding, self._embedding_path)

    def check(self, name: str) -> None:
        """Raises `NotFound` for a name that no request may give."""
        self.adapter_of(name)

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a model's name asks for; None for the base model.

        Raises `NotFound` for a name that no request may give: an adapter that is not there is never
        answered by the base model.
        """
        if self.is_embedding(name):
            raise InvalidRequest(
                f"the model {name!r} makes embeddings and no text; use /v1/embeddings",
                slug="unsupported_parameter",
                param="model",
            )
        if self.is_base(name):
            return None
        adapter = self._split(name)
        if adapter is None and not self._accepts_any:
            raise self._not_found(name)
        return adapter or self._behind_any_name(name)

    def check_embedding(self, name: str) -> None:
        """Raises for a name that no request for embeddings may give: `NotFound`, or `InvalidRequest` when it
        is that of the model that generates, beside another one that embeds, or of its adapter."""
        if self.is_embedding(name) or (self.embedding is not None and name == ANY_NAME):
            return
        if self.adapter_of(name) is not None and self.embedding is not None:
            raise InvalidRequest(
                f"{name[:200]!r} names an adapter of the model that generates; embeddings are made by "
                f"{self.embedding!r}, without any",
                slug="unsupported_parameter",
                param="model",
            )
        if self.embedding is not None and (not self._accepts_any or self.is_base(name)):
            raise InvalidRequest(
                f"the model {name[:200]!r} generates text: use /v1/chat/completions or /v1/completions; "
                f"embeddings are made by {self.embedding!r}",
                slug="unsupported_parameter",
                param="model",
            )

    def id_of(self, name: str) -> str:
        """The id under which `name` is listed. Raises `NotFound`."""
        if self.is_embedding(name):
            return self.embedding or name
        if self.is_base(name):
            return name if name in self.served else self.primary
        adapter = self._split(name)
        if adapter is None:
            raise self._not_found(name)
        return adapter

    def _split(self, name: str) -> str | None:
        """The adapter in the name, None if it holds none. Raises `NotFound` for one that is not there."""
        if self._has_adapter(name):
            return name
        bases = [base for base in self._accepted if name.startswith(f"{base}:")]
        if not bases:
            return None
        adapter = name[len(max(bases, key=len)) + 1 :]
        if not self._has_adapter(adapter):
            raise _no_adapter(f"The model {self.primary!r} has no adapter {adapter[:200]!r}.")
        return adapter

    def _behind_any_name(self, name: str) -> str | None:
        """The adapter in a name that begins with none of the model's; None for the model alone.

        What stands behind a colon is an adapter or a tag, as in "llama3:8b": only a server that never had
        adapters takes it for a tag. Raises `NotFound`: the model does not answer for an adapter that is not
        there, nor for one that is not there any more.
        """
        if self.adapters is None:
            return None
        if self.adapters.was_unloaded(name):
            raise _no_adapter(f"The adapter {name[:200]!r} has been unloaded.")
        _, colon, after_first = name.partition(":")
        after_last = name.rpartition(":")[2]
        for adapter in (after_first, after_last) if colon else ():
            if self._has_adapter(adapter):
                return adapter
        if colon and self.adapters.may_be_named:
            raise _no_adapter(
                f"There is no adapter {after_first[:200]!r}. If all of {name[:200]!r} is to name the model, "
                "start the server with it as --served-model-name."
            )
        return None

    def _has_adapter(self, name: str) -> bool:
        return self.adapters is not None and self.adapters.find(name) is not None

    def _not_found(self, name: str) -> NotFound:
        names = [
            *self.served,
            *filter(None, [self.embedding]),
            *(self.adapters.paths if self.adapters else ()),
        ]
        others = len(names) - _MOST_NAMED
        known = ", ".join(map(repr, names[:_MOST_NAMED])) + (f" and {others} more" if others > 0 else "")
        return NotFound(
            f"The model {name[:200]!r} does not exist; this server has {known}.",
            slug="model_not_found",
            param="model",
        )


def _no_adapter(message: str) -> NotFound:
    return NotFound(message, slug="adapter_not_found", param="model")
