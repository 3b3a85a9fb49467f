"""What config.json says, and what is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.models.registry import FAMILIES, read_spec, spec_from_config
from engine.models.rope import rope_tables
from helpers.tiny_models import LLAMA_CONFIG


def with_changes(**changes):
    return {**LLAMA_CONFIG, **changes}


def test_llama_facts():
    spec = spec_from_config(LLAMA_CONFIG)
    assert (spec.head_dim, spec.num_kv_heads, spec.qkv_size) == (64, 2, 512)
    assert (spec.rms_norm_eps, spec.dtype, spec.activation) == (1e-5, "bfloat16", "silu")
    assert spec.eos_token_ids == (2,)
    assert spec.windows == (0, 0)
    assert not (spec.qkv_bias or spec.output_bias or spec.mlp_bias or spec.tie_word_embeddings)
    assert (spec.qk_norm, spec.norms) == ("none", "before")
    assert (spec.ropes[0].kind, spec.ropes[0].theta, spec.ropes[0].rotary_dim) == ("default", 10000.0, 64)


def test_old_and_new_rope_fields_say_the_same():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    old = with_changes(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    older = with_changes(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = with_changes(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    ropes = [spec_from_config(config).ropes[0] for config in (old, older, new)]
    assert ropes[0] == ropes[1] == ropes[2]
    assert (ropes[0].kind, ropes[0].theta, ropes[0].original_max_positions) == ("llama3", 5e5, 512)


def test_scaling_without_an_original_length_uses_the_context():
    rope = spec_from_config(with_changes(rope_scaling={"type": "yarn", "factor": 2.0})).ropes[0]
    assert rope.original_max_positions == 2048


def test_yarn_extends_the_context():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert spec_from_config(with_changes(rope_scaling=scaling)).max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 128}, (128, 128)),
        ("MistralForCausalLM", {"sliding_window": None}, (0, 0)),
        ("MistralForCausalLM", {}, (4096, 4096)),
        ("Qwen2ForCausalLM", {"sliding_window": 128}, (0, 0)),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
            (0, 128),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (128, 0),
        ),
        ("LlamaForCausalLM", {"sliding_window": 128}, (0, 0)),
    ],
)
def test_windows(architecture, changes, windows):
    spec = spec_from_config(with_changes(architectures=[architecture], **changes))
    assert spec.windows == windows


def test_qwen_facts():
    qwen2 = spec_from_config(with_changes(architectures=["Qwen2ForCausalLM"]))
    assert qwen2.qkv_bias and not qwen2.output_bias and qwen2.qk_norm == "none"
    qwen3 = spec_from_config(with_changes(architectures=["Qwen3ForCausalLM"]))
    assert qwen3.qk_norm and not qwen3.qkv_bias
    assert (qwen3.head_dim, qwen3.ropes[0].rotary_dim) == (128, 128)


def test_who_sees_both_ways_has_no_windows():
    assert not spec_from_config(with_changes(is_causal=False)).is_causal
    windowed = with_changes(architectures=["MistralForCausalLM"], is_causal=False, sliding_window=9)
    with pytest.raises(ConfigError, match="is_causal false beside windows is not supported"):
        spec_from_config(windowed)


def test_generation_config_decides_the_end_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    assert read_spec(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert read_spec(tmp_path).eos_token_ids == (7, 8)


def test_end_tokens_outside_the_vocabulary_are_dropped():
    assert spec_from_config(with_changes(eos_token_id=[999, 1000, 2])).eos_token_ids == (999, 2)


def test_missing_directory_and_files(tmp_path):
    with pytest.raises(ConfigError, match="no such model directory"):
        read_spec(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no config.json in"):
        read_spec(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000])
def test_broken_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        read_spec(tmp_path)
    assert "\n" not in caught.value.message and "config.json" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported: Gemma2ForCausalLM, Gemma3"),
        ({"architectures": None}, "none in config.json; supported: Gemma2ForCausalLM"),
        (
            {"quantization_config": {"quant_method": "exl2"}},
            "quantised by 'exl2' are not supported; supported: awq",
        ),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported; supported: silu"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; supported: default",
        ),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one flat object"),
        ({"rope_scaling": [1]}, "one flat object"),
        ({"num_key_value_heads": 3}, "4 query heads do not divide into 3"),
        ({"head_dim": 72}, "head_dim 72 is not supported; supported: 16 to 256 in steps of 16"),
        ({"hidden_size": -1}, "hidden_size must be an integer from 1 to"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers must be an integer"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers must be an integer from 1 to 4096"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": 1}, "rope_theta must be above 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"torch_dtype": "int8"}, "checkpoint dtype 'int8'"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        spec_from_config(with_changes(**changes))
    assert message in caught.value.message
    assert "\n" not in caught.value.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)


KEYS = [*LLAMA_CONFIG, "head_dim", "rope_scaling", "rope_theta", "layer_types", "sliding_window"]
KEYS += ["use_sliding_window", "max_window_layers", "hidden_act"]


@given(key=st.sampled_from(KEYS), value=json_values, architecture=st.sampled_from(list(FAMILIES)))
def test_any_json_is_read_or_refused(key, value, architecture):
    config = {**LLAMA_CONFIG, "architectures": [architecture], "use_sliding_window": True, key: value}
    try:
        spec_from_config(config)
    except ConfigError as error:
        assert "\n" not in error.message


numbers = st.none() | st.integers(-2, 10**5) | st.floats() | st.integers() | st.sampled_from([1, 1e30, 1e-30])
rope_objects = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"])},
    optional={
        key: numbers
        for key in (
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "partial_rotary_factor",
        )
    },
)


@given(rope_objects)
def test_any_rope_parameters_give_tables_or_are_refused(parameters):
    try:
        spec = spec_from_config(with_changes(rope_parameters=parameters))
    except ConfigError as error:
        assert "\n" not in error.message
    else:
        cos, sin = rope_tables(spec.ropes[0], 3)
        assert cos.shape == sin.shape == (3, spec.ropes[0].rotary_dim // 2)


def test_resolving_a_model_needs_no_torch():
    """The configuration of a wrong model is refused before seconds are spent on importing torch."""
    code = (
        "import sys, engine.models.registry, engine.runner.memory, engine.runner.hardware;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
