"""Which names a request may give for the model."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import NotFound

ANY_NAME = "default"


class ModelNames:
    """The served names, the first of which is the model's id, and the names that also work."""

    def __init__(self, served: Sequence[str], model_path: str, *, accepts_any: bool = False) -> None:
        self.served = tuple(dict.fromkeys(served))
        self._accepted = {*self.served, model_path, ANY_NAME}
        self._accepts_any = accepts_any

    @property
    def primary(self) -> str:
        return self.served[0]

    def check(self, name: str) -> None:
        """Raises `NotFound` for a name that no request may give."""
        if not self._accepts_any:
            self._require(name)

    def id_of(self, name: str) -> str:
        """The id under which `name` is listed. Raises `NotFound`."""
        self._require(name)
        return name if name in self.served else self.primary

    def _require(self, name: str) -> None:
        if name not in self._accepted:
            raise NotFound(
                f"The model {name[:200]!r} does not exist; this server has {self.primary!r}.",
                slug="model_not_found",
                param="model",
            )
