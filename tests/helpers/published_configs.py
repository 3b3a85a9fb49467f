"""What the config.json of published checkpoints says, as far as it tells one family from another, and the
same for a model small enough to compute here.

Left out is what nobody reads, and what all of them say alike.
"""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 512
WINDOW = 24
_LLAMA = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False,
    "pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_QWEN = {
    "attention_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_scaling": None,
    "sliding_window": None, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
_PHI = {
    "attention_bias": False, "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "embd_pdrop": 0.0, "hidden_act": "silu", "model_type": "phi3", "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "architectures": ["Phi3ForCausalLM"],
}  # fmt: skip
_GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": 256, "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
}  # fmt: skip
_GEMMA3_27B = {
    "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
    "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}  # fmt: skip
_GEMMA3_4B = {
    "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}  # fmt: skip
_MISTRAL_SMALL = {
    "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None, "vocab_size": 131072,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {
        "architectures": ["LlamaForCausalLM"], "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "vocab_size": 32000,
    },
    "Llama-3.2-1B": {
        **_LLAMA, "architectures": ["LlamaForCausalLM"], "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    },
    "deepseek-coder-6.7b": {
        "architectures": ["LlamaForCausalLM"], "eos_token_id": 32014, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 16384,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32768,
    },
    "Mistral-Nemo-2407": {
        **_MISTRAL_SMALL, "architectures": ["MistralForCausalLM"], "eos_token_id": 2,
        "intermediate_size": 14336, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Mistral-Small-3.1-24B": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10,
        "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
        "spatial_merge_size": 2, "text_config": _MISTRAL_SMALL, "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "pixtral"}, "vision_feature_layer": -1,
    },
    "Qwen2.5-0.5B": {
        **_QWEN, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643, "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 151936,
    },
    "Qwen2.5-7B, for long texts": {
        **_QWEN, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151645, "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064,
    },
    "Qwen3-0.6B": {
        **_QWEN, "architectures": ["Qwen3ForCausalLM"], "eos_token_id": 151645, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rope_theta": 1000000, "tie_word_embeddings": True, "vocab_size": 151936,
    },
    "Qwen3-30B-A3B": {
        **_QWEN, "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "eos_token_id": 151645,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False, "vocab_size": 151936,
    },
    "gemma-2-2b": {
        **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    },
    "gemma-2-27b": {
        **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 128, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608, "intermediate_size": 36864, "max_position_embeddings": 8192,
        "model_type": "gemma2", "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
        "_attn_implementation": "eager",
    },
    "gemma-3-1b-it": {
        **_GEMMA, "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "gemma-3-270m": {
        **_GEMMA, "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None, "eos_token_id": 1, "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "intermediate_size": 2048,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
        "use_bidirectional_attention": False, "vocab_size": 262144,
    },
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": _GEMMA3_4B,
        "torch_dtype": "bfloat16", "vision_config": {"model_type": "siglip_vision_model"},
    },
    "gemma-3-27b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": _GEMMA3_27B,
        "torch_dtype": "bfloat16", "vision_config": {"model_type": "siglip_vision_model"},
    },
    "Phi-3-mini-4k": {
        **_PHI, "eos_token_id": 32000, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "rope_scaling": None,
        "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "Phi-3.5-mini": {
        **_PHI, "eos_token_id": 32000, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "sliding_window": 262144,
        "rope_scaling": {
            "long_factor": [1.1 + 0.5 * i for i in range(48)],
            "short_factor": [1.0 + 0.05 * i for i in range(48)], "type": "longrope",
        },
        "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "phi-4": {
        **_PHI, "eos_token_id": 100265, "hidden_size": 5120, "intermediate_size": 17920,
        "max_position_embeddings": 16384, "num_attention_heads": 40, "num_hidden_layers": 40,
        "num_key_value_heads": 10, "original_max_position_embeddings": 16384, "rope_scaling": None,
        "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "Phi-4-mini": {
        **_PHI, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_size": 3072, "intermediate_size": 8192,
        "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "sliding_window": 262144,
        "rope_scaling": {
            "long_factor": [1.0 + 0.6 * i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope",
        },
        "tie_word_embeddings": True, "vocab_size": 200064,
    },
    "OLMo-2-1124-7B": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "eos_token_id": 100257,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 100352,
    },
    "granite-3.1-2b": {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49155,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "eos_token_id": 128012,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
        "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "vocab_size": 128256,
    },
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088,
    },
}  # fmt: skip


