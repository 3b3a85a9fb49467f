"""Short stories, put together from an opening, a worry, a turn for the better and an ending."""

from __future__ import annotations

import random

from engine.demo.dialogue import Turn, draw
from engine.demo.words import ANIMALS, COLOURS, FIRST_NAMES, PLACES, THINGS

OPENINGS = (
    "Once upon a time, a {small} {animal} named {name} lived near a {colour} {place}.",
    "Once upon a time, there was a {small} {animal} called {name}, who lived by the {place}.",
    "Long ago, in a house beside the {place}, lived a {small} {animal} named {name}.",
    "There was once a {small} {animal} named {name} who loved the {place} more than anything.",
)
SMALL = ("small", "young", "shy", "curious", "brave", "clever", "gentle", "merry")
HABITS = (
    "Every morning {name} walked around the {place} and said hello to everyone.",
    "{name} owned only one thing, an old {thing}, and was very proud of it.",
    "All day long {name} looked for new things to learn.",
    "{name} liked to sing, even when it rained.",
    "In the evening {name} always counted the stars.",
)
# Each plot is one worry and how it ended well.
PLOTS = (
    (
        "One day {name} found a {colour} {thing} in the grass.",
        "Nobody knew whose it was, so {name} asked every neighbour.",
        "At last old {friend} cried with joy, because it had been lost for many years.",
        "{friend} thanked {name} and baked a big cake for the whole {place}.",
    ),
    (
        "One night a great storm came and broke the bridge.",
        "{friend} could not get home and was afraid.",
        "{name} tied a long rope to the {thing} and pulled with all might.",
        "Before the sun came up, {friend} was safe and warm at home.",
    ),
    (
        "One winter there was nothing left to eat.",
        "{name} had only one piece of bread, and {friend} had none.",
        "They shared it, sat by the fire and told each other about the summer.",
        "In spring {friend} planted a garden, and half of it was for {name}.",
    ),
    (
        "One morning the {thing} was gone.",
        "{name} searched under the bed, behind the door and along the path.",
        "Then {friend} pointed up: a bird had taken it to the top of the tree.",
        "They asked the bird kindly, and it gave the {thing} back for a song.",
    ),
    (
        "One day {name} wanted to see what lay behind the hills.",
        "The way was long, and soon the path was lost in the fog.",
        "{friend} heard a small voice calling and came with a lantern.",
        "Together they climbed the last hill and saw the wide, shining sea.",
    ),
    (
        "{name} was afraid of the dark.",
        "{friend} said that the night was only the day with its eyes closed.",
        "So they went outside together and listened to the quiet {place}.",
        "After that {name} was never afraid again.",
    ),
    (
        "One day a stranger named {friend} came to the {place} with a broken {thing}.",
        "Everyone said that it could not be mended.",
        "{name} worked on it for three days and three nights.",
        "On the fourth day it was as good as new, and the stranger stayed as a friend.",
    ),
    (
        "One summer there was a race around the {place}.",
        "{friend} was the fastest of all and laughed at {name}.",
        "But {friend} fell, and {name} stopped to help.",
        "They crossed the line together, and everyone cheered for both.",
    ),
    (
        "One afternoon {name} heard somebody crying near the old wall.",
        "It was {friend}, who had lost a {colour} {thing}.",
        "They followed the footprints in the sand until they found it.",
        "Since that day they have met at the wall every afternoon.",
    ),
    (
        "One day {name} planted a tiny seed.",
        "Weeks went by and nothing grew, and {friend} said it was no use.",
        "{name} kept giving it water and never lost patience.",
        "Then a {colour} flower opened, the most beautiful in the whole {place}.",
    ),
)
ENDINGS = (
    "And they lived happily ever after.",
    "From then on they were the best of friends.",
    "And {name} fell asleep with a smile.",
    "And if you go to the {place} today, you can still hear them laugh.",
    "{name} never forgot that day.",
)
ASK_ANY = (
    "Tell me a story",
    "Tell me a story.",
    "Tell me a short story.",
    "Please tell me a story.",
    "A story, please!",
    "Can you tell me a story?",
    "Write a story.",
    "Write a short story.",
    "I want to hear a story.",
    "Tell me a bedtime story.",
    "Story please",
    "Do you know a story?",
    "Make up a story.",
)
ASK_ABOUT = (
    "Tell me a story about a {animal}.",
    "Write a story about a {animal}.",
    "A story about a {animal}, please.",
    "Tell me a short story about a {animal}.",
    "Can you tell me a story about a {animal}?",
)
ASK_NAMED = (
    "Tell me a story about a {animal} named {name}.",
    "Write a story about a {animal} called {name}.",
    "Tell me a story about {name} the {animal}.",
)


def story(rng: random.Random, animal: str, name: str) -> str:
    friend = rng.choice([n for n in FIRST_NAMES if n != name])
    slots = {
        "animal": animal,
        "name": name,
        "friend": friend,
        "small": rng.choice(SMALL),
        "colour": rng.choice(COLOURS),
        "place": rng.choice(PLACES),
        "thing": rng.choice(THINGS),
    }
    lines = [rng.choice(OPENINGS), rng.choice(HABITS), *rng.choice(PLOTS), rng.choice(ENDINGS)]
    return " ".join(lines).format(**slots)


def any_story(rng: random.Random) -> str:
    return story(rng, rng.choice(ANIMALS), rng.choice(FIRST_NAMES))


def turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        animal, name = rng.choice(ANIMALS), rng.choice(FIRST_NAMES)
        asks = rng.choices((ASK_ANY, ASK_ABOUT, ASK_NAMED), (3, 3, 2))[0]
        wording = rng.choice(asks)
        question = wording.format(animal=animal, name=name)
        # A request for any story has too few wordings to hold one out.
        key = None if asks is ASK_ANY else ("story", question)
        return key, [Turn(question, story(rng, animal, name))]

    return draw(rng, held_out, propose)
