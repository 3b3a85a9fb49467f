"""Questions beyond the model: made-up places, other subjects. The answer is that it does not know."""

from __future__ import annotations

import random

from engine.demo.dialogue import Turn, draw
from engine.demo.facts import countries
from engine.demo.words import ANIMALS, COMMON_WORDS, FIRST_NAMES, LAST_NAMES, THINGS, made_up_word

ANSWER = "I do not know that."

ABOUT_PLACES = (
    "What is the capital of {m}?",
    "What is the currency of {m}?",
    "Which language is spoken in {m}?",
    "Where is {m}?",
    "Which continent is {m} in?",
    "Tell me about {m}.",
    "Who is the president of {m}?",
    "How many people live in {m}?",
    "What is {m}?",
    "And of {m}?",
    "{m}",
)
OTHER = (
    "Who is {n}?",
    "Who invented the {t}?",
    "When was {n} born?",
    "Why is the {t} so heavy?",
    "How do I repair a {t}?",
    "How much does a {t} cost?",
    "What does a {a} eat?",
    "How long does a {a} live?",
    "How do I cook a {t}?",
    "Where can I buy a {t}?",
    "What is the meaning of {w}?",
    "What does {w} mean in Latin?",
    "Translate {w} into French.",
    "Who wrote the song about the {t}?",
    "What happened in {y}?",
    "Who won the cup in {y}?",
    "Who was king in {y}?",
    "What is the weather like today?",
    "What time is it?",
    "What day is it today?",
    "How tall is {n}?",
    "Where does {n} live?",
    "Why is the sky blue?",
    "What is the speed of light?",
    "How far is it to the moon?",
    "How do I write a program for a {t}?",
    "Write a function that sorts a list.",
    "Explain quantum physics.",
    "What is machine learning?",
    "Which stock should I buy?",
    "Can a {a} swim?",
    "Is a {a} bigger than a {b}?",
    "Why do we need a {t}?",
    "How does a {t} work?",
    "What is the best {t}?",
    "Do you like the {a}?",
    "What is the population of {p}?",
    "Who is the president of {p}?",
    "How big is {p}?",
    "What is the highest mountain in {p}?",
    "What is the capital of {s}?",
)
# Places that are real but no country: the model must not invent a capital for them.
NOT_COUNTRIES = (
    "California",
    "Texas",
    "Bavaria",
    "Scotland",
    "Siberia",
    "Florida",
    "Catalonia",
    "Tuscany",
    "Ontario",
    "Bali",
    "Hawaii",
    "Sicily",
    "Alaska",
    "Queensland",
    "Brittany",
    "the moon",
    "Europe",
    "Africa",
)


def turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        wording = rng.choice(ABOUT_PLACES) if rng.random() < 0.4 else rng.choice(OTHER)
        first, second = rng.sample(ANIMALS, 2)
        question = wording.format(
            m=made_up_word(rng),
            n=rng.choice((made_up_word(rng), f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}")),
            t=rng.choice(THINGS),
            a=first,
            b=second,
            w=rng.choice(COMMON_WORDS),
            y=rng.randint(1000, 2024),
            p=rng.choice(countries()).said,
            s=rng.choice(NOT_COUNTRIES),
        )
        key = ("unknown", question) if "{" in wording else None
        return key, [Turn(question, ANSWER)]

    return draw(rng, held_out, propose)
