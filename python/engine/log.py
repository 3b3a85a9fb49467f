"""Set up logging, once a process; everything else calls `logging.getLogger(__name__)`."""

from __future__ import annotations

import logging
import sys

LEVELS = ("debug", "info", "warning", "error")


def request_name(request_id: str, trace_id: str) -> str:
    """A request in a line of a log: its own id, and the one under which the client knows it."""
    return f"{request_id} (x-request-id {trace_id})" if trace_id else request_id


def set_up_logging(level: str) -> None:
    """Send records of this package to standard error at `level`, those of libraries from WARNING up.

    Effects: replaces the handlers of the root logger.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("engine").setLevel(level.upper())
    # Lines about requests are for programs: JSON and nothing else.
    requests, plain = logging.getLogger("engine.requests"), logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    requests.handlers, requests.propagate = [plain], False
    # A body where none is wanted is a client's mistake, and no reason for a line each.
    logging.getLogger("sanic.error").addFilter(lambda record: "body not consumed" not in record.getMessage())
