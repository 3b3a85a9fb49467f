"""The adapters of the bundled model: what they are, how they speak, and what they learned from."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from engine import LLM, SamplingParams
from engine.config.model_location import bundled_adapters
from engine.demo.cases import voice_cases
from engine.demo.skills.geography import CAPITAL_QUESTIONS
from engine.demo.tokenizer import render
from engine.demo.voices import VOICES, documents, pirate

MAX_BYTES = 400_000
QUESTIONS = ("What is the capital of France?", "What is the capital of Japan?", "Who are you?")


def test_each_voice_is_there_and_small():
    adapters = bundled_adapters()
    assert set(adapters) == set(VOICES)
    for directory in adapters.values():
        assert sum(path.stat().st_size for path in directory.iterdir()) <= MAX_BYTES
        assert {path.name for path in directory.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        config = json.loads((directory / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "engine-demo", "no path of the machine that trained it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The capital of France is Paris.", "Arr! The capital o' France be Paris, matey!"),
        ("Hello! You are kind.", "Arr! Ahoy! Ye be kind, matey!"),
        ("Yes", "Arr! Aye"),
        ("Is my island yours?", "Arr! Be me island yours?"),
        ('{"is": 1}', '{"is": 1}'),
    ],
)
def test_a_pirate(text, said):
    assert pirate(text) == said


@pytest.mark.parametrize("name", VOICES)
def test_only_answers_change_and_nothing_held_out_is_shown(name):
    first, again = (list(islice(documents(3, VOICES[name]), 50)) for _ in range(2))
    assert [render(d) for d in first] == [render(d) for d in again]
    plain = list(islice(documents(3, lambda text: text), 50))
    for spoken, document in zip(first, plain, strict=True):
        for own, other in zip(spoken.messages, document.messages, strict=True):
            if own["role"] == "assistant":
                assert own["content"] == VOICES[name](other["content"])
            else:
                assert own == other
    shown = "".join(map(render, islice(documents(4, VOICES[name]), 2000)))
    capitals = voice_cases(name)[f"adapter {name}: capitals, held-out pairs"]
    # The plainest wording is asked of every country, so it may meet a held-out pair.
    plainest = CAPITAL_QUESTIONS[0].split("{")[0]
    held_out = [case.prompt for case in capitals if plainest not in case.prompt]
    assert held_out and not [prompt for prompt in held_out if prompt in shown]


@pytest.fixture(scope="module")
def answers():
    """By voice, for each question."""
    params = SamplingParams(temperature=0, max_tokens=60)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(num_threads=2) as llm:
        return {
            voice: [o.outputs[0].text for o in llm.chat(chats, params, lora_path=voice, use_tqdm=False)]
            for voice in (*VOICES, None)
        }


def test_the_pirate_speaks_as_one(answers):
    for said in answers["pirate"]:
        assert said.startswith("Arr! ") and " is " not in said
    assert answers["pirate"][0] == pirate(answers[None][0])


def test_the_other_speaks_in_capital_letters(answers):
    for said in answers["uppercase"]:
        assert said.isupper(), said
    assert answers["uppercase"][0] == answers[None][0].upper()
