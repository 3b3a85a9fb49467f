"""Where thoughts are: what is shown of them, what is counted, and what is bounded agree on any tokens."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.messages import TokenChunk
from engine.core.output_processor import OutputProcessor
from engine.grammar.channel_budget import BoundedThoughts
from engine.grammar.look_ahead import masks_behind
from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.thinking import ThinkingMatcher
from engine.grammar.vocabulary import VocabularyData
from engine.sampling.constraint import Constraint, Thinking, ThoughtMessages
from engine.sampling.params import SamplingParams
from engine.server.channel_constraint import answer_in_messages
from engine.server.choice_reader import ChoiceReader
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.formats.events import Reasoning
from engine.text.formats.harmony import CHANNELS, MARKERS
from engine.text.formats.known import THOUGHT_FORMATS
from engine.text.formats.output import OutputFormat
from engine.text.formats.tag_tokens import TagIds
from engine.text.tokenizer import Tokenizer
from helpers.grammars import Grammars
from helpers.outputs import Found, fold
from helpers.tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

TAGGED = ("qwen3", "deepseek-r1", "mistral")
BLANKS = ("", " ", "\n", "\n\n", "\t", "  ")
ANSWERS = (
    *("[a-c ]{2,5}!", r"\n{0,2}(yes|no)", r"\s?x?", " ok", r"\n\n"),
    *("TAG", r"\n?TAG{1,2}(yes|no)", "( |TAG)x"),
)
"""Some of which begin with what may come before thoughts, or with the TAG that begins them."""

PAD = "<|pad|>"
SPACE = " \t\n\r\v\f"
END_ID, CHANNELS_END_ID = 1, 0


@dataclasses.dataclass(frozen=True)
class Model:
    """A vocabulary with tags, and how its outputs are read; `fragments` are what outputs are made of."""

    name: str
    tokenizer: Tokenizer
    tags: TagIds
    grammars: Grammars
    fragments: Sequence[Sequence[int]]
    prompt: Sequence[int]

    def format(self, *, is_open: bool, is_constrained: bool) -> OutputFormat:
        hidden = self.tokenizer.special_ids - {self.tags.start, self.tags.end}
        return OutputFormat(
            thoughts=THOUGHT_FORMATS[self.name],
            starts_thinking=is_open,
            tags=self.tags._replace(blank=self.tags.blank | hidden),
            keeps_space=is_constrained,
        )

    def read(
        self, output_format: OutputFormat, ids: Sequence[int], cuts: random.Random, *, is_cut: bool = False
    ) -> tuple[Found, int]:
        """What a client is given of an output that comes in chunks, and its number of tokens of thoughts."""
        shown = output_format.special_ids(self.tokenizer)
        tag_ids = frozenset((self.tags.start, self.tags.end))
        processor = OutputProcessor(self.tokenizer, SamplingParams(), self.prompt, 1, None, shown, tag_ids)
        reader, events, num_thoughts, at = ChoiceReader(output_format, self.tokenizer), [], 0, 0
        while at < len(ids) or not ids:
            part = list(ids[at : at + cuts.choice([1, 1, 2, 5, 100])])
            at += len(part)
            is_last = at >= len(ids)
            reason = ("length" if is_cut else "stop") if is_last else None
            delta = processor.process(TokenChunk("r", 0, part, None, 0, reason, None))
            assert delta is not None
            num_thoughts += reader.read(delta)
            events += delta.events or []
            if is_last:
                break
        return fold(events), num_thoughts

    def text(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Of a part of an output, between or beside its tags."""
        shown = frozenset((self.tags.start, self.tags.end))
        detokenizer = IncrementalDetokenizer.after_prompt(
            self.tokenizer, [*self.prompt, *after], shown_ids=shown
        )
        return detokenizer.push(ids) + detokenizer.finish()


