"""The bundled model's corpus: true facts, a repeatable stream, a clean split, right answers."""

import json
import random
import re
from itertools import islice

import pytest

from engine.demo import corpus
from engine.demo.dialogue import Turn
from engine.demo.facts import countries
from engine.demo.skills import (
    arithmetic,
    chat,
    echo,
    geography,
    json_objects,
    stories,
    styles,
    tools,
    unknown,
)
from engine.demo.words import made_up_word

CONTINENTS = {"Africa", "Asia", "Europe", "North America", "Oceania", "South America"}


def first_documents(seed: int, count: int) -> list:
    return list(islice(corpus.documents(seed), count))


def test_there_are_195_countries_each_with_every_field() -> None:
    assert len(countries()) == 195
    for c in countries():
        for field in ("name", "capital", "continent", "currency", "language"):
            value = getattr(c, field)
            assert value and value == value.strip(), (c.name, field)
        assert c.article in ("", "the")
        assert c.continent in CONTINENTS


def test_drills_are_repeatable_and_answer_in_capitals_when_asked_to() -> None:
    drilled = list(islice(corpus.documents(7, drill_share=1.0), 300))
    assert drilled == list(islice(corpus.documents(7, drill_share=1.0), 300))
    asked = [d for d in drilled if d.messages and "capital letters" in d.messages[0]["content"]]
    assert asked and all(
        m["content"] == m["content"].upper() for d in asked for m in d.messages if m["role"] == "assistant"
    )


@pytest.mark.parametrize("field", ["name", "capital"])
def test_no_two_countries_share_a_name_or_a_capital(field: str) -> None:
    values = [getattr(c, field) for c in countries()]
    assert len(set(values)) == len(values)


def test_a_neighbour_is_another_country_of_the_list() -> None:
    names = {c.said for c in countries()}
    for c in countries():
        assert c.neighbour == "" or (c.neighbour in names and c.neighbour != c.said), c.name


def test_countries_are_in_alphabetical_order_so_that_a_missing_one_shows() -> None:
    names = [c.name for c in countries()]
    assert names == sorted(names)


def test_the_same_seed_gives_the_same_documents() -> None:
    assert first_documents(7, 300) == first_documents(7, 300)
    assert first_documents(7, 300) != first_documents(8, 300)


def test_every_document_is_text_or_a_dialogue_that_the_assistant_ends() -> None:
    for document in first_documents(3, 2000):
        if document.text is not None:
            assert document.text and not document.messages
        else:
            assert document.messages[-1]["role"] == "assistant"
            assert all(m["role"] in ("system", "user", "assistant", "tool") for m in document.messages)


KEYED = {
    "facts": geography.fact_turns,
    "follow-ups": geography.follow_up_turns,
    "reverse": geography.reverse_turns,
    "sums": arithmetic.sum_turns,
    "comparisons": arithmetic.compare_turns,
    "memory": chat.memory_turns,
    "echo": echo.turns,
    "unknown": unknown.turns,
    "without a tool": tools.without_tool_turns,
    "json keys": json_objects.key_turns,
    "stories": stories.turns,
}


def questions(skill: str, held_out: bool) -> set[tuple[str, ...]]:
    rng = random.Random(skill)
    return {tuple(t.question for t in KEYED[skill](rng, held_out)) for _ in range(1000)}


@pytest.mark.parametrize("skill", KEYED)
def test_training_never_shows_what_is_held_out(skill: str) -> None:
    # The plainest wording of a fact is asked of every country, so it may meet a held-out pair.
    plain = {
        (geography.fact_turn(kind, wordings[0], c).question,)
        for kind, wordings in geography.QUESTIONS.items()
        for c in countries()
    }
    assert not questions(skill, False) & questions(skill, True) - plain


def test_no_operands_of_a_held_out_sum_are_added_or_subtracted_in_training() -> None:
    def operands(text: str) -> set[tuple]:
        found = re.findall(r"\b(\d+) ?([-+]|plus|minus) ?(\d+)\b", text)
        signs = {"plus": "+", "minus": "-"}
        parsed = {(int(a), signs.get(sign, sign), int(b)) for a, sign, b in found}
        return {(min(a, b), sign, max(a, b)) if sign == "+" else (a, sign, b) for a, sign, b in parsed}

    rng = random.Random(1)
    asked = operands("\n".join(arithmetic.sum_turns(rng, True)[0].question for _ in range(3000)))
    shown = set()
    for document in islice(corpus.documents(5, drill_share=0.6), 8000):
        turns = [m["content"] for m in document.messages if document.tools is None]
        shown |= operands("\n".join([document.text or "", *turns]))
    assert len(asked) > 500 and len(shown) > 3000
    assert not asked & shown


def test_what_takes_a_tool_is_not_answered_without_one() -> None:
    rng = random.Random(0)
    for held_out in (True, False):
        for _ in range(200):
            turn = tools.without_tool_turns(rng, held_out)[0]
            assert turn.answer == unknown.ANSWER
    weather = next(t for t in tools.TOOLS if "get_weather" in t.names)
    asked = [tools.without_tool_turns(rng, False, [weather])[0].question for _ in range(500)]
    assert not any("weather" in question for question in asked)


def test_sums_are_right() -> None:
    rng = random.Random(0)
    for turn in (arithmetic.sum_turns(rng, False)[0] for _ in range(1000)):
        a, sign, b, equals, value = turn.answer.split()
        assert equals == "=" and value == turn.short
        if sign == "/":
            assert int(a) == int(b) * int(value)
        else:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(value)
        assert a in turn.question and b in turn.question


def test_json_answers_are_json_with_the_keys_asked_for() -> None:
    rng = random.Random(0)
    for turn in (json_objects.key_turns(rng, False)[0] for _ in range(300)):
        found = json.loads(turn.answer)
        assert list(found) == sorted(found, key=turn.question.rindex)


def test_a_story_is_about_what_was_asked_for_and_has_no_empty_slot() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = stories.story(rng, "fox", "Mia")
        assert "fox" in text and "Mia" in text and "{" not in text and text.count(".") >= 5


def test_tool_calls_fit_the_schema_and_the_question() -> None:
    rng = random.Random(0)
    for _ in range(500):
        document = tools.document(rng, True, lambda rng: [Turn("?", "!")])
        question, call, result, answer = document.messages
        function = call["tool_calls"][0]["function"]
        schemas = {t["function"]["name"]: t["function"]["parameters"]["properties"] for t in document.tools}
        properties = schemas[function["name"]]
        assert list(properties) == list(function["arguments"])
        for name, value in function["arguments"].items():
            assert type(value) is {"string": str, "integer": int}[properties[name]["type"]]
            assert str(value) in question["content"]
        assert result["role"] == "tool" and result["content"] and answer["content"]


def test_a_style_changes_the_answer_as_its_wording_says() -> None:
    apply = {s.name: s.apply for s in styles.STYLES}
    turn = Turn("What is the capital of France?", "The capital of France is Paris.", "Paris")
    assert apply["capitals"](turn) == "THE CAPITAL OF FRANCE IS PARIS."
    assert apply["one word"](turn) == "Paris"
    assert json.loads(apply["json"](turn)) == {"answer": "Paris"}


def test_made_up_places_are_never_real_ones() -> None:
    """Otherwise the corpus would teach that a real capital is not known."""
    real = {c.name for c in countries()} | {c.capital for c in countries()}
    rng = random.Random(0)
    assert not real & {made_up_word(rng) for _ in range(20_000)}