_BERT = {
    "attention_probs_dropout_prob": 0.1, "classifier_dropout": None, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0}, "position_embedding_type": "absolute", "torch_dtype": "float32",
    "use_cache": True,
}  # fmt: skip
EMBEDDERS: dict[str, dict[str, Any]] = {
    "bge-base-en-v1.5": {
        **_BERT, "architectures": ["BertModel"], "hidden_size": 768, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    "all-distilroberta-v1": {
        **_BERT, "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2,
        "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514, "model_type": "roberta", "num_attention_heads": 12,
        "num_hidden_layers": 6, "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 50265,
    },
    "multilingual-e5-large": {
        **_BERT, "architectures": ["XLMRobertaModel"], "bos_token_id": 0, "eos_token_id": 2,
        "hidden_size": 1024, "intermediate_size": 4096, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514, "model_type": "xlm-roberta", "num_attention_heads": 16,
        "num_hidden_layers": 24, "output_past": True, "pad_token_id": 1, "type_vocab_size": 1,
        "vocab_size": 250002,
    },
    "distilbert-base": {
        "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1,
        "dim": 768, "dropout": 0.1, "hidden_dim": 3072, "max_position_embeddings": 512,
        "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True,
        "vocab_size": 30522,
    },
    "gte-modernbert-base": {
        "architectures": ["ModernBertModel"], "attention_bias": False, "classifier_activation": "gelu",
        "classifier_bias": False, "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True,
        "deterministic_flash_attn": False, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
        "hidden_activation": "gelu", "hidden_size": 768, "intermediate_size": 1152, "layer_norm_eps": 1e-05,
        "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings": 8192,
        "mlp_bias": False, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05,
        "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283,
        "position_embedding_type": "absolute", "sep_token_id": 50282, "torch_dtype": "float16",
        "vocab_size": 50368,
    },
    "Qwen3-Embedding-0.6B": {
        **_QWEN, "architectures": ["Qwen3ForCausalLM"], "eos_token_id": 151643, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rope_theta": 1000000, "tie_word_embeddings": True, "vocab_size": 151669,
    },
    "e5-mistral-7b": {
        "architectures": ["MistralModel"], "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": 2,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "float16", "vocab_size": 32000,
    },
    "embeddinggemma-300m": {
        **_GEMMA, "_sliding_window_pattern": 6, "architectures": ["Gemma3TextModel"],
        "attn_logit_softcapping": None, "eos_token_id": 1, "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 768, "intermediate_size": 1152,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 4, "max_position_embeddings": 2048,
        "model_type": "gemma3_text", "num_attention_heads": 3, "num_hidden_layers": 24,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "float32",
        "use_bidirectional_attention": True, "vocab_size": 262144,
    },
}  # fmt: skip
DOCUMENTED_POOLING = {
    "bge-base-en-v1.5": "cls_token", "all-distilroberta-v1": "mean_tokens",
    "multilingual-e5-large": "mean_tokens", "distilbert-base": "mean_tokens",
    "gte-modernbert-base": "cls_token", "Qwen3-Embedding-0.6B": "lasttoken", "e5-mistral-7b": "lasttoken",
    "embeddinggemma-300m": "mean_tokens",
}  # fmt: skip
"""What their model cards say is made of the hidden states."""
_FEW_LAYERS = {
    "num_hidden_layers": 4, "n_layers": 3, "num_attention_heads": 4, "n_heads": 4, "hidden_size": 64,
    "dim": 64, "intermediate_size": 96, "hidden_dim": 96, "vocab_size": 300, "local_attention": 24,
    "max_position_embeddings": 300,
}  # fmt: skip


def shrunk_encoder(config: dict[str, Any]) -> dict[str, Any]:
    """The same for an encoder."""
    small = config | {key: value for key, value in _FEW_LAYERS.items() if key in config}
    return small | {"pad_token_id": min(config["pad_token_id"], 1)}


_FEW_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A model of four layers and heads as large as theirs; a window becomes one that short texts leave."""
    if "text_config" in config:
        return {**config, "text_config": shrunk(config["text_config"])}
    small = {**config, "intermediate_size": 96, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 4}
    small["pad_token_id"] = 0
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads is not None:
        small["num_attention_heads"] = 4
        small["num_key_value_heads"] = 4 if kv_heads == heads else 2
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        small["hidden_size"] = 128 if "head_dim" in config else 4 * head_dim
    else:
        small["hidden_size"] = 128
    small |= {key: value for key, value in _FEW_EXPERTS.items() if key in config}
    for key in ("layer_types", "no_rope_layers"):
        if key in config:
            small[key] = config[key][-4:]
    if config.get("sliding_window") is not None and config["sliding_window"] < 100_000:
        small["sliding_window"] = WINDOW
    if "eos_token_id" in config:
        small["eos_token_id"] = 2
    return small