@functools.cache
def model_of(name: str, *, is_byte_level: bool) -> Model:
    backend = byte_level_tokenizer() if is_byte_level else sentencepiece_tokenizer()
    tags = THOUGHT_FORMATS[name]
    add = backend.add_special_tokens if name == "mistral" else backend.add_tokens
    add([tags.start, tags.end])
    backend.add_special_tokens([PAD])
    tokenizer = Tokenizer(backend, special_tokens={}, bos_token_id=None, eos_token_ids=[1], chat_templates={})
    marks = tags.marks(tokenizer)
    assert marks is not None
    data = VocabularyData.from_tokenizer(tokenizer, tokenizer.vocab_size + 3)
    blank = tokenizer.blank_ids(tokenizer.vocab_size + 3)
    plain = byte_level_tokenizer() if is_byte_level else sentencepiece_tokenizer()  # spells tags out

    def encode(text: str) -> list[int]:
        return plain.encode(text, add_special_tokens=False).ids

    beyond = tokenizer.vocab_size + 1
    pad = tokenizer.token_id(PAD)
    assert beyond in blank and not blank.intersection(marks)
    fragments = [
        *([mark] for mark in marks),
        *(encode(text) for text in (tags.start, tags.end, *BLANKS, "a", "Hm.", "é🙂", "\u00a0", "\u2003x")),
        *(encode("🙂")[:k] for k in (1, 2)),
        encode(tags.start)[:-1],
        [pad],
        [beyond],
        [END_ID],
    ]
    return Model(
        name, tokenizer, TagIds(*marks, blank), Grammars(data), [f for f in fragments if f], encode("a")
    )


def parts(model: Model, ids: Sequence[int], *, is_open: bool) -> tuple[list[int], list[int], int]:
    """Tokens of thoughts without their tags, those behind, and how many belong to the thoughts; plainly."""
    start, end, _ = model.tags
    begin = 0
    if not is_open:
        while begin < len(ids) and ids[begin] != start and not model.text([ids[begin]]).strip(SPACE):
            begin += 1
        if begin == len(ids) or ids[begin] != start:
            return [], list(ids), 0
        begin += 1
    rest = list(ids[begin:])
    at = rest.index(end) if end in rest else len(rest)
    return rest[:at], rest[at + 1 :], at + 1 - (end not in rest) + (not is_open)


MODELS = st.builds(model_of, st.sampled_from(TAGGED), is_byte_level=st.booleans())


