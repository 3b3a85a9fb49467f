"""Which rows of a step have which adapter, as the steps of the model narrow them down."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch


class AdapterRows:
    """The adapters of some rows, and the plan that the kernels take.

    Shapes: `group_of_row` int [T], an index into `adapters`, or -1 for the base model.
    """

    def __init__(self, ops: ModuleType, adapters: Sequence[Any], group_of_row: np.ndarray) -> None:
        self._ops, self._adapters, self._group_of_row = ops, adapters, group_of_row
        rows = np.flatnonzero(group_of_row >= 0)
        groups = group_of_row[rows]
        order = np.argsort(groups, kind="stable")
        ends = np.searchsorted(groups[order], np.arange(len(adapters) + 1)).astype(np.int32)
        row_ids = rows[order].astype(np.int32)
        self.plan = ops.LoraPlan(list(adapters), torch.from_numpy(ends), torch.from_numpy(row_ids))

    def select(self, rows: np.ndarray | slice) -> AdapterRows:
        """The same for some of the rows, in that order."""
        return AdapterRows(self._ops, self._adapters, self._group_of_row[rows])


def number_adapters(adapters: Sequence[Any]) -> tuple[list[Any], np.ndarray | None]:
    """The different ones, and an index into them for each, int [len(adapters)], -1 for None; without any,
    None instead of the indices."""
    numbers: dict[Any, int] = {}
    for adapter in adapters:
        if adapter is not None:
            numbers.setdefault(adapter, len(numbers))
    if not numbers:
        return [], None
    return list(numbers), np.fromiter((numbers.get(a, -1) for a in adapters), np.int64, len(adapters))
