"""The files of the bundled model: small enough, loadable, exact, and with the right chat markup."""

import json
import struct
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.demo import MODEL_DIR, corpus
from engine.demo.facts import countries
from engine.demo.tokenizer import TOOL_CALL_TOKENS, render, render_chat

MAX_BYTES = 12_000_000

TOKENIZER = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
CONFIG = json.loads((MODEL_DIR / "config.json").read_text())
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def header() -> dict[str, dict]:
    with open(MODEL_DIR / "model.safetensors", "rb") as weights:
        (length,) = struct.unpack("<Q", weights.read(8))
        found = json.loads(weights.read(length))
    found.pop("__metadata__")
    return found


def expected_shapes() -> dict[str, list[int]]:
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [queries, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    shapes = {"model.embed_tokens.weight": [CONFIG["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def test_the_directory_is_small() -> None:
    """Its adapters included."""
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "adapter_model.safetensors"}
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_the_weights_are_those_of_the_config_in_bfloat16() -> None:
    assert {name: t["shape"] for name, t in header().items()} == expected_shapes()
    assert {t["dtype"] for t in header().values()} == {"BF16"}


def test_the_config_is_what_the_engine_needs() -> None:
    assert CONFIG["architectures"] == ["LlamaForCausalLM"] and CONFIG["tie_word_embeddings"] is True
    assert CONFIG["head_dim"] == 64 and CONFIG["num_key_value_heads"] < CONFIG["num_attention_heads"]
    assert CONFIG["max_position_embeddings"] == 2048 and CONFIG["rope_theta"] == 10000.0
    assert CONFIG["vocab_size"] == TOKENIZER.get_vocab_size()


def test_generation_stops_at_the_end_of_a_turn_or_a_text_and_sets_no_sampling() -> None:
    ends = [TOKENIZER.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    generation = json.loads((MODEL_DIR / "generation_config.json").read_text())
    assert generation["eos_token_id"] == CONFIG["eos_token_id"] == ends
    assert not {"temperature", "top_p", "top_k", "do_sample", "repetition_penalty"} & set(generation)


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@given(st.integers(min_value=0, max_value=10**12))
def test_a_number_is_one_token_a_digit(number: int) -> None:
    assert TOKENIZER.encode(str(number)).tokens == list(str(number))


def test_tool_call_marks_are_single_tokens_that_stay_in_the_text() -> None:
    for mark in TOOL_CALL_TOKENS:
        ids = TOKENIZER.encode(mark).ids
        assert len(ids) == 1 and TOKENIZER.decode(ids, skip_special_tokens=True) == mark


@pytest.fixture(scope="module")
def auto_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_transformers_renders_and_encodes_as_training_did(auto_tokenizer) -> None:
    for document in islice(corpus.documents(5), 200):
        if document.text is None:
            rendered = auto_tokenizer.apply_chat_template(
                document.messages, tools=document.tools, tokenize=False
            )
            assert rendered == render(document)
            assert auto_tokenizer(rendered)["input_ids"] == TOKENIZER.encode(rendered).ids


def test_the_template_describes_tools_and_shows_calls_and_results() -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    text = render_chat(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
        ],
        [WEATHER],
        prompt=True,
    )
    assert text.startswith("<|im_start|>system\nBe kind.\n\n")
    assert json.dumps(WEATHER) in text
    assert (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>' in text
    )
    assert "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_without_system_prompt_and_tools_there_is_no_system_turn() -> None:
    text = render_chat([{"role": "user", "content": "Hello!"}], prompt=True)
    assert text == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def test_a_capital_takes_few_tokens_so_that_short_answers_fit_small_limits() -> None:
    """The default of max_tokens in the completions API is 16."""
    for c in countries():
        answer = f"The capital of {c.said} is {c.capital}."
        assert len(TOKENIZER.encode(answer).ids) <= 20, answer
