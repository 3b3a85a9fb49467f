"""Which architectures are served, by the name that config.json gives them. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from engine.errors import CheckpointError, ConfigError
from engine.gguf_file import GGUFFile, is_gguf
from engine.models import gemma, gpt_oss, granite, llama, mistral, mixtral, olmo, phi, qwen, smollm
from engine.models.checkpoint_files import usual_dtype
from engine.models.gguf_config import as_gguf_error, config_of
from engine.models.gguf_names import gguf_formats, largest_dequantized
from engine.models.hf_config import FamilyDefaults, check_supported, flag, read_config, read_facts, read_json
from engine.models.quantized_config import SUPPORTED, is_supported, quantized_matrices, read_quantization
from engine.models.spec import ModelSpec
from engine.models.text_part import name_in_part


class Family(NamedTuple):
    """What differs between architectures: `facts` returns the `ModelSpec` fields read in their own way."""

    facts: Callable[[Mapping[str, Any], ModelSpec], dict[str, Any]]
    defaults: FamilyDefaults = FamilyDefaults()
    quantization: str | None = None
    """`quant_method` of checkpoints that the family reads besides plain ones."""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "Gemma2ForCausalLM": Family(gemma.gemma2_facts, gemma.DEFAULTS),
        "Gemma3ForCausalLM": Family(
            gemma.gemma3_facts, gemma.DEFAULTS._replace(rope_theta=1e6, has_layered_rope=True)
        ),
        "GptOssForCausalLM": Family(gpt_oss.facts, gpt_oss.DEFAULTS, gpt_oss.QUANTIZATION),
        "GraniteForCausalLM": Family(granite.facts),
        "LlamaForCausalLM": Family(llama.facts),
        "MistralForCausalLM": Family(mistral.facts),
        "MixtralForCausalLM": Family(mixtral.facts),
        "Olmo2ForCausalLM": Family(olmo.facts),
        "Phi3ForCausalLM": Family(phi.facts),
        "Qwen2ForCausalLM": Family(qwen.qwen2_facts),
        "Qwen3ForCausalLM": Family(qwen.qwen3_facts, FamilyDefaults(head_dim=128)),
        "Qwen3MoeForCausalLM": Family(qwen.qwen3_moe_facts),
        "SmolLM3ForCausalLM": Family(smollm.facts, FamilyDefaults(rope_theta=2e6, ties_embeddings=True)),
    }
)


_HEADLESS = MappingProxyType(
    {name.replace("ForCausalLM", "Model"): name for name in FAMILIES}
    | {"Gemma3TextModel": "Gemma3ForCausalLM"}
)


def is_headless(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a decoder without a head for tokens, as embedding models are saved."""
    names = config.get("architectures")
    return isinstance(names, list) and any(isinstance(name, str) and name in _HEADLESS for name in names)


def sees_both_ways(config: Mapping[str, Any]) -> bool:
    """Whether tokens see later ones, in a decoder that was made into an encoder. Raises: `ConfigError`."""
    return flag(config, "use_bidirectional_attention") or not flag(config, "is_causal", True)


def has_native(config: Mapping[str, Any]) -> bool:
    """Whether a model of ours serves this architecture."""
    names = config.get("architectures")
    known = FAMILIES.keys() | _HEADLESS.keys()
    return isinstance(names, list) and any(isinstance(name, str) and name in known for name in names)


def read_spec(directory: str | Path) -> ModelSpec:
    """The facts of a checkpoint, from its config.json and, if there is one, generation_config.json; those of
    a GGUF file from its metadata.

    Raises: `ConfigError`, one line, when a file is missing or broken, or when the architecture or
    one of its features is not supported.
    """
    if is_gguf(directory):
        return _read_gguf_spec(GGUFFile(directory))
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"no such model directory: {directory}")
    config = _with_dtype(read_config(directory), directory)
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    spec = spec_from_config(config, generation)
    quantizations = read_quantization(config)
    if not quantizations:
        return spec
    found = quantized_matrices(directory, quantizations)
    formats = {name_in_part(name): matrix.packed_as for name, matrix in found.items()}
    in_full = [matrix.num_elements for matrix in found.values() if matrix.packed_as is None]
    stored = {name: kind for name, kind in formats.items() if kind is not None}
    return dataclasses.replace(spec, stored=stored, largest_dequantized=max(in_full, default=0))


def _with_dtype(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Where config.json names none, as that of gpt-oss, the dtype is that of the files, if there are any."""
    if any(config.get(key) is not None for key in ("dtype", "torch_dtype")):
        return config
    try:
        return {**config, "dtype": usual_dtype(directory)}
    except CheckpointError:  # told when the weights are loaded, if they are
        return config


def _read_gguf_spec(file: GGUFFile) -> ModelSpec:
    try:
        spec = spec_from_config(config_of(file))
    except CheckpointError:
        raise
    except ConfigError as error:
        raise as_gguf_error(file, error) from None
    # Norm weights are what is multiplied by: the offset of Gemma's is in them.
    return dataclasses.replace(
        spec, norm_offset=0.0, stored=gguf_formats(file), largest_dequantized=largest_dequantized(file)
    )


def spec_from_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelSpec:
    """The same from the parsed JSON objects."""
    architecture = architecture_of(config)
    family = FAMILIES[architecture]
    facts = read_facts(config, generation or {}, family.defaults)
    spec = ModelSpec(architecture=architecture, **facts)
    spec = dataclasses.replace(spec, **family.facts(config, spec), is_causal=not sees_both_ways(config))
    if not flag(config, "is_causal", True) and any(spec.windows):
        raise ConfigError("config.json: is_causal false beside windows is not supported")
    check_supported(spec)
    return spec


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first supported name in `architectures`.

    Raises: `ConfigError` that lists what is supported; also for ways of quantising that are not known.
    """
    names = config.get("architectures")
    if not isinstance(names, list):
        names = []
    for name in names:
        name = _HEADLESS.get(name, name) if isinstance(name, str) else name
        if isinstance(name, str) and name in FAMILIES:
            _check_quantization(config.get("quantization_config"), FAMILIES[name].quantization)
            return name
    found = ", ".join(map(str, names)) or "none in config.json"
    raise ConfigError(f"unsupported architecture: {found}; supported: {', '.join(FAMILIES)}")


def _check_quantization(quantization: Any, supported: str | None) -> None:
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method is None or (method != supported and not is_supported(method)):
        raise ConfigError(
            f"checkpoints quantised by {method!r:.80} are not supported; supported: {SUPPORTED}"
        )
