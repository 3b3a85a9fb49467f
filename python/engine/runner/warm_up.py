"""Steps that nobody asked for: on a GPU the first launch of a kernel compiles it, for seconds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.errors import ConfigError
from engine.models.decoder import DecoderInputs
from engine.models.lora_sites import EMBEDDING, Site
from engine.models.spec import ModelSpec
from engine.ops.placement import Placement
from engine.runner.device_inputs import DeviceInputs

if TYPE_CHECKING:
    from engine.core.embedding_core import Embedder

ROW_COUNTS = 1, 2, 17, 65
"""One token is decoded and more are a prompt; products take other tiles beyond 16 and beyond 64 rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What a model is launched on before it serves. `sites` are those of its adapters, none if it takes none;
    the others are bounds of a step."""

    ops: ModuleType
    placement: Placement
    inputs: DeviceInputs
    dtype: str
    sites: Sequence[Site]
    spec: ModelSpec
    max_tokens: int
    max_logits: int
    context_length: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(tokens, length of their text) of steps that between them launch every kernel: attention has one
        for texts that fit its window and one for longer texts. The last is the largest step there is, which
        shows whether the memory is enough."""
        most = min(self.max_tokens, self.context_length)
        counts = set(ROW_COUNTS)
        if (experts := self.spec.experts) is not None:  # the products of each see some of the rows
            counts |= {-(-count * experts.num_experts // experts.num_chosen) for count in ROW_COUNTS}
        sizes = [(count, count) for count in sorted(counts) if count < most]
        if (window := max(self.spec.windows)) > 0:
            sizes.append((min(2, most), min(window + 2, self.context_length)))
        return [*sizes, (most, most)]

    def steps(self) -> list[DecoderInputs]:
        steps = [self.inputs.idle(*size, min(size[0], self.max_logits)) for size in self.sizes]
        if self.sites:
            steps.insert(0, _with_adapter(steps[0], self._blank_adapter()))
        return steps

    def _blank_adapter(self) -> Any:
        """Of rank 1, with zeros at the first of all sites of one shape."""
        sites = self.sites
        firsts: dict[tuple[int, ...], int] = {}
        for number, site in enumerate(sites):
            edge = number if number in (EMBEDDING, len(sites) - 1) else -1  # ids come in, or logits go out
            firsts.setdefault((edge, site.in_features, *(part.num_columns for part in site.parts)), number)
        parts = [site.parts if number in firsts.values() else () for number, site in enumerate(sites)]
        shapes = [
            (site.in_features, number == EMBEDDING, [(p.first_column, p.num_columns, 1, 0.0) for p in own])
            for number, (site, own) in enumerate(zip(sites, parts, strict=True))
        ]
        with self.placement.making():
            adapter = self.ops.LoraAdapter(self.dtype, shapes)
        for number, own in enumerate(parts):
            for index, part in enumerate(own):
                a, b = torch.zeros(1, sites[number].in_features), torch.zeros(part.num_columns, 1)
                adapter.pack(number, index, a, b)
        return adapter


def _with_adapter(inputs: DecoderInputs, adapter: Any) -> DecoderInputs:
    """The same step with the adapter for all rows."""
    rows = np.zeros(len(inputs.token_ids), np.int64)
    return dataclasses.replace(inputs, adapters=[adapter], adapter_of_token=rows)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Raises: `ConfigError` where what is launched within cannot be compiled."""
    try:
        yield
    except OSError as error:
        why = "Triton needs a C compiler, and a folder that it may write: set TRITON_CACHE_DIR"
        raise ConfigError(f"--device cuda: kernels cannot be compiled: {error}; {why}") from error


def embed_blanks(embedder: Embedder, batches: Iterable[Sequence[int]]) -> None:
    """Have batches of texts of these lengths embedded, which on a GPU compiles what is launched for them.

    Raises: `ConfigError` where nothing can be compiled; torch's own error where there is too little memory.
    """
    for lens in batches:
        with compiling():
            for _ in embedder.compute([np.zeros(n, np.int32) for n in lens], lens, [None] * len(lens)):
                pass
