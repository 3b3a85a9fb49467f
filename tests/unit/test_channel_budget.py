"""Thoughts that are messages within an answer: their order, and how many tokens they may take."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.grammar.channel_budget import BoundedThoughts
from engine.grammar.look_ahead import masks_behind
from engine.grammar.matcher import ConstraintMatcher, MatcherBatch
from engine.grammar.vocabulary import VocabularyData
from engine.sampling.constraint import Constraint, ThoughtMessages
from engine.server.channel_constraint import answer_in_messages
from engine.server.tool_constraint import tool_constraint
from engine.server.tools import Function, ToolUse
from engine.text.formats.harmony import HARMONY, MARKERS
from helpers.grammars import Grammars
from helpers.http_server import write_model
from helpers.outputs import format_named, read
from helpers.server_process import LLAMA

WORDS = [*MARKERS, "analysis", "ana", "comment", "ary", "final", "assistant", " to", "add", "<|", "|>", "end"]
TOKENS = [bytes([i]) for i in range(256)] + [word.encode() for word in WORDS] + [b""]
ID = {token: i for i, token in reversed(list(enumerate(TOKENS)))}
CHANNEL, END = ID[b"<|channel|>"], ID[b"<|end|>"]
OPENING, LAST = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
FINAL = "<|channel|>final<|message|>"
REMARK = "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant"


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    order = sorted((i for i, token in enumerate(TOKENS) if token), key=TOKENS.__getitem__)
    return Grammars(VocabularyData(TOKENS, np.array(order, "<i4").tobytes(), len(TOKENS) - 1))


def tools_of(choice: str) -> ToolUse:
    function = Function(name="add", description=None, parameters=ADD, is_strict=True)
    return ToolUse(
        offered=(function,), callable=(function,), is_required=choice == "required", is_parallel=False
    )


def constraint_of(kind: str) -> Constraint:
    answer = Constraint("regex", "yes|no")
    match kind:
        case "auto" | "required":
            return tool_constraint(HARMONY, tools_of(kind), None)
        case "auto or regex":
            return tool_constraint(HARMONY, tools_of("auto"), answer)
        case "regex":
            return answer_in_messages(answer, "regex")
        case _:
            return answer_in_messages(None, "thinking_budget")


KINDS = ("auto", "required", "auto or regex", "regex", "free")


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (FINAL + "Anything", {"auto", "free"}),
        (FINAL + "yes", {"auto", "free", "auto or regex", "regex"}),
        (f"{OPENING}Hm.{LAST}{FINAL}no", {"auto", "free", "auto or regex", "regex"}),
        (f"{OPENING}Hm.{LAST}{OPENING}Hm?{LAST}{CALL}", {"auto", "required", "auto or regex"}),
        (CALL, {"auto", "required", "auto or regex"}),
        (REMARK + CALL, {"auto"}),
        (REMARK + FINAL + "yes", {"auto", "free"}),
        (f"{OPENING}Hm.<|en{LAST}{FINAL}no", {"auto", "free", "auto or regex", "regex"}),
        ("yes", set()),
        (OPENING + "Hm.", set()),
        (f"{OPENING}Hm.<|end|>{FINAL}yes", set()),
        (f"{OPENING}Hm.<|channel|>x{LAST}{FINAL}yes", set()),
        (f"{FINAL}yes{LAST}{CALL}", set()),
        ("<|channel|>final <|constrain|>json<|message|>yes", set()),
        (CALL.replace("add", "sub"), set()),
        (CALL.replace("1", '"1"'), set()),
        (CALL.replace("commentary", "analysis"), set()),
        (" to=functions.add<|channel|>commentary json<|message|>{}", set()),
    ],
)
def test_messages_come_in_their_order(grammars: Grammars, text: str, kinds: set[str]) -> None:
    found = {
        kind
        for kind in KINDS
        if grammars.accepts(grammars.compile("structural_tag", constraint_of(kind).text), text)
    }
    assert found == kinds


def drawn(grammars: Grammars, kind: str, budget: int, seed: int, end_share: float) -> list[int]:
    """An answer drawn by chance, forced tokens at once; checks what is guessed ahead on the way."""
    grammar = grammars.compile("structural_tag", constraint_of(kind).text)
    thoughts = ThoughtMessages(channel=CHANNEL, end=END, budget=budget)
    answer = ConstraintMatcher(grammar, [grammars.end_id])
    matcher = BoundedThoughts(thoughts, answer, grammars.vocabulary)
    batch, draw = MatcherBatch(1, len(TOKENS)), random.Random(seed)
    token_ids: list[int] = []
    while not matcher.is_over and len(token_ids) < 300:
        while matcher.forced:
            token_ids.append(matcher.forced.popleft())
        if matcher.is_over:
            break
        masks = batch.fill([matcher])
        assert masks is not None
        mask = masks[0].copy()
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(TOKENS)])
        token_id = int(draw.choice(allowed))
        if draw.random() < end_share:
            token_id = next((i for i in (grammars.end_id, END) if i in allowed), token_id)
        before = matcher.state()
        masks_behind(matcher, mask, [token_id, *draw.choices(range(len(TOKENS)), k=2)])
        assert matcher.state() == before
        batch.advance([matcher], [token_id])
        token_ids.append(token_id)
    return token_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end_share", [0.0, 0.3])
def test_thoughts_never_take_more_than_their_budget(grammars: Grammars, kind: str, end_share: float) -> None:
    most = 0
    for seed in range(30):
        budget = seed if seed < 20 else 10 * seed
        token_ids = drawn(grammars, kind, budget, seed, end_share)
        num_thoughts = is_thought = 0
        for before, token_id in zip([-1, *token_ids], [*token_ids, -1], strict=True):
            if before == CHANNEL:
                is_thought = TOKENS[token_id][:1] == b"a"
                num_thoughts += is_thought
            if token_id == CHANNEL:
                is_thought = False
            num_thoughts += is_thought
            if token_id == END:
                is_thought = False
        assert num_thoughts <= budget
        most = max(most, num_thoughts)
        if budget < 4:
            assert OPENING[:-11].encode() not in b"".join(TOKENS[i] for i in token_ids)
        if token_ids[-1] == grammars.end_id and kind in ("required", "regex"):
            text = b"".join(TOKENS[i] for i in token_ids).decode(errors="replace")
            found = read(format_named("gpt-oss", "gpt-oss", ends_with_answer=True), [text])
            assert found.calls if kind == "required" else found.content in ("yes", "no")
    assert most > 10


def test_a_budget_is_used_to_its_last_token(grammars: Grammars) -> None:
    for budget in range(4, 40, 5):
        answers = (drawn(grammars, "required", budget, seed, 0.0) for seed in range(20))
        assert any(END in ids and ids.index(END) == budget - 1 for ids in answers)


def test_both_ways_of_forcing_give_the_same_answers(tmp_path: Path) -> None:
    path = write_model(tmp_path, special=MARKERS)
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    (path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": vocab_size}))
    answers = []
    for steps in (True, False):
        with LLM(str(path), load_format="dummy", disable_jump_forward=steps, debug_checks=True) as llm:
            (channel,), (end,) = (llm.tokenizer.encode(mark) for mark in ("<|channel|>", "<|end|>"))
            params = [
                SamplingParams(
                    max_tokens=90,
                    seed=budget,
                    logprobs=2,
                    constraint=constraint_of(kind),
                    thinking=ThoughtMessages(channel=channel, end=end, budget=budget),
                )
                for kind in KINDS
                for budget in (0, 11, 12, 25, 40)
            ]
            outputs = llm.generate(["Go on"] * len(params), params, use_tqdm=False)
            answers.append([output.outputs[0] for output in outputs])
    for one_by_one, at_once in zip(*answers, strict=True):
        assert one_by_one.token_ids == at_once.token_ids
        assert one_by_one.logprobs == at_once.logprobs
        assert one_by_one.finish_reason == at_once.finish_reason
    assert any(end in answer.token_ids for answer in answers[0])
