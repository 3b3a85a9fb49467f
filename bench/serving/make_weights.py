"""The checkpoints that bench/compare.py serves, the same weights in the form that each engine reads.

    python bench/serving/make_weights.py WEIGHTS [--only qwen05|tiny]

qwen05 has random weights (from a fixed seed) of the shape in qwen05.json, tiny is the bundled model. WEIGHTS
gets of each a folder with safetensors in bfloat16, and GGUF files in bf16, f16, q8_0 and q4_0; qwen05-w8a8 is
int8 weights and activations as compressed-tensors, for vLLM. Speed does not depend on the values.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from own_server import write_shape
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from engine.config.model_location import bundled_model

SEED = 1234
GGUF_KINDS = {
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


def make_qwen05(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_shape(Path(__file__).with_name("qwen05.json"), folder)
    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)


def make_tiny(folder: Path) -> None:
    shutil.copytree(bundled_model(), folder, dirs_exist_ok=True)


def write_gguf(folder: Path, path: Path, kind_name: str) -> None:
    """Write a Llama or Qwen2 checkpoint as a GGUF file, matrices in one of `GGUF_KINDS`."""
    kind, file_type = GGUF_KINDS[kind_name]
    config = AutoConfig.from_pretrained(folder)
    (architecture,) = (a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, config.model_type)
    _add_facts(writer, config)
    writer.add_file_type(file_type)
    _add_tokenizer(writer, folder / "tokenizer.json")
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            is_query = name.endswith("q_proj.weight")
            values = _pair_rotated(
                values, config.num_attention_heads if is_query else config.num_key_value_heads
            )
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 2:
            writer.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pair_rotated(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head in llama.cpp's order: the two numbers that are rotated together stand together."""
    num_rows, num_columns = values.shape
    by_half = values.reshape(num_heads, 2, num_rows // num_heads // 2, num_columns)
    return np.ascontiguousarray(by_half.swapaxes(1, 2)).reshape(num_rows, num_columns)


def _add_facts(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    """The byte-level vocabulary of a tokenizer.json. Prompts are token ids, so how it splits says nothing."""
    tokenizer = json.loads(path.read_text())
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    spelled = {token_id: token for token, token_id in tokenizer["model"]["vocab"].items()} | added
    kinds = [gguf.TokenType.CONTROL if i in added else gguf.TokenType.NORMAL for i in range(len(spelled))]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([spelled[token_id] for token_id in range(len(spelled))])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def write_w8a8(source: Path, folder: Path) -> None:
    """The layers' matrices in int8 with a scale a row, and activations to become int8 with one a token."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = weight
        if "_proj.weight" in name:
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


MODELS = {"qwen05": make_qwen05, "tiny": make_tiny}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--only", choices=MODELS)
    args = parser.parse_args()
    for name in [args.only] if args.only else MODELS:
        folder = args.weights / name
        MODELS[name](folder)
        for kind in GGUF_KINDS:
            write_gguf(folder, args.weights / f"{name}-{kind}.gguf", kind)
        if name == "qwen05":
            write_w8a8(folder, args.weights / "qwen05-w8a8")
        print(f"{folder}: written", flush=True)


if __name__ == "__main__":
    main()
