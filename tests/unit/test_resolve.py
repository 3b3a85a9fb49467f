import dataclasses

import pytest
import torch

from engine.config.engine_config import PAGE_SIZES, EngineConfig
from engine.core.build_embedding import build_embedding_engine
from engine.core.resolve import Machine, resolve
from engine.errors import ConfigError
from engine.models.registry import spec_from_config
from engine.ops import native
from engine.ops.attention_plan import AttentionPlan
from engine.runner.gpu import Gpu

SPEC = spec_from_config(
    {
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
        "dtype": "bfloat16",
    }
)
BLOCK_BYTES = 2 * 2 * 2 * 64 * 16 * 2  # keys and values, layers, heads, head_dim, tokens, bfloat16
GIB = 2**30
MACHINE = Machine(num_cores=3, memory_bytes=8 * GIB)


def config(**fields):
    return EngineConfig(model_path="/nowhere", **fields)


def spec(**fields):
    return dataclasses.replace(SPEC, **fields)


def test_defaults_have_values_and_reasons():
    resolved = resolve(config(), SPEC, MACHINE)
    assert resolved.dtype == resolved.kv_cache_dtype == "bfloat16"
    assert resolved.context_length == 2048
    assert resolved.page_size == 16
    assert resolved.max_running_requests == 64
    assert resolved.num_threads == 3
    assert resolved.num_blocks == 64 * 2048 // 16, "never more than all running requests can use"
    undecided = {
        field.name
        for field in dataclasses.fields(EngineConfig)
        if getattr(config(), field.name) in (None, "auto")
    } - {
        "tokenizer_path",
        "load_format",
        "max_queued_tokens",
        "packed_cache",
        "pooling",
        "embedding_model",
        "matryoshka_dimensions",
        "mem_fraction_static",
    }
    assert set(resolved.reasons) == undecided
    assert all(value is not None and reason for value, reason in resolved.explained().values())


def test_choices_win():
    chosen = {
        "dtype": "float32",
        "kv_cache_dtype": "int8",
        "quantization": "int8",
        "context_length": 100,
        "page_size": 32,
        "max_total_tokens": 402,
        "max_running_requests": 2,
        "max_queued_requests": 0,
        "chunked_prefill_size": 7,
        "target_itl_ms": 1.5,
        "num_threads": 9,
        "cpu_isa": "baseline",
        "schedule_policy": "lpm",
        "disable_radix_cache": True,
        "debug_checks": True,
    }
    resolved = resolve(config(**chosen), SPEC, MACHINE)
    for name, value in chosen.items():
        assert getattr(resolved, name) == (384 if name == "max_total_tokens" else value)
    assert resolved.num_blocks == 12
    assert resolved.reasons == {}
    settings = resolved.scheduler_settings(SPEC)
    assert settings.target_itl_s == 0.0015
    assert settings.eos_token_ids == (2,)
    assert resolved.max_step_tokens == 9


def test_step_buffers_hold_all_decodes_and_a_block():
    resolved = resolve(config(max_running_requests=50, chunked_prefill_size=8, page_size=16), SPEC, MACHINE)
    assert resolved.max_step_tokens == 58


