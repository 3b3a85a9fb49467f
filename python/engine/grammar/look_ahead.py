"""What a constraint allows behind tokens that are only guessed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from engine.grammar.vocabulary import allows

if TYPE_CHECKING:
    from engine.grammar.matcher import AnyMatcher


def masks_behind(matcher: AnyMatcher, mask: np.ndarray, drafts: Iterable[int]) -> list[np.ndarray]:
    """Bitmasks, int32 [ceil(V / 32)], of what may come behind each draft, `mask` being that of the first.

    They end before a draft that is not allowed, or behind which the answer is over.
    The matcher is left where it was.
    """
    before = matcher.state()
    masks = []
    for token_id in drafts:
        if not allows(mask, np.array([token_id])):
            break
        matcher.take(token_id)
        if matcher.is_over:
            break
        mask = matcher.mask(np.empty_like(mask)).copy()
        masks.append(mask)
    matcher.go_back(before)
    return masks
