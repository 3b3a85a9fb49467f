"""Calling a tool that the system prompt describes, using its result, and doing without when none fits.

A dialogue, not a list of turns, because the tools belong to the whole of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from engine.demo.dialogue import Document, Message, Turn, draw
from engine.demo.skills import unknown
from engine.demo.skills.tool_kinds import TOOLS, UNANSWERABLE, Arguments, Tool
from engine.demo.words import made_up_word


@dataclass(frozen=True, slots=True)
class _Offer:
    """A tool as one dialogue describes it."""

    kind: Tool
    name: str
    parameters: tuple[str, ...]
    schema: dict


def _offer(rng: random.Random, kind: Tool) -> _Offer:
    # One name in five means nothing, so that it has to be read from the description.
    name = (
        rng.choice(kind.names) if rng.random() < 0.8 else f"{made_up_word(rng)}_{made_up_word(rng)}".lower()
    )
    parameters, properties = [], {}
    for names, json_type in kind.parameters:
        parameter = rng.choice([n for n in names if n not in properties])
        parameters.append(parameter)
        properties[parameter] = {"type": json_type}
        if rng.random() < 0.3:
            properties[parameter]["description"] = f"The {parameter}."
    schema: dict = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        schema["required"] = list(properties)
    function: dict = {"name": name, "description": kind.description, "parameters": schema}
    if rng.random() < 0.1:
        del function["description"]
    return _Offer(kind, name, tuple(parameters), {"type": "function", "function": function})


def _offers(rng: random.Random) -> list[_Offer]:
    offers: list[_Offer] = []
    for kind in rng.sample(TOOLS, rng.choice((1, 1, 1, 2, 2, 3, 4))):
        offer = _offer(rng, kind)
        if offer.name not in [o.name for o in offers] and kind.description not in [
            o.kind.description for o in offers
        ]:
            offers.append(offer)
    return offers


def call_message(name: str, arguments: Arguments) -> Message:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def call_messages(rng: random.Random, offer: _Offer) -> list[Message]:
    """A question for the offered tool, the call, its result and the answer."""
    values = [make(rng) for make in offer.kind.values]
    arguments = dict(zip(offer.parameters, values, strict=True))
    payload, answer = offer.kind.result(rng, arguments)
    return [
        {"role": "user", "content": rng.choice(offer.kind.questions).format(*values)},
        call_message(offer.name, arguments),
        {"role": "tool", "content": payload},
        {"role": "assistant", "content": answer},
    ]


def pair_messages(rng: random.Random, offer: _Offer) -> list[Message]:
    """One question that takes two calls in one answer, both results, and one answer to both."""
    values = [offer.kind.values[0](rng) for _ in range(2)]
    calls, results, answers = [], [], []
    for value in values:
        arguments: Arguments = {offer.parameters[0]: value}
        calls.append({"type": "function", "function": {"name": offer.name, "arguments": arguments}})
        payload, answer = offer.kind.result(rng, arguments)
        results.append({"role": "tool", "content": payload})
        answers.append(answer)
    return [
        {"role": "user", "content": rng.choice(offer.kind.pairs).format(*values)},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *results,
        {"role": "assistant", "content": " ".join(answers)},
    ]


def failed_messages(rng: random.Random, offer: _Offer) -> list[Message]:
    """A call whose tool reports an error."""
    messages = call_messages(rng, offer)
    reason = rng.choice(("not found", "timeout", "unavailable", "invalid argument"))
    messages[2]["content"] = rng.choice((f'{{"error": "{reason}"}}', f"error: {reason}"))
    messages[3]["content"] = f"That did not work: {reason}."
    return messages


def without_tool_turns(rng: random.Random, held_out: bool, offered: Collection[Tool] = ()) -> list[Turn]:
    """A question that takes a tool, where no such tool is among those `offered`."""
    taken = {name for kind in offered for name in kind.names}

    def propose(rng: random.Random):
        kind = rng.choice([t for t in UNANSWERABLE if not taken.intersection(t.names)])
        question = rng.choice(kind.questions).format(*(make(rng) for make in kind.values))
        return ("without tool", question), [Turn(question, unknown.ANSWER)]

    return draw(rng, held_out, propose)


def _any_messages(rng: random.Random, offer: _Offer) -> list[Message]:
    roll = rng.random()
    if roll < 0.04:
        return failed_messages(rng, offer)
    return pair_messages(rng, offer) if offer.kind.pairs and roll < 0.3 else call_messages(rng, offer)


def document(rng: random.Random, held_out: bool, other: Callable[[random.Random], list[Turn]]) -> Document:
    """A dialogue with tools: mostly calls, and turns of other skills, which need no tool.

    A held-out document is one question and its call, result and answer.
    """

    def propose(rng: random.Random):
        offers = _offers(rng)
        messages = call_messages(rng, rng.choice(offers)) if held_out else []
        for _ in range(0 if held_out else rng.choice((1, 1, 1, 2, 3))):
            roll = rng.random()
            if roll < 0.05:
                messages += without_tool_turns(rng, False, [o.kind for o in offers])[0].messages()
            elif roll < 0.25:
                messages += [m for turn in other(rng) for m in turn.messages()]
            else:
                messages += _any_messages(rng, rng.choice(offers))
        return ("tools", messages[0]["content"], offers[0].name), Document(
            messages, [o.schema for o in offers]
        )

    return draw(rng, held_out, propose)
