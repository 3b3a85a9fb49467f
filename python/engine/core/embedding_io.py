"""The text side of an embedding model: texts to token ids, vectors to what the caller asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from engine.config.engine_config import EngineConfig
from engine.config.model_location import locate_model
from engine.core.messages import EmbeddingInfo
from engine.core.similarity import MEASURES
from engine.errors import InvalidRequest
from engine.models.embedding_spec import EmbeddingSpec, read_embedding_spec
from engine.models.sentence_files import read_sentence_files
from engine.text.tokenizer import Tokenizer

_MOST_CHARS_A_TOKEN = 512

EmbeddingInput = str | Sequence[int]


def only_embeds_error() -> InvalidRequest:
    """What to say to a request for text where the only model embeds."""
    return InvalidRequest(
        "Invalid request: the model makes embeddings and no text; use /v1/embeddings, or embed()",
        slug="unsupported_parameter",
        param="model",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingIO:
    """`name`: the path or id that the model was given by. `truncates`: a text that is too long is cut;
    else it is refused.
    """

    name: str
    tokenizer: Tokenizer
    spec: EmbeddingSpec
    info: EmbeddingInfo
    truncates: bool

    @classmethod
    def load(cls, config: EngineConfig, info: EmbeddingInfo, main_tokenizer: Tokenizer) -> EmbeddingIO:
        """For the model that embeds in an engine of this configuration; `main_tokenizer` is that of the
        model of --model-path.

        Effects: reads files. Raises: `ConfigError` naming what is missing or broken.
        """
        name = config.embedding_model or config.model_path
        directory = locate_model(name)
        if info.scores_pairs:
            lowers_case = read_sentence_files(directory).lowers_case
            spec = EmbeddingSpec(pooling=(info.pooling,), is_normalized=False, lowers_case=lowers_case)
        else:
            dimensions = config.matryoshka_dimensions
            spec = read_embedding_spec(directory, pooling=config.pooling, dimensions=dimensions)
        tokenizer = main_tokenizer if config.embedding_model is None else Tokenizer.from_checkpoint(directory)
        if config.allow_auto_truncate:
            tokenizer = tokenizer.truncated(info.max_len)
        return cls(name=name, tokenizer=tokenizer, spec=spec, info=info, truncates=config.allow_auto_truncate)

    def encode(self, inputs: Sequence[EmbeddingInput], prompt_name: str | None = None) -> list[list[int]]:
        """Token ids of each input; token ids stay as they are.

        `prompt_name` names the checkpoint's prompt that is put before each text, else its default holds.
        Raises: `InvalidRequest` naming the input that is empty or too long, or for a model that scores pairs.
        """
        if self.info.scores_pairs:
            raise InvalidRequest(
                "Invalid request: the model scores pairs of texts; /v1/rerank and /v1/score ask for that",
                slug="unsupported_parameter",
                param="model",
            )
        prompt = self._prompt(prompt_name)
        places = [place for place, item in enumerate(inputs) if isinstance(item, str)]
        texts = [self._checked_text(place, prompt + inputs[place]) for place in places]  # type: ignore[operator]
        encoded: list[list[int]] = [[]] * len(inputs)
        for place, ids in zip(places, self.tokenizer.encode_batch(texts), strict=True):
            encoded[place] = ids
        for place, item in enumerate(inputs):
            if not isinstance(item, str):
                encoded[place] = list(item[: self.info.max_len] if self.truncates else item)
            self._check_len(place, encoded[place])
        return encoded

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[list[int]], list[int]]:
        """Token ids of each pair as one text, and where its second part begins.

        Raises: `InvalidRequest` naming the pair that is too long.
        """
        checked = [
            (self._checked_text(place, first), self._checked_text(place, second))
            for place, (first, second) in enumerate(pairs)
        ]
        encoded = self.tokenizer.encode_pairs(checked)
        for place, (ids, _) in enumerate(encoded):
            self._check_len(place, ids)
        return [ids for ids, _ in encoded], [start for _, start in encoded]

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raises: `InvalidRequest` when vectors cannot be cut to so many numbers."""
        spec, size = self.spec, self.info.size
        if dimensions is None or dimensions == size:
            return
        if not spec.dimensions and not spec.any_dimension:
            raise InvalidRequest(
                f"dimensions must be {size}: the model does not say that its vectors can be cut, and neither "
                "does --matryoshka-dimensions",
                param="dimensions",
            )
        if spec.dimensions and dimensions not in spec.dimensions:
            listed = ", ".join(map(str, spec.dimensions))
            raise InvalidRequest(
                f"dimensions must be one of {listed}, or {size}, got {dimensions}", param="dimensions"
            )
        if not 1 <= dimensions <= size:
            raise InvalidRequest(f"dimensions must be in [1, {size}], got {dimensions}", param="dimensions")

    def cut(self, vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
        """The first `dimensions` numbers of each vector, of length 1 again. Float32 [texts, dimensions]."""
        if dimensions is None or dimensions == self.info.size:
            return vectors
        cut = vectors[:, :dimensions].astype(np.float64)
        norms = np.sqrt(np.square(cut).sum(axis=1, keepdims=True))
        return (cut / np.maximum(norms, 1e-12)).astype(np.float32)

    def likenesses(self, vectors: np.ndarray, pairs: Sequence[tuple[int, int]]) -> list[float]:
        """How much alike two rows of `vectors` are, for each pair, by the measure of the checkpoint."""
        measure, wide = MEASURES[self.spec.similarity], vectors.astype(np.float64)
        return [float(measure(wide[first], wide[second])) for first, second in pairs]

    def _prompt(self, name: str | None) -> str:
        name = name or self.spec.default_prompt
        if name is None:
            return ""
        if name not in self.spec.prompts:
            known = ", ".join(self.spec.prompts) or "none"
            raise InvalidRequest(
                f"prompt_name: the model has no prompt {name[:80]!r}; it has {known}", param="prompt_name"
            )
        return self.spec.prompts[name]

    def _checked_text(self, place: int, text: str) -> str:
        most = self.info.max_len * _MOST_CHARS_A_TOKEN
        if len(text) > most:
            if not self.truncates:
                raise self._too_long(place, f"{len(text)} characters")
            text = text[:most]
        return text.lower() if self.spec.lowers_case else text

    def _check_len(self, place: int, ids: list[int]) -> None:
        if not ids:
            raise InvalidRequest(f"input {place} is empty", param="input")
        if len(ids) > self.info.max_len:
            raise self._too_long(place, f"{len(ids)} tokens")

    def _too_long(self, place: int, what: str) -> InvalidRequest:
        return InvalidRequest(
            f"input {place} ({what}) is longer than the {self.info.max_len} tokens that the embedding model "
            "takes; --allow-auto-truncate cuts such texts",
            slug="context_length_exceeded",
            param="input",
        )