@pytest.mark.parametrize(
    ("stored", "chosen"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32")]
)
def test_dtype_keeps_what_the_checkpoint_has(stored, chosen):
    assert resolve(config(), spec(dtype=stored), MACHINE).dtype == chosen


def test_pool_stays_small_beside_a_small_model():
    resolved = resolve(config(max_running_requests=4096), SPEC, MACHINE)
    assert resolved.num_blocks == 256 * 2**20 // BLOCK_BYTES


def test_pool_holds_one_long_context_when_memory_allows():
    long = spec(max_position_embeddings=1_000_000)
    resolved = resolve(config(), long, MACHINE)
    assert resolved.context_length == resolved.max_total_tokens == 1_000_000


def test_pool_takes_half_of_what_is_left_and_cuts_the_context():
    long = spec(max_position_embeddings=1_000_000)
    resolved = resolve(config(), long, Machine(num_cores=1, memory_bytes=GIB // 4))
    assert resolved.num_blocks * BLOCK_BYTES < GIB // 8
    assert resolved.context_length == resolved.max_total_tokens
    assert "KV cache" in resolved.reasons["context_length"]
    assert "half" in resolved.reasons["max_total_tokens"]


@pytest.mark.parametrize(
    ("field", "value"), [("kv_cache_dtype", "int8"), ("packed_cache", "/cache"), ("speculative", "ngram")]
)
def test_models_that_only_embed_refuse_what_they_would_not_do(field, value):
    flag = "--" + field.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^{flag} {value} is for models that generate, and /nowhere only"):
        build_embedding_engine(config(**{field: value}), None, None)


def test_an_int8_cache_holds_more_in_the_same_memory():
    long = spec(max_position_embeddings=131072)
    machine = dataclasses.replace(MACHINE, memory_bytes=GIB // 8)
    wide, narrow = (resolve(config(kv_cache_dtype=dtype), long, machine) for dtype in ("auto", "int8"))
    assert narrow.kv_cache_dtype == "int8" and "kv_cache_dtype" not in narrow.reasons
    assert narrow.num_blocks / wide.num_blocks == pytest.approx(64 * 2 / (64 + 4), abs=0.01)


@pytest.mark.parametrize(
    ("fields", "memory", "message"),
    [
        ({"context_length": 2049}, GIB, "--context-length 2049 is more than the 2048"),
        ({"context_length": 100, "max_total_tokens": 64}, GIB, "does not fit the KV cache of 64 tokens"),
        ({"max_total_tokens": 15}, GIB, "--max-total-tokens 15 is less than one block of 16"),
        ({"max_total_tokens": 2**31 - 1}, GIB, "--max-total-tokens 2147483647 needs 2048.0 GiB beside"),
        ({"device": "tpu"}, GIB, "--device must be one of cpu, cuda, got 'tpu'"),
        ({}, 1000, "the model does not fit: its weights take"),
    ],
)
def test_contradictions_are_one_line(fields, memory, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(config(**fields), SPEC, Machine(num_cores=1, memory_bytes=memory))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("page_size", [1, 5, 24, 272, 512])
def test_page_sizes_that_no_kernel_takes(page_size):
    with pytest.raises(ConfigError, match=f"^--page-size must be a multiple of 16 .*, got {page_size}$"):
        config(page_size=page_size)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_the_kernels_take_every_page_size(page_size):
    """Otherwise the engine would say that it is ready, and fail every request."""
    heads, dim = 2, 64
    q = torch.ones(1, heads, dim)
    k, v = torch.ones(1, heads, dim, page_size), torch.ones(1, heads, page_size, dim)
    out, ctx = torch.zeros(1, heads, dim), native.ExecutionContext(num_threads=1, isa="auto")
    plan = AttentionPlan(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [1], [[0]])))
    native.paged_attention(ctx, q, k, v, plan, 1.0, 0, 0.0, out)
    assert torch.equal(out, q)


# --- on a GPU

GPU = Gpu("NVIDIA Test", (9, 0), 80 * GIB, 79 * GIB)


def on_gpu(gpu=GPU, memory=8 * GIB):
    return Machine(num_cores=3, memory_bytes=memory, gpu=gpu)


def test_a_gpu_has_defaults_of_its_own():
    resolved = resolve(config(device="cuda"), SPEC, on_gpu())
    assert resolved.device == "cuda" and resolved.captures_graphs and not resolved.deterministic
    assert (resolved.max_running_requests, resolved.chunked_prefill_size) == (256, 8192)
    assert resolved.num_blocks == 256 * 2048 // 16, "never more than all running requests can use"
    assert "on a GPU" in resolved.reasons["max_running_requests"]
    assert resolve(config(device="cuda"), spec(dtype="float16"), on_gpu()).dtype == "float16"
    assert not resolve(config(device="cuda", disable_cuda_graph=True), SPEC, on_gpu()).captures_graphs
    assert resolve(config(device="cuda", deterministic=True), SPEC, on_gpu()).deterministic


@pytest.mark.parametrize(
    ("fields", "runs_ahead"),
    [
        ({"device": "cuda"}, True),
        ({"device": "cuda", "disable_overlap_schedule": True}, False),
        ({"device": "cuda", "speculative": "ngram"}, False),
        ({}, False),
    ],
)
def test_a_gpu_plans_while_it_runs_unless_guesses_need_its_tokens(fields, runs_ahead):
    machine = on_gpu() if fields else MACHINE
    assert resolve(config(**fields), SPEC, machine).scheduler_settings(SPEC).runs_ahead == runs_ahead


def test_the_cache_gets_what_of_a_gpu_the_rest_leaves():
    """By hand: 0.5 of 80 GiB, less 1 in use, the weights and the rows of a step, in whole blocks but one."""
    long = spec(max_position_embeddings=131072)
    resolved = resolve(
        config(device="cuda", mem_fraction_static=0.5, max_running_requests=2048), long, on_gpu()
    )
    weights = 2 * long.num_parameters
    row = 2 * (4 * 256 + 2 * 256 + 512 + 3 * 512) + 4 * 3 * config().max_lora_rank
    splits = 4 * 2048 * 64 * 4 * (64 + 4)
    parts = {
        "rows": 8192 * row,
        "logits and draws": 2048 * (4 * (1000 + 1000 + 32) + 48 * 1024),
        "attention": splits + 4 * 2**20,
        "positions": 131072 * 64 * 4,
        "inputs": 2 * (2048 * 8192 * 4 + 64 * (8192 + 2048)),
        "graphs": 512 * 2**20 + splits,
    }
    left = 40 * GIB - GIB - weights - sum(parts.values())
    assert resolved.num_blocks == left // BLOCK_BYTES - 1
    assert resolved.memory == resolved.reasons["max_total_tokens"]
    told = " - ".join(f"{size / GIB:.1f} GiB for {name}" for name, size in parts.items())
    assert resolved.memory == (
        f"0.5 of 80.0 GiB - 1.0 GiB in use - {weights / GIB:.1f} GiB of weights - {told} = "
        f"{left / GIB:.1f} GiB for the KV cache"
    )


def test_what_packing_takes_must_fit_before_the_cache_does():
    """It is free again when the cache is made; without graphs none have a share."""
    fields = {"device": "cuda", "quantization": "int8", "disable_cuda_graph": True}
    told = resolve(config(**fields), SPEC, on_gpu()).memory
    assert "of weights (and 0.4 GiB while they are packed) - " in told and "graphs" not in told
    small = on_gpu(dataclasses.replace(GPU, total_bytes=2 * GIB // 5, free_bytes=2 * GIB // 5))
    with pytest.raises(ConfigError, match="^the model does not fit NVIDIA Test: 0.88 of 0.4 GiB - 0.0 "):
        resolve(config(**fields, max_running_requests=1, chunked_prefill_size=64), SPEC, small)


def test_texts_that_a_gpu_embeds_have_a_share():
    """A block of keys and values for each token of a batch, or a whole context; and rows in float32."""
    fields = {"device": "cuda", "pooling": "mean", "max_running_requests": 16}
    for context, num_blocks in ((4096, 1024), (131072, 8192)):
        long = spec(max_position_embeddings=context)
        told = resolve(config(**fields), long, on_gpu()).memory
        texts = num_blocks * BLOCK_BYTES + 8 * 4 * 1024 * long.hidden_size
        assert f" - {texts / GIB:.1f} GiB for texts = " in told


def test_an_fp8_cache_of_a_gpu_holds_more():
    long = spec(max_position_embeddings=131072)
    fields = {"device": "cuda", "mem_fraction_static": 0.1, "max_running_requests": 2048}
    wide, narrow = (resolve(config(kv_cache_dtype=d, **fields), long, on_gpu()) for d in ("auto", "fp8"))
    assert narrow.num_blocks / wide.num_blocks == pytest.approx(64 * 2 / (64 + 4), abs=0.01)


@pytest.mark.parametrize(
    ("fields", "changes", "gpu", "message"),
    [
        (
            {},
            {"vocab_size": 2**31},
            {},
            "^the model does not fit NVIDIA Test: 0.88 of 80.0 GiB - 1.0 ",
        ),
        ({"mem_fraction_static": 0.05}, {}, {"free_bytes": 76 * GIB}, "for the KV cache$"),
        ({"max_total_tokens": 2**31 - 1}, {}, {}, "needs 2048.0 GiB, and there are: 0.88 of 80.0 GiB - "),
        ({"quantization": "bf16_dot"}, {}, {}, "^--quantization bf16_dot is for the CPU$"),
        ({"kv_cache_dtype": "int8"}, {}, {}, "^--kv-cache-dtype int8 is for the CPU$"),
        ({"num_threads": 2}, {}, {}, "^--num-threads is for the CPU$"),
        ({"packed_cache": "/tmp"}, {}, {}, "^--packed-cache is for the CPU$"),
        (
            {"quantization": "fp8"},
            {},
            {"capability": (8, 6)},
            "needs a GPU of compute capability 8.9",
        ),
        ({}, {"head_dim": 40}, {}, "does not serve this model yet: its heads have 40 elements"),
    ],
)
def test_what_a_gpu_does_not_do_is_one_line(fields, changes, gpu, message):
    machine = on_gpu(dataclasses.replace(GPU, **gpu))
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(config(device="cuda", **fields), spec(**changes), machine)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, "--dtype float16 is for --device cuda"),
        ({"quantization": "fp8"}, "--quantization fp8 is for --device cuda"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 is for --device cuda"),
        ({"mem_fraction_static": 0.5}, "--mem-fraction-static is for --device cuda"),
        ({"disable_cuda_graph": True}, "--disable-cuda-graph is for --device cuda"),
    ],
)
def test_what_only_a_gpu_does_is_refused_on_the_cpu(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        resolve(config(**fields), SPEC, MACHINE)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        build_embedding_engine(config(**fields), None, None)


def test_a_model_that_embeds_beside_chat_has_a_share():
    fields = {"device": "cuda", "pooling": "mean", "max_running_requests": 2048, "embedding_model": "/e"}
    long = spec(max_position_embeddings=131072)
    alone = resolve(config(**fields), long, on_gpu())
    beside = resolve(config(**fields), long, dataclasses.replace(on_gpu(), embedding_bytes=3 * GIB))
    assert " - 3.0 GiB for the embedding model = " in beside.memory
    assert "for texts" not in beside.memory, "the chat model embeds none"
    assert alone.num_blocks - beside.num_blocks == pytest.approx(3 * GIB / BLOCK_BYTES, abs=1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_of_memory_is_one(fraction):
    with pytest.raises(ConfigError, match="^--mem-fraction-static must be from 0.05 to 0.99"):
        config(mem_fraction_static=fraction)
