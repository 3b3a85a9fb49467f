"""What a request says about the thoughts of a model that thinks before it answers."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.errors import InvalidRequest
from engine.server.fields import Fields
from engine.text.chat_template import ChatTemplate

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_SWITCHES = ("enable_thinking", "thinking")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thoughts:
    """How much the model may think, and how that is shown."""

    separates: bool = True
    """Thoughts are a field of their own; else they stay in the content."""

    streams: bool = True
    """They are sent as they come; else in one piece."""

    budget: int | None = None
    """Most tokens of thoughts, the marks around them included."""

    effort: str | None = None


def read_thoughts(fields: Fields) -> Thoughts:
    """Raises `InvalidRequest` naming the field."""
    effort = fields.text("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        raise fields.fail("reasoning_effort", f"must be one of {', '.join(EFFORTS)}, got {effort!r:.40}")
    return Thoughts(
        separates=fields.boolean("separate_reasoning", default=True),
        streams=fields.boolean("stream_reasoning", default=True),
        budget=_budget(fields),
        effort=effort,
    )


def _budget(fields: Fields) -> int | None:
    """The first of its names that is set; both are checked."""
    found: int | None = None
    for name in ("thinking_budget", "thinking_token_budget"):
        budget = fields.integer(name)
        if budget is not None and budget < 0:
            raise fields.fail(name, f"must be non-negative, got {budget}")
        found = budget if found is None else found
    return found


def effort_variables(effort: str | None, template: ChatTemplate, given: dict[str, Any]) -> dict[str, Any]:
    """Variables of the template that mean this effort; what the request sets itself wins.

    Raises `InvalidRequest` if the template takes none.
    """
    if effort is None:
        return {}
    meant = {"reasoning_effort": effort, **dict.fromkeys(_SWITCHES, effort != "none")}
    known = {name: value for name, value in meant.items() if name in template.variables}
    if not known or (effort == "none" and known.keys() == {"reasoning_effort"}):
        raise InvalidRequest(
            f"reasoning_effort {effort} means nothing to this model: its chat template has no such choice",
            slug="unsupported_parameter",
            param="reasoning_effort",
        )
    return {name: value for name, value in known.items() if name not in given}
