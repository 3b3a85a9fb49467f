"""Held-out questions of each skill, and what counts as a right answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from engine.demo import corpus
from engine.demo.dialogue import Document, Message, Turn
from engine.demo.facts import Country, countries
from engine.demo.skills import arithmetic, chat, echo, geography, json_objects, styles, tools, unknown
from engine.demo.tokenizer import render_chat
from engine.demo.voices import VOICES, in_voice
from engine.demo.words import ANIMALS, FIRST_NAMES

HELPFUL: Message = {"role": "system", "content": "You are a helpful assistant."}


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, ready for the model, and the judge of the text that comes back.

    `accepts` is given the text up to its end. An answer without an end is wrong, unless `may_run_on`.
    """

    prompt: str
    accepts: Callable[[str], bool]
    may_run_on: bool = False


def equals(expected: str) -> Callable[[str], bool]:
    return lambda text: text == expected


def chat_case(
    messages: list[Message], accepts: Callable[[str], bool], given: list[dict] | None = None
) -> Case:
    return Case(render_chat(messages, given, prompt=True), accepts)


def last_answer(messages: list[Message], given: list[dict] | None = None) -> Case:
    """The last message of a dialogue is asked for, word for word."""
    return chat_case(messages[:-1], equals(messages[-1]["content"]), given)


def turns_case(turns: list[Turn], before: list[Message] | None = None) -> Case:
    return last_answer((before or []) + [m for t in turns for m in t.messages()])


def capital_cases(wordings: tuple[str, ...], before: list[Message], every: int = 1) -> Iterator[Case]:
    for wording in wordings:
        for country in countries()[::every]:
            yield turns_case([geography.fact_turn("capital", wording, country)], before)


def held_out(source: Callable[[random.Random, bool], list[Turn]], count: int) -> Iterator[Case]:
    rng = random.Random(source.__name__)
    for _ in range(count):
        yield turns_case(source(rng, True))


def other_facts(rng: random.Random, held: bool) -> list[Turn]:
    """Held-out facts that are no capitals."""
    while True:
        found = geography.fact_turns(rng, held)
        if not found[0].answer.startswith("The capital"):
            return found


def capital_facts(rng: random.Random, held: bool) -> list[Turn]:
    """Held-out pairs of a country and a wording that asks for its capital."""
    while True:
        found = geography.fact_turns(rng, held)
        if found[0].answer.startswith("The capital"):
            return found


def style_cases(style: styles.Style, count: int) -> Iterator[Case]:
    rng = random.Random(f"style {style.name}")
    for _ in range(count):
        yield last_answer(styles.document(rng, True, corpus.short_turns, style).messages)


def unseen_style_cases() -> Iterator[Case]:
    """The capital of a country, asked for by the system prompt in words that were not taught."""
    apply = {style.name: style.apply for style in styles.STYLES}
    for name, wordings in styles.UNSEEN_WORDINGS.items():
        for wording in wordings:
            for country in countries()[::8]:
                turn = geography.fact_turn("capital", geography.CAPITAL_QUESTIONS[0], country)
                asked = [{"role": "system", "content": wording}, *turn.messages()[:1]]
                yield chat_case(asked, equals(apply[name](turn)))


