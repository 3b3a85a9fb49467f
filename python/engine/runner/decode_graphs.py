"""CUDA graphs of decode steps: what one launch replays, captured when a shape comes for the second time."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from engine.errors import NativeError
from engine.models.decoder import DecoderInputs
from engine.ops.attention_plan import LayerCache
from engine.runner.device_inputs import DecodeShape, DeviceInputs

logger = logging.getLogger(__name__)

Forward = Callable[[DecoderInputs, Sequence[LayerCache]], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""Records what a function launches: what launches it again, and what the function gave."""

SMALLEST_SPAN = 1024
"""Tokens; contexts up to it share their graphs, longer ones those of a power of two."""
MOST_GRAPHS = 96
"""That are kept; the one that was not used for longest makes room."""


class _Graph(NamedTuple):
    inputs: torch.Tensor
    replay: Callable[[], None]
    hidden: torch.Tensor


class DecodeGraphs:
    """Runs the model on inputs of the host, and knows which steps can be replayed.

    A graph has a fixed number of rows and a bound on their contexts, so steps are padded to the next of
    both. The first step of a shape runs as it is, which compiles what has to be compiled; the second is
    captured: sizes that nobody uses cost nothing, and the first answer waits for none.

    `may_capture` is False for models that wait for the device within a step. Without `capture`, or where
    capturing fails, every step is launched op by op.
    """

    def __init__(
        self,
        forward: Forward,
        kv_layers: Sequence[LayerCache],
        inputs: DeviceInputs,
        *,
        max_rows: int,
        context_length: int,
        device: torch.device,
        capture: Capture | None,
    ) -> None:
        self._forward, self._kv_layers, self._inputs = forward, kv_layers, inputs
        self._max_rows, self._context_length, self._device = max_rows, context_length, device
        self._capture = capture
        self._graphs: OrderedDict[DecodeShape, _Graph | None] = OrderedDict()
        """None for a shape that came once."""

    def run(self, inputs: DecoderInputs) -> torch.Tensor:
        """The model's hidden rows for inputs of the host, valid until the next call."""
        num_rows = len(inputs.plan.kv_lens)
        shape = self._shape(inputs)
        if shape is None:
            return self.launch(inputs)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._record(inputs, shape)
        if graph is None:
            return self._forward(self._inputs.send(inputs, shape), self._kv_layers)[:num_rows]
        self._graphs.move_to_end(shape)
        self._inputs.send(inputs, shape, graph.inputs)
        graph.replay()
        return graph.hidden[:num_rows]

    def launch(self, inputs: DecoderInputs) -> torch.Tensor:
        """The same op by op, whatever the step."""
        return self._forward(self._inputs.send(inputs), self._kv_layers)

    def _shape(self, inputs: DecoderInputs) -> DecodeShape | None:
        """The padded shape of a step that a graph may serve."""
        num_rows = len(inputs.plan.kv_lens)
        is_decode = num_rows == len(inputs.token_ids) == len(inputs.logit_rows) and not inputs.num_scored
        if self._capture is None or not is_decode or inputs.adapters:
            return None
        longest = int(inputs.plan.kv_lens.max())
        span = max(SMALLEST_SPAN, 1 << (longest - 1).bit_length())
        return DecodeShape(padded_rows(num_rows, self._max_rows), min(span, self._context_length))

    def _record(self, inputs: DecoderInputs, shape: DecodeShape) -> _Graph | None:
        """The graph of a shape, unless this is its first step or the device cannot."""
        assert self._capture is not None
        if shape not in self._graphs:
            self._graphs[shape] = None
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
            return None
        memory = torch.empty(self._inputs.num_bytes(shape), dtype=torch.uint8, device=self._device)
        placed = self._inputs.send(inputs, shape, memory)
        try:
            replay, hidden = self._capture(lambda: self._forward(placed, self._kv_layers))
        except (RuntimeError, NativeError) as error:  # torch says the former, our own launches the latter
            reason = " ".join(str(error).split())[:200]
            logger.warning("no CUDA graphs from now on, decoding is slower: %s", reason)
            self._capture = None
            self._graphs.clear()
            return None
        graph = self._graphs[shape] = _Graph(memory, replay, hidden)
        return graph


def padded_rows(num_rows: int, max_rows: int) -> int:
    """The next number of rows that is captured: powers of two to 8, then multiples of 8, of 32 beyond 256."""
    if num_rows <= 8:
        padded = 1 << (num_rows - 1).bit_length()
    else:
        step = 8 if num_rows <= 256 else 32
        padded = -(-num_rows // step) * step
    return min(padded, max_rows)


def cuda_capture() -> Capture:
    """That of torch. Graphs share their memory: none needs what another left there."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Another thread may be loading an adapter, which allocates: that is not part of this capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = run()
        finally:
            torch.cuda.set_stream(stream)  # torch stays on the one that it captured, where that failed
        return graph.replay, hidden

    return capture
