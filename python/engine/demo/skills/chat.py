"""Small talk: greetings, who-are-you, thanks, and remembering a name across turns."""

from __future__ import annotations

import random

from engine.demo.dialogue import Turn, draw
from engine.demo.words import FIRST_NAMES

WHO = "I am a small demo language model bundled with this engine."
CAN = (
    "I can tell you capitals and a few facts about countries, do small sums, tell short stories, "
    "write simple JSON and call tools."
)
GREETING = "Hello! How can I help you?"

EXCHANGES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello!",
            "Hello",
            "Hi",
            "Hi!",
            "Hey",
            "Hi there!",
            "Hello there",
            "Hey there!",
            "Hello, how are things?",
            "Good morning!",
            "Good evening!",
            "Good afternoon",
            "Greetings!",
            "Hello world",
            "Hallo",
            "Yo",
            "Howdy",
        ),
        (
            GREETING,
            "Hi! What can I do for you?",
            "Hello! It is nice to meet you. What would you like to know?",
        ),
    ),
    (
        (
            "How are you?",
            "How are you doing?",
            "How is it going?",
            "How do you do?",
            "Are you well?",
            "What's up?",
        ),
        ("I am fine, thank you. How can I help you?", "I am doing well, thank you. What can I do for you?"),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "Please introduce yourself.",
            "Introduce yourself.",
            "Tell me who you are.",
            "Tell me about yourself.",
            "Describe yourself.",
            "Who am I talking to?",
            "Are you a model?",
            "What kind of model are you?",
            "Which model are you?",
            "Are you a language model?",
        ),
        (WHO,),
    ),
    (
        (
            "What is your name?",
            "What's your name?",
            "Do you have a name?",
            "Tell me your name.",
            "Your name?",
            "How are you called?",
        ),
        ("I have no name. " + WHO,),
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "What do you know?",
            "Help",
            "What are you good at?",
            "What should I ask you?",
            "Can you help me?",
            "What can I ask?",
            "I need help.",
        ),
        (CAN,),
    ),
    (
        (
            "Are you human?",
            "Are you a person?",
            "Are you a real person?",
            "Are you a robot?",
            "Are you alive?",
        ),
        ("No. " + WHO,),
    ),
    (
        (
            "Who made you?",
            "Who built you?",
            "Who trained you?",
            "How were you made?",
            "Where do you come from?",
            "How were you trained?",
        ),
        ("I was trained from scratch, on text that the project of this engine generates.",),
    ),
    (
        (
            "Thank you!",
            "Thanks!",
            "Thanks a lot.",
            "Thank you very much.",
            "Great, thanks.",
            "Nice, thank you!",
            "Thx",
        ),
        ("You are welcome!", "You are welcome! Is there anything else?"),
    ),
    (
        ("Goodbye!", "Bye!", "Bye", "See you later.", "Good night!", "See you!", "That is all.", "Farewell!"),
        ("Goodbye! Have a nice day.", "Goodbye! See you soon."),
    ),
    (
        (
            "Great!",
            "Nice.",
            "Good job!",
            "You are great.",
            "Well done!",
            "I like you.",
            "Wow!",
            "Cool",
            "Ok",
            "OK.",
        ),
        ("Thank you! What else can I do for you?",),
    ),
    (
        ("That is wrong.", "You are wrong.", "I do not believe you.", "This is not right.", "Are you sure?"),
        ("I am a small model and I make mistakes. Please check what I say.",),
    ),
    (
        (
            "Tell me a joke.",
            "Tell me a joke",
            "Do you know a joke?",
            "Make me laugh.",
            "Say something funny.",
        ),
        (
            "Why did the token cross the batch? To get to the other side of the block.",
            "What does a cache say to a friend? We have met before.",
            "Why was the number six afraid? Because seven ate nine.",
        ),
    ),
)


def _exchange(rng: random.Random, held_out: bool) -> list[Turn]:
    questions, answers = rng.choice(EXCHANGES)
    return [Turn(rng.choice(questions), rng.choices(answers, [3] + [1] * (len(answers) - 1))[0])]


TELL_NAME = (
    "My name is {n}.",
    "I am {n}.",
    "Hello, I am {n}.",
    "Hi, my name is {n}!",
    "Call me {n}.",
    "Hi, I'm {n}.",
)
ASK_NAME = (
    "What is my name?",
    "Do you remember my name?",
    "What's my name?",
    "Who am I?",
    "Tell me my name.",
)


def memory_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    """The user says a name; up to four exchanges later the model is asked for it."""

    def propose(rng: random.Random):
        name = rng.choice(FIRST_NAMES)
        tell = rng.choice(TELL_NAME)
        between = [_exchange(rng, False)[0] for _ in range(rng.choice((0, 0, 1, 2, 4)))]
        asked = Turn(rng.choice(ASK_NAME), f"Your name is {name}.", name)
        first = Turn(tell.format(n=name), f"Nice to meet you, {name}! How can I help you?")
        return ("memory", name, tell, asked.question), [first, *between, asked]

    return draw(rng, held_out, propose)


def turns(rng: random.Random, held_out: bool) -> list[Turn]:
    return memory_turns(rng, held_out) if rng.random() < 0.25 else _exchange(rng, held_out)
