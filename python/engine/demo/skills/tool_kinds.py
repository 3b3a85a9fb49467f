"""The kinds of tools that the corpus offers: their names, parameters, questions and results."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from engine.demo.facts import countries
from engine.demo.words import FIRST_NAMES, PRODUCTS, made_up_word

Arguments = dict[str, object]

WEATHERS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy")


def _city(rng: random.Random) -> str:
    return rng.choice(countries()).capital if rng.random() < 0.75 else made_up_word(rng)


def _result_weather(rng: random.Random, a: Arguments) -> tuple[str, str]:
    degrees, sky = rng.randint(-10, 40), rng.choice(WEATHERS)
    place = next(iter(a.values()))
    shape = rng.randrange(3)
    if shape == 0:
        payload = json.dumps({"temperature": degrees, "condition": sky})
    elif shape == 1:
        payload = json.dumps({"city": place, "temperature": degrees, "condition": sky})
    else:
        payload = f"{sky}, {degrees} degrees"
    return payload, f"The weather in {place} is {sky}, with {degrees} degrees."


def _result_time(rng: random.Random, a: Arguments) -> tuple[str, str]:
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    payload = json.dumps({"time": clock}) if rng.random() < 0.6 else clock
    return payload, f"The time in {next(iter(a.values()))} is {clock}."


def _result_price(rng: random.Random, a: Arguments) -> tuple[str, str]:
    price = rng.randint(1, 999)
    payload = json.dumps({"price": price}) if rng.random() < 0.6 else str(price)
    return payload, f"The price of {next(iter(a.values()))} is {price}."


def _result_number(rng: random.Random, a: Arguments) -> tuple[str, str]:
    value = rng.randint(0, 9999)
    payload = json.dumps({"result": value}) if rng.random() < 0.6 else str(value)
    return payload, f"The result is {value}."


def _result_done(rng: random.Random, a: Arguments) -> tuple[str, str]:
    payload = rng.choice((json.dumps({"status": "ok"}), json.dumps({"success": True}), "ok", "done"))
    return payload, "Done."


def _result_text(rng: random.Random, a: Arguments) -> tuple[str, str]:
    text = _words(rng)
    payload = json.dumps({"text": text}) if rng.random() < 0.5 else text
    return payload, f"The answer is: {text}"


@dataclass(frozen=True, slots=True)
class Tool:
    """A kind of tool. Its name and the names of its parameters are chosen anew for each dialogue."""

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[tuple[str, ...], str], ...]  # (possible names, JSON type)
    questions: tuple[str, ...]  # {0}, {1}: the argument values
    values: tuple[Callable[[random.Random], object], ...]
    result: Callable[[random.Random, Arguments], tuple[str, str]]
    pairs: tuple[str, ...] = ()  # questions that need two calls; {0}, {1}: the value of each


def _words(rng: random.Random) -> str:
    return " ".join(made_up_word(rng) for _ in range(rng.randint(1, 3)))


def _product(rng: random.Random) -> str:
    return rng.choice(PRODUCTS)


def _name(rng: random.Random) -> str:
    return rng.choice(FIRST_NAMES)


def _number(rng: random.Random) -> int:
    return rng.randint(1, 999)


TOOLS = (
    Tool(
        ("get_weather", "get_current_weather", "weather", "lookup_weather"),
        "Get the weather in a city.",
        ((("city", "location", "place"), "string"),),
        (
            "What is the weather in {0}?",
            "How is the weather in {0}?",
            "What's the weather like in {0}?",
            "Is it raining in {0}?",
            "Tell me the weather in {0}.",
            "Weather in {0}?",
            "What is the weather in {0} today?",
            "What is the weather like in {0} today?",
            "How warm is it in {0}?",
        ),
        (_city,),
        _result_weather,
        (
            "What is the weather in {0} and in {1}?",
            "What is the weather in {0} and {1}?",
            "Compare the weather in {0} and in {1}.",
        ),
    ),
    Tool(
        ("get_weather", "get_current_weather"),
        "Get the weather in a city, in a given unit.",
        ((("city", "location"), "string"), (("unit", "units"), "string")),
        (
            "What is the weather in {0} in {1}?",
            "How warm is it in {0} in {1}?",
            "Tell me the weather in {0} in {1}.",
        ),
        (_city, lambda rng: rng.choice(("celsius", "fahrenheit"))),
        _result_weather,
    ),
    Tool(
        ("get_time", "get_current_time", "clock", "time_in"),
        "Get the current time in a city.",
        ((("city", "location", "timezone"), "string"),),
        ("What time is it in {0}?", "What is the time in {0}?", "Tell me the time in {0}.", "Time in {0}?"),
        (_city,),
        _result_time,
        ("What time is it in {0} and in {1}?", "Tell me the time in {0} and {1}."),
    ),
    Tool(
        ("get_price", "lookup_price", "get_stock_price", "price_of"),
        "Get the current price of something.",
        ((("item", "product", "symbol", "name"), "string"),),
        (
            "What is the price of {0}?",
            "How much does {0} cost?",
            "Look up the price of {0}.",
            "Price of {0}?",
        ),
        (lambda rng: made_up_word(rng) if rng.random() < 0.5 else _product(rng),),
        _result_price,
    ),
    Tool(
        ("add", "add_numbers", "sum", "calculator_add"),
        "Add two numbers.",
        ((("a", "x", "first"), "integer"), (("b", "y", "second"), "integer")),
        ("Add {0} and {1}.", "What is {0} plus {1}?", "What is {0} + {1}?", "Calculate {0} + {1}."),
        (_number, _number),
        _result_number,
    ),
    Tool(
        ("multiply", "multiply_numbers", "product"),
        "Multiply two numbers.",
        ((("a", "x", "first"), "integer"), (("b", "y", "second"), "integer")),
        ("Multiply {0} by {1}.", "What is {0} times {1}?", "What is {0} * {1}?", "Calculate {0} * {1}."),
        (_number, _number),
        _result_number,
    ),
    Tool(
        ("send_message", "send_email", "message", "notify"),
        "Send a message to somebody.",
        ((("to", "recipient", "name"), "string"), (("text", "body", "message"), "string")),
        ("Send {0} the message {1}.", "Tell {0}: {1}", "Send a message to {0}: {1}", "Write to {0}: {1}"),
        (_name, _words),
        _result_done,
    ),
    Tool(
        ("search", "web_search", "search_web", "find"),
        "Search for something on the web.",
        ((("query", "q", "text"), "string"),),
        ("Search for {0}.", "Look up {0}.", "Find {0} on the web.", "Search the web for {0}."),
        (made_up_word,),
        _result_text,
    ),
    Tool(
        ("set_timer", "start_timer", "timer"),
        "Start a timer.",
        ((("minutes", "duration"), "integer"),),
        ("Set a timer for {0} minutes.", "Start a timer of {0} minutes.", "Wake me in {0} minutes."),
        (lambda rng: rng.randint(1, 90),),
        _result_done,
    ),
    Tool(
        ("book_table", "reserve_table", "make_reservation"),
        "Reserve a table in a restaurant.",
        ((("restaurant", "place", "name"), "string"), (("people", "guests", "size"), "integer")),
        (
            "Book a table for {1} at {0}.",
            "Reserve a table at {0} for {1} people.",
            "A table at {0} for {1}, please.",
        ),
        (made_up_word, lambda rng: rng.randint(1, 12)),
        _result_done,
    ),
    Tool(
        ("get_user", "lookup_user", "find_user"),
        "Find a user by number.",
        ((("id", "user_id", "number"), "integer"),),
        ("Find user {0}.", "Who is user {0}?", "Look up the user with number {0}.", "Get user {0}."),
        (_number,),
        _result_text,
    ),
    Tool(
        ("translate", "translate_text"),
        "Translate a text into a language.",
        ((("text", "sentence"), "string"), (("language", "target", "to"), "string")),
        ("Translate {0} into {1}.", "How do you say {0} in {1}?", "What is {0} in {1}?"),
        (_words, lambda rng: rng.choice(countries()).language),
        _result_text,
    ),
    Tool(
        ("play_music", "play_song", "play"),
        "Play a song.",
        ((("title", "song", "name"), "string"),),
        ("Play {0}.", "Play the song {0}.", "I want to hear {0}.", "Put on {0}."),
        (_words,),
        _result_done,
    ),
)

UNANSWERABLE = tuple(t for t in TOOLS if t.result is not _result_number)
"""What cannot be answered without a tool; a sum can."""
