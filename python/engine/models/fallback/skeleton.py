"""A transformers model whose matrices and attention are ours, before it has weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import ConfigError
from engine.models.fallback import attention
from engine.models.fallback.packed_weight import PackedStack, PackedWeight, UnknownUse, packed
from engine.models.fallback.spec import TransformersSpec
from engine.models.fallback.written_out import CacheView
from engine.models.hf_config import (
    LAYER_TYPES,
    MAX_EXPERTS,
    MAX_LAYERS,
    dtype_of,
    eos_token_ids,
    integer,
    read_json,
)
from engine.models.quantized_config import SUPPORTED, is_supported, quantized_matrices, read_quantization

MAX_HEAD_DIM = 256
_HEAD_DIM_STEP = 16
_DRY_TOKENS = 4
_CHUNKED = ("chunked_attention",)
"""Left to the mask, which tells when a chunk is smaller than the context."""
_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds whose angles do not depend on how long the longest text in a batch is."""


_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CONTEXTS = ("max_position_embeddings", "max_seq_len", "seq_length")
_LONGEST_CONTEXT = 2**24
"""Masks are asked for each position of a context, and biases made."""
_USUAL_CONTEXT = 2048
"""Of models with biases for positions that do not say for how many they were made."""


class _AsksNoRegistry(Exception):
    """A model's attention does not ask transformers' registry. `reason`: what else failed."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Skeleton:
    """`model` computes logits, `base` in it, called `base_name`, hidden states. `writes_out`: its modules
    write their attention out, and must be given a `view`.

    Both use `weights` that are not there yet, and `plain` parameters and buffers, which stay torch's. Nothing
    of the weights' size is touched.

    Raises: `ConfigError`, one line, for models that cannot run this way.
    """

    def __init__(self, directory: str | Path, *, trusts_remote_code: bool) -> None:
        directory = Path(directory)
        raw = read_json(directory / "config.json")
        _check_configuration(raw, trusts_remote_code)
        _check_counts(raw)
        self.attention = attention.PagedAttention()
        self.weights: dict[str, PackedWeight | PackedStack] = {}
        self.plain: dict[str, torch.Tensor] = {}
        self.writes_out = False
        try:
            logits = self._build(directory, trusts_remote_code)
        except _AsksNoRegistry:
            self.writes_out = True
            try:
                logits = self._build(directory, trusts_remote_code)
            except _AsksNoRegistry as error:
                kind = ", ".join(map(str, raw.get("architectures") or ()))
                raise ConfigError(
                    f"the attention of {kind:.80} neither goes through transformers' registry nor is written "
                    f"out over a cache of keys and values{error.reason}"
                ) from None
        self.base: nn.Module = self.model.get_decoder()
        names = [name for name, module in self.model.named_modules() if name and module is self.base]
        if not names:
            raise ConfigError(f"{type(self.model).__name__} has no body apart from its head")
        self.base_name = names[0]
        self.vocab_size: int = logits.shape[-1]
        self._raw, self._directory, self._trusts_remote_code = raw, directory, trusts_remote_code

    def _build(self, directory: Path, trusts_remote_code: bool) -> torch.Tensor:
        """Logits of the dry run."""
        self.model: nn.Module = _construct(directory, trusts_remote_code, self.writes_out)
        self.model.eval()
        self.own_attention: str = self.model.config._attn_implementation
        """Transformers' own, which modules that write attention out go by."""
        if self.writes_out:
            _separate_masks(self.model)
        self.config = self.model.config.get_text_config()
        _check_layers(self.config)
        _check_rope(self.config)
        self.context_length = _context_length(self.config)
        return self._run_dry()

    def view(self, num_tokens: int) -> dict[str, CacheView]:
        """What modules that write attention out are given in a step."""
        if not self.writes_out:
            return {}
        return {"past_key_values": CacheView(self.attention, self.context_length, num_tokens)}

    @property
    def spec(self) -> TransformersSpec:
        layers = self.attention.layers
        head_dim = max(max(layer.key_dim, layer.value_dim) for layer in layers.values())
        head_dim = -(-head_dim // _HEAD_DIM_STEP) * _HEAD_DIM_STEP
        if head_dim > MAX_HEAD_DIM:
            raise ConfigError(f"a head of {head_dim} numbers is not supported; at most {MAX_HEAD_DIM} are")
        generation_path = self._directory / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        return TransformersSpec(
            architecture=type(self.model).__name__,
            hidden_size=self.config.hidden_size,
            num_layers=len(layers),
            num_kv_heads=max(layer.num_kv_heads for layer in layers.values()),
            head_dim=head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context_length,
            eos_token_ids=eos_token_ids(self._raw, generation, self.vocab_size),
            dtype=dtype_of(self._raw.get("text_config") or self._raw),
            num_parameters=sum(weight.shape.numel() for weight in self.weights.values()),
            layers=tuple(sorted(layers.items())),
            trusts_remote_code=self._trusts_remote_code,
            largest_dequantized=self._largest_dequantized(),
        )

    def _largest_dequantized(self) -> int:
        quantizations = read_quantization(self._raw)
        if not quantizations:
            return 0
        found = quantized_matrices(self._directory, quantizations)
        return max(matrix.num_elements for matrix in found.values())

    def _run_dry(self) -> torch.Tensor:
        """Logits of a few tokens, all weights being 0; a parameter that is used in a way we do not know
        stays torch's."""
        kinds = type(self.model).__name__
        parameters = dict(self.model.named_parameters())
        kept: set[str] = set()
        self._owners: list[tuple[nn.Module, str, str]] = []
        for module in self.model.modules():
            module.engine_attention = self.attention
        while True:
            self._replace(parameters, kept)
            self.attention.layers.clear()
            try:
                logits = self._logits_of_nothing()
                break
            except UnknownUse as use:
                if use.name not in parameters or use.name in kept:
                    raise ConfigError(f"{kinds} cannot run through transformers here: {use}") from None
                kept.add(use.name)
            except ConfigError:
                raise
            except Exception as error:  # whatever a module does without a cache of transformers
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                if not self.attention.layers:
                    raise _AsksNoRegistry(f": {reason}") from None
                raise ConfigError(f"{kinds} cannot run through transformers here: {reason}") from None
        if not self.attention.layers:
            raise _AsksNoRegistry
        return logits

    @torch.no_grad()
    def _logits_of_nothing(self) -> torch.Tensor:
        ids = torch.zeros(1, _DRY_TOKENS, dtype=torch.int64)
        positions = torch.arange(_DRY_TOKENS)[None]
        view = self.view(_DRY_TOKENS)
        return self.model(input_ids=ids, position_ids=positions, use_cache=False, **view).logits

    def _replace(self, parameters: Mapping[str, nn.Parameter], kept: set[str]) -> None:
        """Put stand-ins where matrices were, and zeros where the rest was; what is tied stays tied."""
        names = {id(parameter): name for name, parameter in reversed(list(parameters.items()))}
        exact = set(_exact_names(self.model))
        if not self._owners:
            self._owners = [
                (module, key, names[id(parameter)])
                for module in self.model.modules()
                for key, parameter in module._parameters.items()
                if parameter is not None
            ]
        self.weights.clear()
        self.plain = {name: buffer for name, buffer in _persistent_buffers(self.model)}
        for module, key, name in self._owners:
            shape = parameters[name].shape
            module._parameters.pop(key, None)
            module.__dict__.pop(key, None)
            if len(shape) in (2, 3) and name not in kept:
                if name not in self.weights:
                    self.weights[name] = packed(name, shape, is_exact=name in exact)
                setattr(module, key, self.weights[name])
            else:
                self.plain.setdefault(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
                module._parameters[key] = self.plain[name]


def _exact_names(model: nn.Module) -> Iterator[str]:
    """Matrices that are never quantized: routers, and tables other than that of tokens."""
    tokens = model.get_input_embeddings()
    for prefix, module in model.named_modules():
        own = [f"{prefix}.{key}" for key, parameter in module._parameters.items() if parameter is not None]
        if isinstance(module, nn.Embedding):
            yield from own if module is not tokens else ()
        elif not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            yield from (name for name in own if name.endswith(".weight"))
        if "experts" in module._modules:
            for child, part in module._modules.items():
                if isinstance(part, nn.Linear):
                    yield f"{prefix}.{child}.weight"


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield f"{prefix}.{key}" if prefix else key, buffer


def _separate_masks(model: nn.Module) -> None:
    """Let models make masks of ours, while the modules in them still see the attention they were made for."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel) and hasattr(module, "config"):
            module.config = copy.copy(module.config)
    model.config._attn_implementation = attention.WRITTEN_OUT


def _context_length(config: Any) -> int:
    found = [getattr(config, name) for name in _CONTEXTS if getattr(config, name, None) is not None]
    if not all(isinstance(length, int) and 1 <= length <= _LONGEST_CONTEXT for length in found):
        raise ConfigError(
            f"config.json: max_position_embeddings must be from 1 to {_LONGEST_CONTEXT}, got {found!r:.80}"
        )
    return found[0] if found else _USUAL_CONTEXT


def _construct(directory: Path, trusts_remote_code: bool, writes_out: bool) -> nn.Module:
    """The modules, their parameters in memory that nobody touches."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    attention.register()
    options: dict[str, Any] = {"trust_remote_code": trusts_remote_code}
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, **options)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are ours to read
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError("encoder-decoder models are not supported")
        if not trusts_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            names = ", ".join(map(str, getattr(config, "architectures", None) or ()))
            raise ConfigError(
                f"unsupported architecture: {names:.80}; transformers has no decoder of the model type "
                f"{config.model_type!r:.80}"
            )
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
        options["dtype"] = torch.float32
        # None: transformers' choice, and not that of config.json, which may name code to be fetched.
        options["attn_implementation"] = None if writes_out else attention.NAME
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, **options)
        if getattr(model, "_is_stateful", False):
            raise ConfigError(
                f"{type(model).__name__} keeps a state from token to token, as state-space and recurrent "
                "models do, which is not supported"
            )
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
        model.tie_weights()
        _check_sizes(model, _fields_of_zero(directory))
        return model
    except ConfigError:
        raise
    except KeyError as error:
        if error.args == (attention.NAME,):
            raise _AsksNoRegistry from None
        raise ConfigError(f"transformers cannot build this model: it lacks {error}") from None
    except Exception as error:  # a configuration is foreign input, and so is the code that reads it
        reason = " ".join(str(error).split())[:200]
        zeros = _fields_of_zero(directory)
        raise ConfigError(f"transformers cannot build this model: {reason}{zeros}") from None


