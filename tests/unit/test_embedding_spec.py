"""What is read from an embedding checkpoint, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError
from engine.models.embedding_spec import read_embedding_spec
from engine.models.encoder_registry import read_encoder_spec
from helpers.embedding_models import MINILM, NORMALIZE, load, make_model, pooling, write_modules
from helpers.tiny_models import make_model as make_decoder
from helpers.tiny_models import save_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_minilm() -> None:
    spec = read_embedding_spec(MINILM)
    assert (spec.pooling, spec.is_normalized, spec.max_len) == (("mean",), True, 256)
    assert (spec.dimensions, spec.any_dimension, spec.prompts) == ((), False, {})
    assert spec.similarity == "cosine"


def test_everything_is_read(directory: Path) -> None:
    (directory / "config.json").write_text('{"matryoshka_dimensions": [64, 32]}')
    prompts = {"query": "ask: ", "document": ""}
    write_modules(
        directory,
        ("Pooling", {"pooling_mode": "lasttoken"}),
        (
            "Dense",
            {"in_features": 8, "out_features": 4, "bias": False, "activation_function": "a.b.Identity"},
        ),
        ("Dropout", {}),
        NORMALIZE,
        sentence_bert_config={"max_seq_length": 99, "do_lower_case": True},
        config_sentence_transformers={
            "prompts": prompts,
            "default_prompt_name": "document",
            "similarity_fn_name": "dot",
        },
    )
    spec = read_embedding_spec(directory)
    assert (spec.pooling, spec.is_normalized, spec.max_len, spec.lowers_case) == (("last",), True, 99, True)
    assert (spec.prompts, spec.default_prompt, spec.dimensions) == (prompts, "document", (32, 64))
    assert spec.size(8) == 4 and spec.similarity == "dot"
    with pytest.raises(ConfigError, match="in_features is 8, but it is given 16"):
        spec.size(16)
    assert read_embedding_spec(directory, pooling="cls").pooling == ("cls",)
    assert read_embedding_spec(directory, dimensions="16,8").dimensions == (8, 16)
    assert read_embedding_spec(directory, dimensions="any").any_dimension


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "lists no Pooling module"),
        ([NORMALIZE], "'Normalize' at place 1 is not supported"),
        ([("CNN", {})], "'CNN' at place 1 is not supported"),
        ([("LayerNorm", {"dimension": 4})], "'LayerNorm' at place 1 is not supported"),
        ([pooling("mean_tokens"), ("LayerNorm", {})], "lacks dimension"),
        (
            [pooling("mean_tokens"), NORMALIZE, ("LayerNorm", {"dimension": 4})],
            "a LayerNorm module after Normalize is not supported",
        ),
        (
            [pooling("mean_tokens"), NORMALIZE, ("Dense", {"in_features": 4, "out_features": 4})],
            "after Normalize",
        ),
        ([pooling("mean_tokens"), pooling("mean_tokens")], "'Pooling' at place 2 is not supported"),
        ([("Pooling", {})], "no supported pooling mode"),
        ([("Pooling", {"pooling_mode": "attention"})], "no supported pooling mode: attention"),
        ([("Pooling", {"pooling_mode": 3})], "pooling_mode must be a name"),
        ([("Pooling", {"pooling_mode_mean_tokens": "yes"})], "must be true or false"),
        ([("Pooling", {"pooling_mode": "mean", "include_prompt": False})], "include_prompt false"),
        ([pooling("mean_tokens"), ("Dense", {"in_features": 4})], "lacks out_features"),
        (
            [pooling("mean_tokens"), ("Dense", {"in_features": 4, "out_features": 4, "use_residual": True})],
            "use_residual is not supported",
        ),
        (
            [
                pooling("mean_tokens"),
                ("Dense", {"in_features": 4, "out_features": 4, "module_input_name": "token_embeddings"}),
            ],
            "module_input_name must be sentence_embedding",
        ),
        (
            [
                pooling("mean_tokens"),
                ("Dense", {"in_features": 4, "out_features": 4, "activation_function": "os.system"}),
            ],
            "activation_function 'os.system' is not supported",
        ),
    ],
)
def test_modules_that_are_refused(directory: Path, modules: list, message: str) -> None:
    write_modules(directory, *modules)
    with pytest.raises(ConfigError, match=message) as caught:
        read_embedding_spec(directory)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read modules.json"),
        ("{", "cannot read modules.json"),
        ("[" * 100_000, "cannot read modules.json"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ("[1]", "must hold a list"),
        ('[{"type": "a.Pooling", "path": ""}]', "the first module must be a Transformer"),
        ('[{"type": "a.Transformer", "path": "0_Transformer"}]', "folder .0_Transformer. has no config.json"),
        ('[{"type": "custom_st.Transformer", "path": ""}]', "'custom_st.Transformer' is code of"),
        ('[{"type": "a.Transformer", "path": "\\ud800"}]', "is no folder"),
        ('[{"type": 3, "path": ""}]', "needs a type and a path"),
        ('[{"type": "a.Transformer"}]', "needs a type and a path"),
        ('[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "../x"}]', "is no folder"),
        ('[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "/etc"}]', "is no folder"),
        ('[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": ".."}]', "is no folder"),
        ('[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "p"}]', "no config.json"),
    ],
)
def test_broken_lists_of_modules(directory: Path, content: str, message: str) -> None:
    (directory / "modules.json").write_text(content.replace('"a.', '"sentence_transformers.'))
    with pytest.raises(ConfigError, match=message):
        read_embedding_spec(directory)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"sentence_bert_config": {"max_seq_length": -1}}, "max_seq_length"),
        (
            {"sentence_bert_config": {"max_seq_length": "many"}},
            "^sentence_bert_config.json: max_seq_length must",
        ),
        ({"sentence_bert_config": {"do_lower_case": 1}}, "^sentence_bert_config.json: do_lower_case must"),
        ({"sentence_bert_config": []}, "must hold a JSON object"),
        ({"sentence_bert_config": {"query_length": 32}}, "query_length is not supported"),
        ({"sentence_bert_config": {"transformer_task": "fill-mask"}}, "transformer_task must be one of"),
        (
            {"sentence_bert_config": {"modality_config": {"text": {"method_output_name": "hidden_states"}}}},
            "modality_config must have text",
        ),
        (
            {"sentence_bert_config": {"model_args": {"is_causal": False}}},
            r"model_args {.is_causal.: False} is not supported",
        ),
        ({"sentence_bert_config": {"model_kwargs": [[1]]}}, "model_kwargs .* is not supported"),
        (
            {"sentence_roberta_config": {"max_seq_length": -1}},
            "^sentence_roberta_config.json: max_seq_length",
        ),
        ({"config_sentence_transformers": {"truncate_dim": 64}}, "truncate_dim is not supported"),
        ({"config_sentence_transformers": {"activation_fn": 3}}, "activation_fn must be a name"),
        ({"config_sentence_transformers": {"prompts": {"a": 3}}}, "prompts must map"),
        ({"config_sentence_transformers": {"prompts": [1]}}, "prompts must map"),
        (
            {"config_sentence_transformers": {"similarity_fn_name": "maxsim"}},
            "similarity_fn_name 'maxsim' is not supported; supported: cosine, dot",
        ),
        ({"config_sentence_transformers": {"similarity_fn_name": [1]}}, r"similarity_fn_name \[1\] is not"),
        ({"config_sentence_transformers": {"default_prompt_name": "a"}}, "there is no prompt 'a'"),
        ({"config_sentence_transformers": {"default_prompt_name": ["a"]}}, r"there is no prompt \['a'\]"),
        ({"config": {"matryoshka_dimensions": [0]}}, "matryoshka_dimensions must be positive"),
        ({"config": {"matryoshka_dimensions": "64"}}, "matryoshka_dimensions must be positive"),
        ({"config": {"is_matryoshka": 1}}, "is_matryoshka must be true or false"),
    ],
)
def test_other_broken_files(directory: Path, files: dict[str, Any], message: str) -> None:
    write_modules(directory, pooling("mean_tokens"), **files)
    with pytest.raises(ConfigError, match=message):
        read_embedding_spec(directory)


def test_the_limit_in_the_file_of_an_old_version(directory: Path) -> None:
    write_modules(directory, pooling("mean_tokens"), sentence_distilbert_config={"max_seq_length": 8})
    assert read_embedding_spec(directory).max_len == 8
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    assert read_embedding_spec(directory).max_len == 9


def test_nothing_said_about_pooling_is_asked_for(directory: Path) -> None:
    with pytest.raises(ConfigError, match="give --pooling"):
        read_embedding_spec(directory)
    with pytest.raises(ConfigError, match="--matryoshka-dimensions must be positive numbers"):
        read_embedding_spec(directory, pooling="mean", dimensions="64,many")


# --- whole checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    make_model("bert").save_pretrained(directory)
    return write_modules(directory, pooling("mean_tokens"), NORMALIZE)


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    for path in saved.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(saved)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_pickled_checkpoint_is_never_loaded(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which is never loaded" in refusal(broken)


def test_a_truncated_file(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is broken or truncated" in refusal(broken)


def test_tensors_too_few_too_many_or_of_another_shape(broken: Path) -> None:
    path = broken / "model.safetensors"
    tensors = load_file(path)
    name = "encoder.layer.1.output.dense.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, path)
    assert f"tensor {name} has shape [63, 96], expected [64, 96]" in refusal(broken)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    assert f"the checkpoint lacks {name}" in refusal(broken)
    save_file({**tensors, "encoder.extra": tensors[name].clone()}, path)
    assert "has tensors that this architecture does not: encoder.extra" in refusal(broken)


def test_old_names_of_norms_and_the_prefix_of_heads(broken: Path, saved: Path) -> None:
    path = broken / "model.safetensors"
    renamed = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in load_file(path).items()
    }
    save_file(renamed, path)
    assert load(broken).info == load(saved).info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForQuestionAnswering"]}, "unsupported architecture"),
        ({"architectures": "BertModel"}, "unsupported architecture"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 3}, "heads of a hidden size of 64 are not supported"),
        ({"num_attention_heads": 16}, "heads of a hidden size of 64 are not supported"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be absolute"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps"),
        ({"is_decoder": True}, "is_decoder is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config is not supported"),
    ],
)
def test_configurations_that_are_refused(broken: Path, changes: dict[str, Any], message: str) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert message in refusal(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation relu is not supported"),
        ({"classifier_pooling": "max"}, "classifier_pooling must be cls or mean"),
        ({"norm_bias": True}, "norm_bias true is not supported"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types must name"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling is not supported"),
        ({"rope_parameters": {"rope_theta": 3.0}}, "rope_parameters must have full_attention and"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            "are not supported",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor is not supported",
        ),
    ],
)
def test_settings_of_modernbert_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = make_model("modernbert").config.to_dict() | {"architectures": ["ModernBertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_encoder_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=message):
        read_encoder_spec(tmp_path)


def test_the_longest_text_is_the_least_of_all_limits(broken: Path) -> None:
    assert load(broken).info.max_len == 300
    assert load(broken, context_length=20).info.max_len == 20
    (broken / "sentence_bert_config.json").write_text('{"max_seq_length": 15}')
    assert load(broken, context_length=20).info.max_len == 15
    (broken / "sentence_bert_config.json").unlink()
    (broken / "tokenizer_config.json").write_text('{"model_max_length": 17}')  # as versions since 5 save it
    assert load(broken).info.max_len == 17
    (broken / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    assert load(broken).info.max_len == 300


def test_a_mislabelled_checkpoint(broken: Path) -> None:
    """Weights of one family under the name of another."""
    path = broken / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["ModernBertModel"], "hidden_activation": "gelu"}))
    with pytest.raises(CheckpointError, match="the checkpoint lacks"):
        load(broken)
    path.write_text(json.dumps({**config, "architectures": ["RobertaModel"], "max_position_embeddings": 1}))
    with pytest.raises(ConfigError, match="leaves no position"):
        read_encoder_spec(broken)


def test_a_decoder_that_only_transformers_knows_does_not_embed_alone(tmp_path: Path) -> None:
    save_model(make_decoder("stablelm"), tmp_path)
    write_modules(tmp_path, pooling("lasttoken"), NORMALIZE)
    with pytest.raises(ConfigError, match="unsupported architecture for embeddings alone: .'StableLmFor"):
        load(tmp_path)
