"""GET /v1/models, /v1/models/{id}, /get_model_info and its other name /model_info."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from sanic import HTTPResponse, Sanic
from sanic.request import Request

import engine
from engine.core.embedding_io import EmbeddingIO
from engine.sampling.params import SamplingParams
from engine.server.adapters import Adapter
from engine.server.context import ServerContext
from engine.server.json_response import json_response
from engine.server.model_files import SAMPLING_FIELDS, ModelFiles


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.get("/v1/models", ignore_body=True)
    async def list_models(_request: Request) -> HTTPResponse:
        cards = [_card(context, name) for name in context.names.served]
        if context.names.embedding is not None:
            cards.append(_embedding_card(context, context.names.embedding))
        cards += [_adapter_card(context, adapter) for adapter in context.adapters]
        return json_response({"object": "list", "data": cards})

    # Ids may hold slashes, as they are or percent-encoded, and may begin with one.
    @app.get("/v1/models/<model_id:path>", ignore_body=True)
    async def get_model(_request: Request, model_id: str) -> HTTPResponse:
        listed = context.names.id_of(unquote(model_id))
        if listed == context.names.embedding:
            return json_response(_embedding_card(context, listed))
        adapter = context.adapters.find(listed)
        return json_response(_card(context, listed) if adapter is None else _adapter_card(context, adapter))

    @app.get("/get_model_info", name="get_model_info", ignore_body=True)
    @app.get("/model_info", name="model_info", ignore_body=True)
    async def get_info(_request: Request) -> HTTPResponse:
        return json_response(model_info(context))


def _default_sampling(model: ModelFiles) -> dict[str, Any]:
    """What holds for a request that leaves the parameter out."""
    params = SamplingParams(**model.sampling_defaults)
    return {name: getattr(params, name) for name in SAMPLING_FIELDS}


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    _, ready = context.require_ready()
    return {
        "id": name,
        "object": "model",
        "created": context.started_at,
        "owned_by": "engine",
        "root": context.engine_config.model_path,
        "parent": None,
        "max_model_len": ready.context_length,
    }


def _embedding(embedding: EmbeddingIO) -> dict[str, Any]:
    info, spec = embedding.info, embedding.spec
    return {
        "model": embedding.name,
        "dimensions": info.size,
        "max_len": info.max_len,
        "pooling": info.pooling,
        "normalize": info.is_normalized,
        "matryoshka_dimensions": "any" if spec.any_dimension else spec.dimensions,
        "prompts": list(spec.prompts),
        "default_prompt_name": spec.default_prompt,
        "truncates": embedding.truncates,
        "takes_adapters": info.takes_adapters,
    }


def _embedding_card(context: ServerContext, name: str) -> dict[str, Any]:
    max_len = context.require_embedding().info.max_len
    path = context.engine_config.embedding_model
    return {**_card(context, name), "root": path, "max_model_len": max_len}


def _adapter_card(context: ServerContext, adapter: Adapter) -> dict[str, Any]:
    return {
        **_card(context, adapter.name),
        "created": adapter.created,
        "root": adapter.path,
        "parent": context.names.primary,
    }


def model_info(context: ServerContext) -> dict[str, Any]:
    """Never keys: only what is named here is shown."""
    model, ready = context.require_ready()
    config, embedding = context.engine_config, context.embedding
    thoughts, tools = model.formats.thoughts, model.formats.tools
    return {
        "model_path": config.model_path,
        "served_model_name": context.names.primary,
        "served_model_names": context.names.served,
        "tokenizer_path": config.tokenizer_path or config.model_path,
        "is_generation": ready.generates,
        "embedding": None if embedding is None else _embedding(embedding),
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": model.model_type,
        "architectures": model.architectures,
        "vocab_size": model.vocab_size,
        "context_length": ready.context_length,
        "max_model_len": ready.context_length,
        "implementation": ready.implementation,
        "batch_invariant": ready.is_batch_invariant,
        "load_format": config.load_format,
        "dtype": ready.dtype,
        "kv_cache_dtype": ready.kv_cache_dtype,
        "quantization": None if config.quantization == "none" else config.quantization,
        "device": ready.device,
        "cpu_isa": ready.cpu_isa,
        "num_threads": ready.num_threads,
        "max_running_requests": ready.max_running_requests,
        "max_queued_requests": ready.max_queued_requests,
        "max_total_tokens": ready.max_total_tokens,
        "page_size": ready.block_size,
        "logprobs_mode": config.logprobs_mode,
        "schedule_policy": config.schedule_policy,
        "speculative": config.speculative,
        "enable_radix_cache": not config.disable_radix_cache,
        "enable_cache_report": context.config.enable_cache_report,
        "lora": {
            "enabled": ready.takes_adapters,
            "max_loras_per_batch": config.max_loras_per_batch,
            "max_loaded_loras": config.max_loaded_loras,
            "max_lora_rank": config.max_lora_rank,
            "adapters": [adapter.name for adapter in context.adapters],
        },
        "default_sampling_params": _default_sampling(model),
        "preferred_sampling_params": context.config.preferred_sampling or None,
        "default_max_tokens": context.config.default_max_tokens_chat,
        "reasoning_parser": None if thoughts is None else thoughts.name,
        "tool_call_parser": None if tools is None else tools.name,
        "disaggregation_mode": "null",
        "weight_version": "default",
        "started_at": context.started_at,
        "version": engine.__version__,
    }
