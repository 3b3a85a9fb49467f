"""Where the queries and the keys of one step lie: built once a step, read by every layer."""

from __future__ import annotations

import dataclasses

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