def _check_sizes(model: nn.Module, zeros: str) -> None:
    """Raises: `ConfigError` for a matrix without rows or columns; `zeros` is what may be why."""
    for name, parameter in model.named_parameters():
        if 0 in parameter.shape:
            raise ConfigError(f"config.json: {name} would have shape {list(parameter.shape)}{zeros}")


def _fields_of_zero(directory: Path) -> str:
    """The end of a message that names them, empty if there is none."""
    raw = read_json(directory / "config.json")
    nested = raw.get("text_config")
    facts = {**raw, **(nested if isinstance(nested, dict) else {})}
    zeros = [key for key, value in facts.items() if type(value) is int and not value and key[-3:] != "_id"]
    return f"; fields of config.json that are 0: {', '.join(zeros)}" if zeros else ""


def _check_configuration(config: Mapping[str, Any], trusts_remote_code: bool) -> None:
    """What can be said before anything is built. Raises: `ConfigError`."""
    facts = config.get("quantization_config")
    method = facts.get("quant_method") if isinstance(facts, Mapping) else None
    if facts is not None and not is_supported(method):
        raise ConfigError(
            f"checkpoints quantised by {method!r:.80} are not supported; supported: {SUPPORTED}"
        )
    read_quantization(config)
    if config.get("is_encoder_decoder"):
        raise ConfigError("encoder-decoder models are not supported")
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if trusts_remote_code or (isinstance(kind, str) and kind in CONFIG_MAPPING):
        return
    if isinstance(config.get("auto_map"), Mapping):
        raise ConfigError(
            f"the model type {kind!r:.80} is code in the checkpoint, which is run "
            "only with --trust-remote-code"
        )
    names = config.get("architectures")
    found = ", ".join(map(str, names)) if isinstance(names, list) and names else "none in config.json"
    raise ConfigError(
        f"unsupported architecture: {found:.80}; neither this engine nor transformers knows the model type "
        f"{kind!r:.80}"
    )


def _check_counts(config: Mapping[str, Any]) -> None:
    """Of modules, which transformers builds one by one. Raises: `ConfigError`."""
    nested = config.get("text_config")
    for facts in (config, nested if isinstance(nested, Mapping) else {}):
        for key in _LAYERS:
            integer(facts, key, 1, minimum=0, maximum=MAX_LAYERS)
        for key in _EXPERTS:
            integer(facts, key, 1, minimum=0, maximum=MAX_EXPERTS)


def _check_layers(config: Any) -> None:
    others = set(getattr(config, "layer_types", None) or ()).difference(LAYER_TYPES, _CHUNKED)
    if others:
        kinds = ", ".join(sorted(map(str, others)))
        raise ConfigError(f"layers of kind {kinds} keep more than keys and values, which is not supported")


def _check_rope(config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    if not isinstance(parameters, Mapping):
        return
    nested = [item for item in parameters.values() if isinstance(item, Mapping)]
    for kind in (item.get("rope_type", "default") for item in nested or [parameters]):
        if kind not in _ROPES:
            raise ConfigError(
                f"rope scaling {kind!r:.80} is not supported through transformers: its angles depend on the "
                "longest text in a batch"
            )
