"""Tools with the bundled model: whole loops, and calls that are demanded."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from helpers.server_process import ServerProcess

MODEL = "default"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ORDER: Any = {
    "type": "function",
    "function": {
        "name": "place_order",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "size": {"enum": ["small", "large"]},
                "count": {"type": "integer", "minimum": 1, "maximum": 12},
                "toppings": {"type": "array", "items": {"$ref": "#/$defs/topping"}, "maxItems": 2},
            },
            "required": ["size", "count", "toppings"],
            "additionalProperties": False,
            "$defs": {"topping": {"type": "string", "enum": ["ham", "olives"]}},
        },
    },
}


@pytest.fixture(scope="module")
def client(bundled: ServerProcess) -> openai.OpenAI:
    return bundled.sdk()


def ask(client: openai.OpenAI, question: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    fields = {"tools": [WEATHER], "temperature": 0, **fields}
    return client.chat.completions.create(model=MODEL, messages=messages, **fields).choices[0]


def arguments_of(choice: Any) -> list[Any]:
    return [json.loads(call.function.arguments) for call in choice.message.tool_calls or []]


def test_question_call_result_answer(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], temperature=0)
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert arguments_of(choice) == [{"city": "Paris"}]
    messages.append(choice.message)
    for call in choice.message.tool_calls or []:
        result = {"temperature": 21, "sky": "sunny"}
        messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], temperature=0)
    answer = second.choices[0].message
    assert answer.tool_calls is None and "21" in (answer.content or "") and "Paris" in (answer.content or "")


def test_two_calls_in_a_stream(client: openai.OpenAI) -> None:
    question = "What's the weather like in Oslo and Rome?"
    whole = ask(client, question)
    assert arguments_of(whole) == [{"city": "Oslo"}, {"city": "Rome"}]
    messages: Any = [{"role": "user", "content": question}]
    with client.chat.completions.stream(
        model=MODEL, messages=messages, tools=[WEATHER], temperature=0
    ) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert arguments_of(streamed) == arguments_of(whole)
    assert streamed.finish_reason == "tool_calls"


def test_one_call_at_a_time(client: openai.OpenAI) -> None:
    choice = ask(client, "What's the weather like in Oslo and Rome?", parallel_tool_calls=False)
    assert arguments_of(choice) == [{"city": "Oslo"}]
    assert choice.finish_reason == "tool_calls"


def test_no_call_where_none_is_needed_or_wanted(client: openai.OpenAI) -> None:
    for fields in ({}, {"tool_choice": "none"}):
        choice = ask(client, "What is the capital of France?", **fields)
        assert choice.message.content == "The capital of France is Paris."
        assert choice.message.tool_calls is None and choice.finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "place_order"}}])
def test_a_call_that_is_demanded_is_right_at_any_temperature(client: openai.OpenAI, choice: Any) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, ORDER)}
    for seed in range(8):
        answer = ask(
            client,
            "Tell me a story",
            tools=[WEATHER, ORDER],
            tool_choice=choice,
            temperature=1.5,
            seed=seed,
            max_tokens=400,
            parallel_tool_calls=seed % 2 == 0,
        )
        if answer.finish_reason == "length":
            continue
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        calls = answer.message.tool_calls
        assert len(calls) == 1 or seed % 2 == 0
        for call in calls:
            assert choice == "required" or call.function.name == "place_order"
            jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


def test_an_answer_is_either_a_call_or_as_its_own_schema_says(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"name": {"enum": ["a", "b"]}}, "required": ["name"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    called = ask(client, "What is the weather in Paris?", response_format=form)
    assert arguments_of(called) == [{"city": "Paris"}]
    answered = ask(client, "What is the capital of France?", response_format=form)
    if answered.message.tool_calls is None:
        jsonschema.validate(json.loads(answered.message.content), schema)
    with pytest.raises(openai.BadRequestError, match="tool_choice that demands a call"):
        ask(client, "x", response_format=form, tool_choice="required")
    form["json_schema"]["schema"] = {"not": {}}
    with pytest.raises(openai.BadRequestError, match="not"):
        ask(client, "x", response_format=form)


@pytest.mark.parametrize(
    ("schema", "is_strict"),
    [
        ({"type": "object", "properties": {"a": {"type": "no such type"}}}, False),
        ({"type": "object", "properties": {"a": {"not": {}}}}, True),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, True),
    ],
)
def test_a_schema_that_is_wrong_or_strict_and_not_enforceable(client, schema: Any, is_strict: bool) -> None:
    function = {"name": "f", "parameters": schema, "strict": is_strict}
    with pytest.raises(openai.BadRequestError, match="schema of f") as caught:
        ask(client, "x", tools=[{"type": "function", "function": function}])
    assert caught.value.param == "tools"


def test_a_schema_that_is_not_strict_may_ask_for_more_than_can_be_enforced(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "color", "not": {}}}}
    function = {"name": "f", "parameters": schema}
    demanded: Any = {"type": "function", "function": {"name": "f"}}
    tools = [{"type": "function", "function": function}]
    choice = ask(client, "x", tools=tools, tool_choice=demanded, max_tokens=200)
    assert choice.finish_reason in ("tool_calls", "length")
    assert choice.message.tool_calls[0].function.name == "f"