@settings(max_examples=300, deadline=None)
@given(model=MODELS, seed=st.integers(0, 10**9), is_open=st.booleans())
def test_the_reader_and_the_bound_see_the_same_thoughts(model: Model, seed: int, is_open: bool) -> None:
    draw = random.Random(seed)
    ids = [i for _ in range(draw.randrange(12)) for i in draw.choice(model.fragments)]
    if draw.random() < 0.5:
        ids = [*draw.choice([*blank_fragments(model), []]), model.tags.start, *ids]
    thoughts, rest, num_thoughts = parts(model, ids, is_open=is_open)
    output_format = model.format(is_open=is_open, is_constrained=False)
    found, num_counted = model.read(output_format, ids, draw)
    assert num_counted == num_thoughts
    if thoughts[:1] == [model.tags.start] or (is_open and repeats_tag(model, thoughts)):
        return  # it repeats the tag of the prompt, which is left out
    if num_thoughts:
        assert found.reasoning == model.text(thoughts).strip()
        assert found.content.strip() == model.text(rest, after=ids[: len(ids) - len(rest)]).strip()
    else:
        assert not found.reasoning and found.content.strip() == model.text(rest).strip()

    # The bound: as many tokens are thoughts until it is used up, whatever comes before them.
    tags = output_format.tags
    assert tags is not None
    blank = np.array(sorted(tags.blank), "<i4").tobytes()
    budget = draw.randrange(1, 12)
    thinking = Thinking((tags.end,), None if is_open else tags.start, budget, (tags.end,), blank)
    matcher, written = ThinkingMatcher(thinking, None), []
    mask = np.empty(-(-(model.tokenizer.vocab_size + 3) // 32), np.int32)
    for token_id in ids:
        while matcher.forced:
            written.append(matcher.forced.popleft())
        mask = matcher.mask(mask).copy()
        if not mask[token_id >> 5] >> (token_id & 31) & 1:
            break
        matcher.take(token_id)
        written.append(token_id)
    assert model.read(output_format, written, draw)[1] <= budget
    if num_thoughts <= budget and written == ids:
        assert model.read(output_format, written, draw)[1] == num_thoughts


def blank_fragments(model: Model) -> list[Sequence[int]]:
    marks = set(model.tags[:2])
    return [f for f in model.fragments if not marks.intersection(f) and not model.text(f).strip(SPACE)]


def repeats_tag(model: Model, thoughts: Sequence[int]) -> bool:
    return model.text(thoughts).lstrip().startswith(THOUGHT_FORMATS[model.name].start)


def drawn(
    matcher: ThinkingMatcher | BoundedThoughts,
    num_ids: int,
    draw: random.Random,
    liked: Sequence[int],
    end_id: int = END_ID,
) -> list[int]:
    """An output that the masks allow, often of `liked` tokens; guesses ahead of it leave no trace."""
    mask, written = np.empty(-(-num_ids // 32), np.int32), []
    while len(written) < 150:
        while matcher.forced:
            written.append(matcher.forced.popleft())
        if matcher.is_over:
            return written
        mask = matcher.mask(mask).copy()
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:num_ids])
        wanted = [i for i in liked if i in allowed]
        token_id = int(draw.choice(wanted if wanted and draw.random() < 0.5 else allowed))
        before = matcher.state()
        masks_behind(matcher, mask, [token_id, *draw.choices([*liked, *range(num_ids)], k=3)])
        assert matcher.state() == before
        matcher.take(token_id)
        written.append(token_id)
        if token_id == end_id and matcher.is_over:
            break
    return written


@settings(max_examples=150, deadline=None)
@given(
    model=MODELS,
    seed=st.integers(0, 10**9),
    is_open=st.booleans(),
    regex=st.sampled_from(ANSWERS),
    budget=st.sampled_from([None, 0, 1, 2, 5, 20]),
)
def test_a_constraint_begins_behind_the_thoughts(
    model: Model, seed: int, is_open: bool, regex: str, budget: int | None
) -> None:
    draw = random.Random(seed)
    output_format = model.format(is_open=is_open, is_constrained=True)
    tags = output_format.tags
    assert tags is not None
    blank = np.array(sorted(tags.blank), "<i4").tobytes()
    thinking = Thinking((tags.end,), None if is_open else tags.start, budget, (tags.end,), blank)
    regex = regex.replace("TAG", f"({re.escape(THOUGHT_FORMATS[model.name].start)})")
    grammar = model.grammars.compile("regex", regex)
    spelled = grammar.vocabulary.spelled(tags.start)
    matcher = ThinkingMatcher(thinking, lambda: ConstraintMatcher(grammar, [END_ID]), spelled)
    liked = [tags.start, tags.end, END_ID, *(i for f in blank_fragments(model) for i in f)]
    ids = drawn(matcher, model.tokenizer.vocab_size + 3, draw, liked)
    found, num_thoughts = model.read(output_format, ids, draw, is_cut=not matcher.is_over)
    thoughts, rest, num_wanted = parts(model, ids, is_open=is_open)
    assert num_thoughts == num_wanted
    assert budget is None or num_thoughts <= max(budget, is_open)
    if matcher.is_over:
        assert re.fullmatch(regex, found.content), "to the last space"
        assert found.content == model.text(rest, after=ids[: len(ids) - len(rest)])


# --- messages


@functools.cache
def channel_model() -> tuple[Tokenizer, Grammars]:
    backend = byte_level_tokenizer()
    backend.add_special_tokens(list(MARKERS))
    tokenizer = Tokenizer(backend, special_tokens={}, bos_token_id=None, eos_token_ids=[0], chat_templates={})
    return tokenizer, Grammars(VocabularyData.from_tokenizer(tokenizer, tokenizer.vocab_size))


@pytest.mark.parametrize("answer", [None, Constraint("regex", r"\n? ?(yes|no)")])
@pytest.mark.parametrize("budget", [0, 4, 9, 30])
@pytest.mark.parametrize("seed", range(6))
def test_messages(answer: Constraint | None, budget: int, seed: int) -> None:
    tokenizer, grammars = channel_model()
    marks, draw = CHANNELS.marks(tokenizer), random.Random(seed)
    assert marks is not None
    grammar = grammars.compile("structural_tag", answer_in_messages(answer, "x").text)
    bounds = ThoughtMessages(*marks, budget)
    matcher = BoundedThoughts(bounds, ConstraintMatcher(grammar, [CHANNELS_END_ID]), grammars.vocabulary)
    liked = [*marks, CHANNELS_END_ID, *tokenizer.encode(" analysis", add_special_tokens=False)]
    ids = drawn(matcher, tokenizer.vocab_size, draw, liked, CHANNELS_END_ID)
    output_format = OutputFormat(
        thoughts=CHANNELS, ends_with_answer=answer is not None, keeps_space=answer is not None
    )
    processor = OutputProcessor(
        tokenizer, SamplingParams(), [0], 1, None, output_format.special_ids(tokenizer)
    )
    reader = ChoiceReader(output_format, tokenizer)
    delta = processor.process(TokenChunk("r", 0, ids, None, 0, "stop" if matcher.is_over else "length", None))
    assert delta is not None
    assert reader.read(delta) <= budget
    thoughts = "".join(event.text for event in delta.events or [] if isinstance(event, Reasoning))
    assert budget >= 4 or not thoughts, "there is no room for a message of thoughts"
    if matcher.is_over and answer is not None:
        assert re.fullmatch(answer.text, fold(delta.events or []).content)
