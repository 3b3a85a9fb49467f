"""Where the queries and the keys of one step lie: built once a step, read by every layer; and the cache."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch


@dataclasses.dataclass(slots=True)
class AttentionPlan:
    """B sequences; the queries of each are its last positions.

    Shapes: `cu_seqlens_q` int32 [B + 1], prefix sums of the query counts; `kv_lens` int32 [B],
    tokens in the cache with this step's included; `block_tables` int32 [B, max_blocks], block ids
    in order of position, of which the first ceil(kv_len / block_size) are read. Without `is_causal`
    queries see later keys, too.
    """

    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    block_tables: torch.Tensor
    is_causal: bool = True


class LayerCache(NamedTuple):
    """The keys and values of one layer: N blocks of S tokens.

    Shapes: `keys` [N, G, D, S] (transposed within a block, so that vector lanes run along tokens; on a GPU as
    values), `values` [N, G, S, D]; where these are codes of 8 bits, `scales` float32 [N, G, 2, S], of each
    token's key and value.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None = None