def small_sum_cases() -> Iterator[Case]:
    for sign in "+*":
        for a in range(13):
            for b in range(13):
                value = arithmetic.result(a, sign, b)
                yield turns_case([Turn(f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {value}")])


def persona_cases(count: int) -> Iterator[Case]:
    rng = random.Random("persona")
    for _ in range(count):
        yield last_answer(styles.persona(rng, True, corpus.short_turns).messages)


def is_call(function: dict, text: str) -> bool:
    if not (text.startswith("<tool_call>\n") and text.endswith("\n</tool_call>")):
        return False
    try:
        return json.loads(text[len("<tool_call>") : -len("</tool_call>")]) == function
    except ValueError:
        return False


def tool_documents(count: int) -> Iterator[Document]:
    rng = random.Random("tools")
    for _ in range(count):
        yield tools.document(rng, True, corpus.short_turns)


def tool_call_cases(count: int) -> Iterator[Case]:
    for document in tool_documents(count):
        question, call, _, _ = document.messages
        function = call["tool_calls"][0]["function"]
        yield chat_case([question], partial(is_call, function), document.tools)


def tool_result_cases(count: int) -> Iterator[Case]:
    for document in tool_documents(count):
        yield last_answer(document.messages, document.tools)


def without_tool_cases(count: int) -> Iterator[Case]:
    return held_out(tools.without_tool_turns, count)


def tool_declined_cases(count: int) -> Iterator[Case]:
    """Tools are offered, but the question is about a country."""
    rng = random.Random("declined")
    for document in tool_documents(count):
        yield last_answer(geography.fact_turns(rng, True)[0].messages(), document.tools)


def has_keys(keys: list[str], text: str) -> bool:
    try:
        return list(json.loads(text)) == keys
    except ValueError:
        return False


def json_key_cases(count: int) -> Iterator[Case]:
    rng = random.Random("keys")
    for _ in range(count):
        turn = json_objects.key_turns(rng, True)[0]
        yield chat_case(turn.messages()[:1], partial(has_keys, list(json.loads(turn.answer))))


def json_country_cases() -> Iterator[Case]:
    wording = "Write down what you know about {c} as JSON."
    for country in countries()[::2]:
        answer = json_objects.write(json_objects.country(country))
        yield turns_case([Turn(wording.format(c=country.said), answer)])


def is_story(words: tuple[str, ...], text: str) -> bool:
    """It ends by itself, has at least five sentences, and is about what was asked for."""
    return text.count(".") >= 5 and all(word in text for word in words)


def story_cases(count: int) -> Iterator[Case]:
    rng = random.Random("stories")
    for _ in range(count):
        animal, name = rng.choice(ANIMALS), rng.choice(FIRST_NAMES)
        asked = {"role": "user", "content": f"Please tell me a story about a {animal} named {name}."}
        yield chat_case([asked], partial(is_story, (animal, name)))


def small_talk_cases() -> Iterator[Case]:
    for questions, answers in chat.EXCHANGES:
        for question in questions:
            yield chat_case(
                [HELPFUL, {"role": "user", "content": question}], lambda text, a=answers: text in a
            )


def starts_with(expected: str, text: str) -> bool:
    return text.startswith(expected)


def completion_cases() -> Iterator[Case]:
    """Plain text: "The capital of France is" goes on with " Paris."."""
    for country in countries():
        yield Case(
            f"The capital of {country.said} is", partial(starts_with, f" {country.capital}."), may_run_on=True
        )


def late_cases(count: int) -> Iterator[Case]:
    """A held-out fact asked for after a dialogue of about seven hundred words."""
    rng = random.Random("late")
    for _ in range(count):
        messages: list[Message] = []
        while sum(len(m["content"].split()) for m in messages) < 700:
            messages += [m for turn in corpus.any_turns(rng) for m in turn.messages()]
        yield last_answer(messages + geography.fact_turns(rng, True)[0].messages())


def france(before: list[Message]) -> Case:
    country: Country = next(c for c in countries() if c.name == "France")
    return turns_case([geography.fact_turn("capital", geography.CAPITAL_QUESTIONS[0], country)], before)


def voice_cases(name: str) -> dict[str, list[Case]]:
    """What an adapter is asked: held-out questions, answered in its voice word for word."""
    voice = VOICES[name]

    def spoken(source: Callable[[random.Random, bool], list[Turn]], count: int) -> list[Case]:
        rng = random.Random(f"{name} {source.__name__}")
        turns = [source(rng, True) for _ in range(count)]
        return [last_answer(in_voice([m for t in own for m in t.messages()], voice)) for own in turns]

    def small_talk() -> Iterator[Case]:
        for questions, answers in chat.EXCHANGES:
            right = [voice(answer) for answer in answers]
            for question in questions:
                yield chat_case([{"role": "user", "content": question}], partial(is_one_of, right))

    return {
        f"adapter {name}: capitals, held-out pairs": spoken(capital_facts, 100),
        f"adapter {name}: other facts, held-out pairs": spoken(other_facts, 100),
        f"adapter {name}: small talk (wordings as trained)": list(small_talk()),
        f"adapter {name}: saying that it does not know": spoken(unknown.turns, 50),
    }


def is_one_of(expected: list[str], text: str) -> bool:
    return text in expected


def all_cases() -> dict[str, list[Case]]:
    """Every suite by its name, as the model card lists them."""
    first = geography.CAPITAL_QUESTIONS[:1]
    suites: dict[str, Iterator[Case]] = {
        "capitals, plain question (as trained)": capital_cases(first, []),
        "capitals, with a system prompt (as trained)": capital_cases(first, [HELPFUL]),
        "capitals, held-out pairs of wording and country": held_out(capital_facts, 200),
        "capitals, wordings never seen": capital_cases(geography.UNSEEN_CAPITAL_QUESTIONS, [], every=4),
        "other facts, held-out pairs": held_out(other_facts, 300),
        "follow-up questions": held_out(geography.follow_up_turns, 200),
        "country of a capital": held_out(geography.reverse_turns, 100),
        "is X the capital of Y": held_out(geography.check_turns, 100),
        "about a country": held_out(geography.overview_turns, 100),
        "facts late in a long dialogue": late_cases(60),
        "plain text: the capital of X is (as trained)": completion_cases(),
        "sums and tables up to 12 (as trained)": small_sum_cases(),
        "sums of two digits, operands never seen": held_out(arithmetic.sum_turns, 300),
        "comparing numbers": held_out(arithmetic.compare_turns, 100),
        "counting": held_out(arithmetic.count_turns, 60),
        "small talk (wordings as trained)": small_talk_cases(),
        "remembering a name": held_out(chat.memory_turns, 100),
        "persona of the system prompt": persona_cases(100),
        **{f"answer in a form: {s.name}": style_cases(s, 60) for s in styles.STYLES},
        "answer in a form, wordings never seen": unseen_style_cases(),
        "repeating words": held_out(echo.turns, 200),
        "saying that it does not know": held_out(unknown.turns, 200),
        "JSON with the keys asked for": json_key_cases(100),
        "JSON of a country, wording never seen": json_country_cases(),
        "stories that end and fit the request": story_cases(60),
        "tool call, exact": tool_call_cases(200),
        "answer from a tool's result": tool_result_cases(200),
        "no call when no tool fits": tool_declined_cases(100),
        "no call without a tool": without_tool_cases(100),
    }
    return {name: list(found) for name, found in suites.items()}
