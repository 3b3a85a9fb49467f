"""The text side of a request against its definition: decode everything, cut at the first stop."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.messages import TokenChunk, TokenLogprobs
from engine.core.output_processor import OutputProcessor, TextDelta
from engine.sampling.params import SamplingParams
from engine.server.prompt_scores import token_offsets
from engine.text.tokenizer import Tokenizer
from helpers.tokenizers import byte_level_tokenizer

TOKENIZER = Tokenizer(
    byte_level_tokenizer(), special_tokens={}, bos_token_id=0, eos_token_ids=[1], chat_templates={}
)
EOS = 1
TEXT = st.text(st.sampled_from("ab é🙂\n"), max_size=20)


def score(position: int) -> TokenLogprobs:
    return TokenLogprobs(-float(position), [], [])


def run(ids: list[int], params: SamplingParams, sizes: list[int], *, ends: bool) -> list[TextDelta]:
    """Feed ids in chunks of the given sizes; `ends`: the model's end token comes last."""
    processor = OutputProcessor(TOKENIZER, params, [0], 1)
    ids = [*ids, EOS] if ends else ids
    deltas, position = [], 0
    while position < len(ids) or not ids:
        size = sizes.pop() if sizes else 1
        part = ids[position : position + size]
        scores = [score(position + i) for i in range(len(part))] if params.logprobs is not None else None
        position += len(part)
        is_last = position == len(ids)
        reason = ("stop" if ends else "length") if is_last else None
        chunk = TokenChunk("r", 0, part, scores, 0, reason, EOS if reason == "stop" else None)
        delta = processor.process(chunk)
        if delta is not None:
            deltas.append(delta)
        if is_last:
            break
    return deltas


@settings(max_examples=150, deadline=None)
@given(
    text=TEXT,
    stops=st.lists(st.text(st.sampled_from("ab é🙂"), min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 4), max_size=10),
    include_stop=st.booleans(),
    ends=st.booleans(),
)
def test_text_is_what_comes_before_the_first_stop(
    text: str, stops: list[str], sizes: list[int], include_stop: bool, ends: bool
) -> None:
    params = SamplingParams(stop=tuple(stops), include_stop=include_stop)
    deltas = run(TOKENIZER.encode(text), params, sizes, ends=ends)
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    got = "".join(delta.text for delta in deltas)
    if found:
        start, _, stop = min(found)
        assert got == text[: start + len(stop) if include_stop else start]
        assert (deltas[-1].finish_reason, deltas[-1].matched_stop) == ("stop", stop)
    else:
        assert got == text
        assert deltas[-1].finish_reason == ("stop" if ends else "length")
        assert deltas[-1].matched_stop == (EOS if ends else None)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


@settings(max_examples=150, deadline=None)
@given(
    text=TEXT,
    stops=st.lists(st.sampled_from(["ab", "é", "b🙂"]), max_size=2),
    sizes=st.lists(st.integers(1, 4)),
)
def test_scored_tokens_come_once_in_order_and_never_before_their_text(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    ids = TOKENIZER.encode(text)
    params = SamplingParams(stop=tuple(stops), logprobs=0)
    deltas = run(ids, params, sizes, ends=True)
    tokens = [token for delta in deltas for token in delta.tokens]
    assert [(token_id, -scores.token_logprob) for token_id, scores in tokens] == list(
        zip(ids, range(len(tokens)), strict=False)
    )
    spelled = given_out = ""
    for delta in deltas:
        given_out += delta.text
        spelled = b"".join(
            TOKENIZER.token_bytes(t) for d in deltas[: deltas.index(delta) + 1] for t, _ in d.tokens
        ).decode(errors="ignore")
        if delta is not deltas[-1]:
            assert given_out.startswith(spelled)
    # Together the tokens spell the text; where a stop string cuts a token in two, it counts whole.
    assert spelled.startswith(given_out)
    if deltas[-1].matched_stop == EOS:
        assert spelled == given_out == text


def character_at(data: bytes, position: int) -> int:
    """Which character of the text that `data` decodes to has the byte at `position`."""
    index = begin = 0
    while begin < len(data):
        try:
            rest = data[begin:].decode()
            widths = [len(character.encode()) for character in rest]
        except UnicodeDecodeError as error:
            whole = data[begin : begin + error.start].decode()
            widths = [*(len(character.encode()) for character in whole), error.end - error.start]
        for width in widths:
            if position < begin + width:
                return index
            index, begin = index + 1, begin + width
    return index


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.sampled_from(TOKENIZER.encode("b🙂é€ ab")), max_size=12),
    sizes=st.lists(st.integers(1, 4)),
)
def test_tokens_start_at_their_own_character_behind_broken_ones_too(ids: list[int], sizes: list[int]) -> None:
    deltas = run(ids, SamplingParams(logprobs=0), sizes, ends=True)
    pieces = [TOKENIZER.token_bytes(token_id) for token_id in ids]
    data = b"".join(pieces)
    wanted = [character_at(data, len(b"".join(pieces[:i]))) for i in range(len(ids))]
    assert [start for delta in deltas for start in delta.token_starts] == wanted
    text = data.decode(errors="replace")
    assert "".join(delta.text for delta in deltas) == text
    assert token_offsets(TOKENIZER, ids, text) == wanted


def test_a_stop_behind_a_broken_character_takes_its_own_token_only() -> None:
    lead, second, *_ = TOKENIZER.encode("🙂")
    (b,) = TOKENIZER.encode("b")
    deltas = run([lead, second, b], SamplingParams(logprobs=0, stop=("b",)), [3], ends=False)
    assert [(delta.text, [token_id for token_id, _ in delta.tokens]) for delta in deltas] == [
        ("\ufffd", [lead, second])
    ]


def test_a_choice_that_is_complete_ignores_later_chunks() -> None:
    processor = OutputProcessor(TOKENIZER, SamplingParams(stop=("b",)), [0], 2)
    ids = TOKENIZER.encode("ab")
    assert processor.process(TokenChunk("r", 0, ids)).finish_reason == "stop"
    assert processor.process(TokenChunk("r", 0, ids)) is None
    assert processor.process(TokenChunk("r", 1, TOKENIZER.encode("a"))).text == "a"


def test_an_empty_answer_ends() -> None:
    (delta,) = run([], SamplingParams(max_tokens=0), [], ends=False)
    assert (delta.text, delta.num_tokens, delta.finish_reason) == ("", 0, "length")


def test_num_tokens_counts_the_end_token() -> None:
    ids = TOKENIZER.encode("ab ab")
    assert sum(delta.num_tokens for delta in run(ids, SamplingParams(), [], ends=True)) == len(ids) + 1


def test_one_token_without_anything_to_look_for_keeps_all_that_its_chunk_says():
    processor = OutputProcessor(TOKENIZER, SamplingParams(), [0], 1)
    ids = TOKENIZER.encode("ab")
    delta = processor.process(TokenChunk("r", 0, ids[:1], prompt_logprobs=[score(1)]))
    assert delta == TextDelta("a", (), 1, token_ids=ids[:1], prompt_logprobs=[score(1)])
    last = processor.process(TokenChunk("r", 0, ids[1:], finish_reason="length"))
    assert last is not None and (last.text, last.finish_reason) == ("b", "length")
    assert processor.process(TokenChunk("r", 0, ids[:1])) is None, "it is complete"
