"""Tiny random models, made and saved by transformers, and a configuration on its own."""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB_SIZE = 512
CONTEXT = 64
WINDOW = 64
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": CONTEXT,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
"""A config.json as older transformers wrote it."""

_GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
_GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.09,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.5,
}
_QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
_GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": _MIXED}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(24)],
    "long_factor": [2.0 + 0.3 * i for i in range(24)],
}

KINDS = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", {"rope_parameters": _LINEAR, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {**_QWEN_WINDOW, "tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("Qwen3", {**_QWEN_WINDOW, "head_dim": 80}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 8.0, "final_logit_softcapping": 6.0}),
    "gemma3": ("Gemma3Text", {**_GEMMA, "layer_types": _MIXED, "rope_parameters": _GEMMA3_ROPE}),
    "gpt_oss": ("GptOss", {**_GPT_OSS, "rope_parameters": {**_YARN, "truncate": False}}),
    "granite": ("Granite", _GRANITE),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3_long": (
        "Phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 1000, "hidden_size": 256},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN_MOE, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe_shares": ("Qwen3Moe", _QWEN_MOE),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
}

_MLA = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 16,
    "num_key_value_heads": 4,
}
_ROUTED = {
    "n_routed_experts": 32,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
}
_OLMOE = {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32}
_UNTIED = {"head_dim": None, "tie_word_embeddings": False}
_GPT = {**_UNTIED, "rotary_dim": 16}
_LOCAL = {"attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW}
WRITTEN_OUT_KINDS = {
    "bloom": ("Bloom", {**_UNTIED, "num_attention_heads": 6, "hidden_size": 96}),
    "codegen": ("CodeGen", _GPT),
    "falcon": ("Falcon", _UNTIED),
    "falcon_new": ("Falcon", {**_UNTIED, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neo": ("GPTNeo", {**_UNTIED, **_LOCAL}),
    "gptj": ("GPTJ", _GPT),
    "mpt": ("Mpt", {**_UNTIED, "max_seq_len": 1024}),
    "xglm": ("XGLM", {**_UNTIED, "ffn_dim": 192}),
}
"""What runs through transformers, its modules writing their attention out: biases of positions (ALiBi),
windows, one key head for all queries, rotary and learned positions."""

TRANSFORMERS_KINDS = {
    "cohere2": ("Cohere2", {"sliding_window": WINDOW, "logit_scale": 1.0, "layer_types": _MIXED}),
    "deepseek_v3": ("DeepseekV3", {**_MLA, **_ROUTED}),
    "olmoe": ("Olmoe", _OLMOE),
    "stablelm": ("StableLm", {"head_dim": 32, "use_qkv_bias": True}),
}
"""What runs through transformers: LayerNorm, partial and interleaved rotary positions, heads of two sizes,
experts of two kinds, parallel blocks."""

SEEDS = {"olmo2": 3, "qwen3_moe_shares": 2, "bloom": 8, "mpt": 3, "xglm": 1}
"""Where seed 0 makes a model that repeats itself."""


def make_model(kind: str, seed: int | None = None, **changes):
    """A float32 model in eval mode. `changes` replace fields of its configuration."""
    import transformers

    family, fields = (KINDS | TRANSFORMERS_KINDS | WRITTEN_OUT_KINDS)[kind]
    config_class = getattr(transformers, f"{family}Config")
    given = {**_SIZES, **fields, **changes}
    config = config_class(**{key: value for key, value in given.items() if value is not None})
    config._attn_implementation = _reference(config)
    torch.manual_seed(SEEDS.get(kind, 0) if seed is None else seed)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    gain = 3.0 if kind in WRITTEN_OUT_KINDS.keys() - {"gpt_neo"} else 1.5  # whose scores are not scaled down
    return fill_at_random(model, family, gain)


def _reference(config) -> str:
    """Transformers' own attention to compare with. Falcon's eager one adds the bias of positions twice."""
    return "sdpa" if config.model_type == "falcon" else "eager"


def fill_at_random(model, family: str, gain: float = 1.5):
    """Weights so that tokens depend on their context, not only on the last token, and logits spread by more
    than 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("norm" in name or "ln_" in name) and not name.endswith("bias"):
                parameter.copy_(_norm_weight(family, name) + 0.2 * torch.randn_like(parameter))
            elif name.endswith("sinks"):
                parameter.normal_(2, 1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif any(part in name for part in ("embed_tokens", "word_embeddings", "wte", "lm_head")):
                parameter.normal_(0, 0.12)
            else:
                is_of_scores = "q_proj" in name or "k_proj" in name
                parameter.normal_(0, gain * (1.4 / 1.5 if is_of_scores else 1) / parameter.shape[-1] ** 0.5)
    return model


def _norm_weight(family: str, name: str) -> float:
    """About 1 in effect; more where an update is normalised before it joins a large residual stream."""
    is_gemma = family.startswith("Gemma")
    normalises_updates = is_gemma or family == "Olmo2"
    is_of_update = normalises_updates and ("post_attention" in name or "post_feedforward" in name)
    return (16.0 if is_of_update else 1.0) - (1.0 if is_gemma else 0.0)


def save_model(model, directory: Path, **options) -> Path:
    """Save in Hugging Face format; `options` go to `save_pretrained`."""
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory, **options)
    return directory


def load_model(directory: Path, dtype: torch.dtype):
    """What transformers makes of a saved model: unlike `model.to(dtype)`, its rotary tables stay float32."""
    import transformers

    reference = _reference(transformers.AutoConfig.from_pretrained(directory))
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=reference
    ).eval()
