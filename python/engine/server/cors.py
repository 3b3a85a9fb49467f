"""Which web pages may read answers: cross-origin requests, by an allow-list."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.server.openapi_headers import READABLE

ANY = "*"
_MAX_AGE_S = 600
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]+(, ?[A-Za-z0-9-]+)*")
_EXPOSED = ", ".join(READABLE)


class AllowedOrigins:
    """The origins whose pages may call this server from a browser; without any, nothing is added."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origins)

    def is_preflight(self, request: Request) -> bool:
        """Whether a browser asks what it may do; such a question carries no key."""
        asks = request.method == "OPTIONS" and "access-control-request-method" in request.headers
        return bool(self._origins) and asks and "origin" in request.headers

    def add_preflights(self, app: Sanic) -> None:
        """Answer the questions about every route that `app` has so far."""
        if not self._origins:
            return
        for i, (path, methods) in enumerate(_paths(app).items()):
            allowed = ", ".join(sorted(methods))

            async def preflight(request: Request, allowed: str = allowed, **_: str) -> HTTPResponse:
                return HTTPResponse(status=204, headers=self._answer(request, allowed))

            app.add_route(preflight, path, methods=("OPTIONS",), name=f"preflight_{i}", ignore_body=True)

    def add_headers(self, request: Request, response: HTTPResponse) -> None:
        """Tell the browser whether the page that asks may read the answer."""
        if not self._origins:
            return
        if ANY in self._origins:
            response.headers["access-control-allow-origin"] = ANY
        else:
            response.headers["vary"] = "origin"
            if (origin := request.headers.get("origin")) in self._origins:
                response.headers["access-control-allow-origin"] = origin
        if "access-control-allow-origin" in response.headers:
            response.headers["access-control-expose-headers"] = _EXPOSED

    def _answer(self, request: Request, methods: str) -> dict[str, str]:
        if self._origins.isdisjoint((ANY, request.headers.get("origin"))):
            return {}
        answer = {"access-control-allow-methods": methods, "access-control-max-age": str(_MAX_AGE_S)}
        # Clients bring headers of their own; what they are called does not matter here.
        wanted = request.headers.get("access-control-request-headers", "")
        if _HEADER_NAMES.fullmatch(wanted):
            answer["access-control-allow-headers"] = wanted
        return answer


def _paths(app: Sanic) -> dict[str, set[str]]:
    paths: dict[str, set[str]] = {}
    for route in app.router.routes:
        paths.setdefault("/" + route.path, set()).update(route.methods)
    return paths
