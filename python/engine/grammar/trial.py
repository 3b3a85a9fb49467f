"""Whether a grammar that compiles can also be matched: a random answer, tried out under the clock."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np

from engine.grammar.errors import TakesTooMuch
from engine.grammar.string_masks import BoundsOfRules, StringPlace, StringTables
from engine.grammar.vocabulary import VocabularyData

MAX_FORCED_BYTES = 2**14
"""Text that a grammar may force at once; more would hold up a step, and no answer needs it."""

MAX_STEP_S = 0.1
"""CPU time that the grammar of one answer may take for a token."""

_NUM_TOKENS = 64


def try_out(
    bindings: Any,
    handle: Any,
    data: VocabularyData,
    strings: tuple[StringTables, BoundsOfRules] | None = None,
) -> None:
    """Raises: `TakesTooMuch` when the grammar forces endless text, or takes too long for a token."""
    stop_id = data.tokens.index(b"")
    matcher = bindings.GrammarMatcher(handle, [stop_id], False, -1, None)
    place = None if strings is None else StringPlace(*strings)
    own_mask = np.empty(-(-len(data.tokens) // 32), np.int32)
    draw = random.Random(0)
    for _ in range(_NUM_TOKENS):
        began_s = time.process_time()
        text = forced_text(matcher)
        if len(text) > MAX_FORCED_BYTES:
            raise TakesTooMuch(f"forces more than {MAX_FORCED_BYTES} bytes of text at once")
        matcher.accept_string(text, False)
        if place is not None:
            place.saw(text)
        mask = None if place is None else place.mask(matcher, own_mask)
        if mask is None:
            matcher.fill_next_token_bitmask(own_mask, 0, False)
            mask = own_mask
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        allowed = allowed[allowed != stop_id]
        if not len(allowed):
            return
        token_id = int(draw.choice(allowed))
        matcher.accept_token(token_id, False)
        if place is not None:
            place.saw(data.tokens[token_id])
        if time.process_time() - began_s > MAX_STEP_S:
            raise TakesTooMuch(f"takes more than {MAX_STEP_S * 1e3:g} ms to match a token")


def forced_text(matcher: Any) -> bytes:
    """The bytes that must come next. Raises nothing if they end within a character."""
    try:
        return matcher.find_jump_forward_string().encode()
    except UnicodeDecodeError as error:
        return error.object
