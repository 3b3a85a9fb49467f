"""What the routes share: the engine, the configuration, and the model's text side."""

from __future__ import annotations

import dataclasses
import time

from engine.config.engine_config import EngineConfig
from engine.config.server_config import ServerConfig
from engine.core.client import EngineClient, EngineState
from engine.core.embedding_io import EmbeddingIO, only_embeds_error
from engine.core.messages import EngineReady
from engine.errors import InvalidRequest, Overloaded
from engine.server.adapters import AdapterRegistry
from engine.server.byte_allowance import ByteAllowance
from engine.server.ignored import IgnoredFields
from engine.server.live_requests import LiveRequests
from engine.server.metrics import Metrics
from engine.server.model_files import ModelFiles
from engine.server.model_names import ModelNames

_SLUGS = {
    EngineState.LOADING: ("model_loading", 2.0),
    EngineState.DRAINING: ("shutting_down", 5.0),
    EngineState.RESTARTING: ("engine_restarted", 2.0),
    EngineState.FAILED: ("engine_restarted", 30.0),
}


@dataclasses.dataclass(kw_only=True)
class ServerContext:
    """One server. `model` is None until its files are read, which does not hold up the port; `embedding`
    stays None where the engine does not embed.
    """

    client: EngineClient
    config: ServerConfig
    engine_config: EngineConfig
    model: ModelFiles | None = None
    embedding: EmbeddingIO | None = None
    is_draining: bool = False
    started_at: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        path = self.engine_config.model_path
        self.limits = self.config.limits
        self.body_memory = ByteAllowance(self.limits.all_bodies_bytes)
        self.answer_memory = ByteAllowance(self.limits.all_answers_bytes)
        self.metrics = Metrics()
        self.live = LiveRequests()
        self.ignored = IgnoredFields(self.metrics, is_strict=self.config.strict_params)
        self.names = ModelNames(
            self.config.served_model_name or (path,),
            path,
            accepts_any=self.config.allow_any_model_name,
            embedding=self.config.embedding_model_name or self.engine_config.embedding_model,
            embedding_path=self.engine_config.embedding_model,
        )
        self.adapters = AdapterRegistry(self.client, self.names, self.config.lora_paths, self.config.lora_dir)

    @property
    def unready(self) -> Overloaded | None:
        """Why no request can be served now; None when one can."""
        state = EngineState.DRAINING if self.is_draining else self.client.state
        if state is EngineState.READY and self.model is not None:
            return None
        slug, retry_after_s = _SLUGS.get(state, _SLUGS[EngineState.LOADING])
        reason = self.client.state_reason or f"The server is {slug.replace('_', ' ')}."
        if self.is_draining:
            reason = "The server is shutting down."
        return Overloaded(reason, slug=slug, retry_after_s=retry_after_s)

    def require_ready(self) -> tuple[ModelFiles, EngineReady]:
        """The model and the engine's capacities. Raises `Overloaded` while requests cannot be served."""
        if (error := self.unready) is not None:
            raise error
        info = self.client.info
        assert self.model is not None and info is not None
        return self.model, info

    def require_generation(self) -> tuple[ModelFiles, EngineReady]:
        """As `require_ready`. Raises `InvalidRequest` where the only model embeds."""
        model, ready = self.require_ready()
        if not ready.generates:
            raise only_embeds_error()
        return model, ready

    def require_embedding(self) -> EmbeddingIO:
        """The text side of the embedding model.

        Raises `Overloaded` as `require_ready`, and `InvalidRequest` where there is no such model.
        """
        self.require_ready()
        if self.embedding is None:
            raise InvalidRequest(
                f"the model {self.names.primary!r} does not embed; --pooling mean, cls or last makes it, and "
                "--embedding-model adds one that does",
                slug="unsupported_parameter",
                param="model",
            )
        return self.embedding
