"""From a configuration to the part of the engine that embeds."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.engine_config import EngineConfig
from engine.config.model_location import locate_model
from engine.core.build_adapters import build_adapters
from engine.core.embedding_core import EmbeddingCore
from engine.core.gpu_choices import FOLLOWS_BATCH, check_device_flags, check_fp8, check_heads, share_of
from engine.core.messages import EngineReady
from engine.core.resolve import MAX_QUEUED_REQUESTS, MAX_RUNNING_REQUESTS, Machine, ResolvedConfig
from engine.core.step_board import StepBoard
from engine.errors import ConfigError
from engine.gguf_file import is_gguf
from engine.models import encoder_registry
from engine.models.embedding_spec import EmbeddingSpec, is_embedding_checkpoint, read_embedding_spec
from engine.models.encoder_registry import is_encoder, read_encoder_spec
from engine.models.hf_config import read_config
from engine.models.registry import FAMILIES, has_native, is_headless, read_spec, sees_both_ways
from engine.runner.memory import (
    DEQUANTIZING_BYTES,
    DTYPE_BYTES,
    GPU_TEXT_TOKENS,
    PACKED_ELEMENTS,
    PACKING_BYTES,
    encoder_text_bytes,
    gpu_decoder_bytes,
    gpu_encoder_bytes,
    text_bytes,
    weight_bytes,
)
from engine.scheduling.settings import Places

if TYPE_CHECKING:
    from engine.core.embedding_core import Embedder
    from engine.core.engine_core import EngineCore
    from engine.models.spec import ModelSpec
    from engine.ops.placement import Placement
    from engine.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)
Progress = Callable[[str, float], None]
CHUNK = 512


def only_embeds(directory: str | Path) -> bool:
    """Whether a checkpoint was made for embedding and nothing else. Raises: `ConfigError`."""
    config = read_config(directory)
    if is_encoder(config) or is_headless(config) or is_embedding_checkpoint(Path(directory)):
        return True
    return has_native(config) and sees_both_ways(config)


def build_embedding_engine(
    config: EngineConfig, progress: Progress | None, board: StepBoard | None
) -> tuple[EngineCore, EngineReady]:
    """An engine whose only model embeds; requests to generate are refused.

    Raises: `ConfigError` or `CheckpointError`, one line, when it cannot be done.
    """
    check_device_flags(config)
    for flag, value, default in (
        ("--kv-cache-dtype", config.kv_cache_dtype, "auto"),
        ("--packed-cache", config.packed_cache, None),
        ("--speculative", config.speculative, "off"),
    ):
        if value != default:
            raise ConfigError(
                f"{flag} {value} is for models that generate, and {config.model_path} only embeds"
            )
    machine = Machine.this(config.device)
    num_threads = config.num_threads or machine.num_cores
    beside_embedding(config, config.model_path, machine)
    from engine._native import ProgressBoard
    from engine.core.idle_generation import idle_engine

    context = _context(config, num_threads)
    if board is not None:
        context.report_to(ProgressBoard(board.fd))
    try:
        embedder = load_embedder(config, config.model_path, context, progress, config.max_lora_rank)
    except RuntimeError as error:  # of a GPU, by torch
        if "out of memory" not in str(error):
            raise
        raise ConfigError(
            "there is not enough memory for the model and its texts; lower --context-length"
        ) from error
    adapters, adapter_queue = build_adapters(config, embedder.adapter_reader)
    running = config.max_running_requests or MAX_RUNNING_REQUESTS
    queued = MAX_QUEUED_REQUESTS if config.max_queued_requests is None else config.max_queued_requests
    places = Places(
        max_running_requests=running,
        max_queued_requests=queued,
        max_queued_tokens=config.max_queued_tokens,
    )
    embedding = EmbeddingCore(
        embedder,
        places=places,
        board=board,
        adapters=adapter_queue and adapter_queue.line(),
    )
    core = idle_engine(embedding, adapters)
    batch_reason = FOLLOWS_BATCH if config.device == "cuda" and not config.deterministic else ""
    ready = EngineReady(
        max_total_tokens=0,
        max_running_requests=running,
        block_size=1,
        context_length=embedding.info.max_len,
        dtype=_dtype(config, _checkpoint_dtype(config.model_path)),
        device=config.device,
        cpu_isa=context.isa,
        num_threads=num_threads,
        max_queued_requests=queued,
        embedding=embedding.info,
        generates=False,
        takes_adapters=adapters is not None,
        is_batch_invariant=not batch_reason,
        batch_reason=batch_reason,
    )
    return core, ready


def _context(config: EngineConfig, num_threads: int) -> Any:
    """What the ops of an engine that only embeds share."""
    if config.device == "cuda":
        from engine.ops import cuda

        return cuda.ExecutionContext(is_deterministic=config.deterministic)
    from engine._native import ExecutionContext

    rounds_attention = config.quantization != "none"
    return ExecutionContext(num_threads, config.cpu_isa or "auto", rounds_attention=rounds_attention)


def embedder_beside(
    config: EngineConfig, runner: ModelRunner, resolved: ResolvedConfig, placement: Placement
) -> Embedder | None:
    """What embeds beside a chat model: the model of --embedding-model, else by --pooling the chat model
    itself, on the weights that it has in memory; None if neither is given.

    Raises: `ConfigError` or `CheckpointError` when the embedding model cannot be loaded.
    """
    if config.embedding_model is not None:
        return load_embedder(config, str(locate_model(config.embedding_model)), runner.context, None)
    if config.pooling is None:
        return None
    from engine.models.embedding_head import EmbeddingHead
    from engine.ops import native
    from engine.runner.decoder_embedder import DecoderEmbedder

    spec, chunk = _embedding_spec(config, config.model_path), resolved.chunked_prefill_size
    of_model = {"ops": native, "ctx": runner.context, "placement": placement}
    head = EmbeddingHead.beside(spec, runner.spec.hidden_size, **of_model)
    head.load(config.model_path, is_dummy=config.load_format == "dummy")
    embedder = DecoderEmbedder(
        runner.model,
        runner.spec,
        head,
        dtype=resolved.dtype,
        block_size=resolved.page_size,
        max_tokens=chunk if placement.is_host else min(chunk, GPU_TEXT_TOKENS),
        max_len=spec.longest_text(resolved.context_length),
        adapter_reader=runner.adapter_reader,
        placement=placement,
        ctx=runner.context,
    )
    if not placement.is_host:
        embedder.warm_up()
    return embedder


def load_embedder(
    config: EngineConfig,
    directory: str,
    context: Any,
    progress: Progress | None,
    max_lora_rank: int = 0,
) -> Embedder:
    """A checkpoint of its own as an embedder, a decoder with adapters if `max_lora_rank` is not 0.

    Raises: `ConfigError` or `CheckpointError`, or torch's own error where a GPU has too little memory.
    """
    path = Path(directory)
    quantization, dtype = _quantization(config), _dtype(config, _checkpoint_dtype(directory))
    if is_encoder(read_config(path)) and quantization != "none":
        raise ConfigError(f"--quantization {quantization} is not supported for encoders; {path.name} is one")
    common: dict[str, Any] = {
        **_placed(config, dtype),
        "ctx": context,
        "dtype": dtype,
        "is_dummy": config.load_format == "dummy",
        "progress": progress,
    }
    embedder = _load(config, path, max_lora_rank, common)
    if not common["placement"].is_host:
        embedder.warm_up()
    return embedder


def _placed(config: EngineConfig, dtype: str) -> dict[str, Any]:
    """Ops of the device, and where tensors of a model lie."""
    if config.device == "cuda":
        from engine.ops import cuda
        from engine.ops.placement import on_gpu

        return {"ops": cuda, "placement": on_gpu(dtype)}
    from engine.ops import native
    from engine.ops.placement import CPU

    return {"ops": native, "placement": CPU}


def _load(config: EngineConfig, path: Path, max_lora_rank: int, common: dict[str, Any]) -> Any:
    if is_encoder(read_config(path)) and (spec := read_encoder_spec(path)).num_labels:
        from engine.runner.cross_encoder import CrossEncoder

        max_len = config.context_length if config.embedding_model is None else None
        return CrossEncoder(spec, path, max_len=max_len, **common)
    embedding = _embedding_spec(config, str(path))
    if is_encoder(read_config(path)):
        from engine.runner.encoder_embedder import EncoderEmbedder

        return EncoderEmbedder(read_encoder_spec(path), embedding, path, **common)
    from engine.runner.decoder_embedder import load_decoder_embedder

    return load_decoder_embedder(
        _decoder_spec(path),
        embedding,
        path,
        max_tokens=GPU_TEXT_TOKENS if config.device == "cuda" else config.chunked_prefill_size or CHUNK,
        max_lora_rank=max_lora_rank,
        quantization=_quantization(config),
        **common,
    )


def beside_embedding(config: EngineConfig, directory: str, machine: Machine) -> Machine:
    """What a machine has left beside an embedding checkpoint.

    Raises: `ConfigError` for one that is not computed there, or needs more memory than there is.
    Effects: tells the log where the memory of a GPU goes.
    """
    gpu = machine.gpu
    if gpu is None:
        taken = embedding_bytes(config, directory, machine.memory_bytes)
        return dataclasses.replace(machine, memory_bytes=machine.memory_bytes - taken)
    if not is_encoder(read_config(directory)):
        check_heads(_decoder_spec(directory))
    check_fp8(_quantization(config), gpu)
    share, told = share_of(config, gpu)
    taken = embedding_bytes(config, directory, share, f"{told} are there on {gpu.name}")
    if config.embedding_model is None:
        logger.info("memory of the GPU: %s - %.1f GiB for the model and its texts", told, taken / 2**30)
    return dataclasses.replace(machine, embedding_bytes=taken)


def embedding_bytes(
    config: EngineConfig, directory: str, available_bytes: int, available: str | None = None
) -> int:
    """Memory that an embedding checkpoint takes: weights, to the rounding, and what it holds of texts; or
    what loading takes, if that is more. `available` says what is, where that is more than a number.

    Raises: `ConfigError`, also when more is needed than is available.
    """
    dtype = _dtype(config, _checkpoint_dtype(directory))
    on_gpu, quantization = config.device == "cuda", _quantization(config)
    loading, num_labels = 0, 0
    if is_encoder(read_config(directory)):
        encoder = read_encoder_spec(directory)
        weights, longest = encoder.num_parameters * DTYPE_BYTES[dtype], encoder.max_len
        texts, num_labels = encoder_text_bytes(encoder, longest), encoder.num_labels
        if on_gpu:
            texts = gpu_encoder_bytes(encoder, dtype, longest)
    else:
        spec = _decoder_spec(directory)
        weights = weight_bytes(spec, dtype if quantization == "none" else quantization)
        longest = _embedding_spec(config, directory).longest_text(spec.max_position_embeddings)
        if on_gpu:
            texts = gpu_decoder_bytes(spec, dtype, longest)
            texts += PACKED_ELEMENTS * PACKING_BYTES if quantization != "none" or spec.stored else 0
        else:
            texts = text_bytes(spec, dtype, config.chunked_prefill_size or CHUNK, longest)
            loading = DEQUANTIZING_BYTES * spec.largest_dequantized
    if not num_labels and not on_gpu:  # else it has no vectors, or they are made on the host
        weights += 4 * _embedding_spec(config, directory).num_dense_elements
    if weights + max(texts, loading) > available_bytes:
        gib = 2**30
        also = f"texts of up to {longest} tokens {texts / gib:.1f} GiB"
        less = "; a lower --context-length takes less" if config.embedding_model is None else ""
        if loading > texts:
            also, less = f"dequantising its largest matrix takes {loading / gib:.1f} GiB", ""
        available = available or f"{available_bytes / gib:.1f} GiB of memory are available"
        raise ConfigError(
            f"the embedding model does not fit: its weights take {weights / gib:.1f} GiB and {also}, and "
            f"{available}{less}"
        )
    return weights + max(texts, loading)


def _decoder_spec(directory: str | Path) -> ModelSpec:
    """Raises: `ConfigError`; also for a decoder that would run through transformers: only one with its head
    does, and that embeds beside chat."""
    if not is_gguf(directory) and not has_native(config := read_config(directory)):
        names = ", ".join([*encoder_registry.FAMILIES, *FAMILIES])
        found = f"{config.get('architectures')!r:.80}"
        raise ConfigError(f"unsupported architecture for embeddings alone: {found}; supported: {names}")
    return read_spec(directory)


def _quantization(config: EngineConfig) -> str:
    """Beside a chat model it is that which the flag means."""
    return config.quantization if config.embedding_model is None else "none"


def _embedding_spec(config: EngineConfig, directory: str) -> EmbeddingSpec:
    spec = read_embedding_spec(
        Path(directory), pooling=config.pooling, dimensions=config.matryoshka_dimensions
    )
    if config.embedding_model is None and config.context_length is not None:  # else it is the chat model's
        least = min(config.context_length, spec.max_len or config.context_length)
        spec = dataclasses.replace(spec, max_len=least)
    return spec


def _checkpoint_dtype(directory: str) -> str:
    if is_encoder(read_config(directory)):
        return read_encoder_spec(directory).dtype
    return _decoder_spec(directory).dtype


def _dtype(config: EngineConfig, checkpoint_dtype: str) -> str:
    """The user's choice, or the checkpoint's own; on the CPU float32 keeps float16 exactly."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if checkpoint_dtype == "float16" and config.device == "cpu" else checkpoint_dtype
