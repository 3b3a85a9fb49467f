"""Tokens that only the device knows yet, where the next step needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.scheduling.request import Request
from engine.scheduling.step_plan import Draw


class LateIds(NamedTuple):
    """Places of a list of token ids whose values are on the device already, and where among `drawn`.

    Shapes: `places` and `rows` int64 [F], on the host; `drawn` int32 [R] on the device.
    """

    places: np.ndarray
    rows: np.ndarray
    drawn: torch.Tensor

    def put(self, token_ids: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Fill them in, given both arrays on the device.

        Where no token was possible the id is -1, and the request about to fail: any token will do there.
        """
        token_ids.index_copy_(0, places, self.drawn.index_select(0, rows).clamp_(min=0))


class DrawnIds:
    """What the last step drew, kept on the device for the step that is launched behind it."""

    def __init__(self) -> None:
        self._rows: dict[Request, int] = {}
        self._ids: torch.Tensor | None = None

    def keep(self, draws: Sequence[Draw], ids: torch.Tensor) -> None:
        self._rows = {draw.request: row for row, draw in enumerate(draws)}
        self._ids = ids

    def late(self, requests: Sequence[Request], places: Sequence[int] | np.ndarray) -> LateIds | None:
        """The ids that were drawn for these requests, for places of their own; None where there are none."""
        if not len(requests):
            return None
        assert self._ids is not None
        rows = np.array([self._rows[request] for request in requests], np.int64)
        return LateIds(np.array(places, np.int64), rows, self._ids)
