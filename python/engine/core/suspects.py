"""Requests that may have killed the engine: computed alone when they come again, refused if that kills it."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from engine.core.messages import EmbedRequest, GenerateRequest
from engine.errors import InvalidRequest
from engine.log import request_name

logger = logging.getLogger(__name__)

Request = TypeVar("Request", GenerateRequest, EmbedRequest)

_MOST = 4096


class Suspects:
    """Kept by what is asked, not by who asks. The oldest are forgotten when there are too many.

    Cost: nothing for a request while there is no suspect, else one hash of it.
    """

    def __init__(self) -> None:
        self._suspected: OrderedDict[bytes, None] = OrderedDict()
        self._refused: OrderedDict[bytes, None] = OrderedDict()

    def check(self, request: Request) -> Request:
        """The request as the engine is to take it. Raises: `InvalidRequest` for one that crashes it."""
        if not self._suspected and not self._refused:
            return request
        mark = _mark(request)
        if mark in self._refused:
            raise InvalidRequest(
                "Invalid request: this request crashed the engine and is not tried again",
                slug="request_crashes_engine",
            )
        return msgspec.structs.replace(request, runs_alone=True) if mark in self._suspected else request

    def note_death(self, requests: Iterable[GenerateRequest | EmbedRequest]) -> None:
        """The step of these requests killed the engine."""
        requests = list(requests)
        for request in requests:
            mark, name = _mark(request), request_name(request.request_id, request.trace_id)
            if request.runs_alone and len(requests) == 1:
                logger.error("request %s crashes the engine and is refused from now on", name)
                self._suspected.pop(mark, None)
                _add(self._refused, mark)
            else:
                logger.warning("request %s was in the step that crashed the engine", name)
                _add(self._suspected, mark)

    def note_end(self, request: GenerateRequest | EmbedRequest) -> None:
        """A request was computed and came to its end; if it ran alone, it is cleared."""
        if request.runs_alone:
            self._suspected.pop(_mark(request), None)


def _add(marks: OrderedDict[bytes, None], mark: bytes) -> None:
    marks[mark] = None
    marks.move_to_end(mark)
    if len(marks) > _MOST:
        marks.popitem(last=False)


def _mark(request: GenerateRequest | EmbedRequest) -> bytes:
    """The same for all requests that ask the engine for the same work."""
    whoever = {"request_id": "", "trace_id": "", "client": "", "weight": 1.0}
    work = msgspec.structs.replace(request, runs_alone=False, **whoever)
    if isinstance(work, GenerateRequest):
        work = msgspec.structs.replace(work, priority=0)
    return hashlib.blake2b(msgspec.msgpack.encode(work), digest_size=16).digest()
