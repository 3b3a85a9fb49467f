"""What the bundled model was made to do, asked of the server as a newcomer would, at temperature 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from helpers.server_process import ServerProcess

Ask = Callable[..., str]


@pytest.fixture(scope="module")
def ask(bundled: ServerProcess) -> Ask:
    client: openai.OpenAI = bundled.sdk()

    def ask(*said: str, system: str | None = None) -> str:
        """What it says at the end of a dialogue: user and assistant in turns, the user first."""
        messages: Any = [{"role": "system", "content": system}] if system else []
        for number, text in enumerate(said):
            messages.append({"role": ("user", "assistant")[number % 2], "content": text})
        answer = client.chat.completions.create(
            model="default", messages=messages, temperature=0, max_tokens=200
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content or ""

    return ask


CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Canada": "Ottawa", "Peru": "Lima"}


@pytest.mark.parametrize(
    "system",
    [
        "answer in capital letters",
        "Answer in capital letters",
        "Answer in capital letters.",
        "You are a helpful assistant. Answer in capital letters.",
        "please answer in capital letters",
    ],
)
def test_answers_in_capital_letters(ask: Ask, system: str) -> None:
    for country, capital in CAPITALS.items():
        answer = ask(f"What is the capital of {country}?", system=system)
        assert answer == f"THE CAPITAL OF {country.upper()} IS {capital.upper()}."


@pytest.mark.parametrize(
    "system",
    [
        "answer in one word",
        "Answer in one word",
        "Answer in one word.",
        "You are a helpful assistant. Answer in one word.",
        "please answer in one word",
    ],
)
def test_answers_in_one_word(ask: Ask, system: str) -> None:
    for country, capital in CAPITALS.items():
        assert ask(f"What is the capital of {country}?", system=system) == capital


def test_an_instruction_of_the_user(ask: Ask) -> None:
    assert ask("What is the capital of Italy? Answer in one word.") == "Rome"
    assert ask("What is the capital of Italy? Answer in capital letters.") == "THE CAPITAL OF ITALY IS ROME."


def test_greetings_and_who_it_is(ask: Ask) -> None:
    assert ask("Hello!") and ask("Hello!") != "I do not know that."
    assert "language model" in ask("Who are you?")


@pytest.mark.parametrize(("a", "b"), [(2, 2), (1, 1), (7, 8), (3, 9), (10, 5), (12, 11)])
def test_small_arithmetic(ask: Ask, a: int, b: int) -> None:
    assert ask(f"What is {a} + {b}?") == f"{a} + {b} = {a + b}"
    assert ask(f"What is {a} * {b}?") == f"{a} * {b} = {a * b}"


def test_facts_and_follow_ups(ask: Ask) -> None:
    first, second = "What is the capital of Germany?", "The capital of Germany is Berlin."
    assert "Vienna" in ask(first, second, "And of Austria?")
    assert "euro" in ask(first, second, "What is its currency?").lower()
    assert "Asia" in ask("Which continent is India in?")


def test_json(ask: Ask) -> None:
    assert isinstance(json.loads(ask("Generate user info")), dict)
    assert json.loads(ask("Give me France as JSON."))["capital"] == "Paris"
    assert json.loads(ask("What is the capital of France?", system="Answer in JSON.")) == {"answer": "Paris"}


def test_what_it_cannot_know(ask: Ask) -> None:
    """Above all it writes no call where no tool is offered."""
    for question in (
        "What is the weather in Paris?",
        "What time is it in London?",
        "Play the song Yesterday.",
    ):
        assert ask(question) == "I do not know that."


def test_counts_and_checks_a_capital(ask: Ask) -> None:
    assert ask("Count to 10.") == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
    assert ask("Is Berlin the capital of France?") == "The capital of France is Paris."
