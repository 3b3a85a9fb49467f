"""CUDA graphs of decode steps: what one launch replays, captured for the sizes that steps have."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from engine.errors import NativeError
from engine.models.decoder import DecoderInputs
from engine.ops.attention_plan import LayerCache
from engine.runner.device_inputs import DecodeShape, DeviceInputs
from engine.sampling.drawn_ids import LateIds

logger = logging.getLogger(__name__)

Forward = Callable[[DecoderInputs, Sequence[LayerCache]], torch.Tensor]

SMALLEST_SPAN = 1024
"""Tokens; contexts up to it share their graphs, longer ones those of a power of two."""
FIRST_ROWS = 1, 2, 4, 8
"""Whose graphs an idle engine captures before anybody asks for them."""
USES = 2
"""Steps of a shape after which it is captured though requests run."""
PAUSE = 9
"""Times as long as a capture took, no other one follows while requests run: a tenth of their time."""
MOST_GRAPHS = 96
"""That are kept; the one that was not used for longest makes room."""


class Captured(NamedTuple):
    """What launches again what a function launched, what it gave, and the memory of the device for that."""

    replay: Callable[[], None]
    hidden: torch.Tensor
    num_bytes: int


Capture = Callable[[Callable[[], torch.Tensor]], Captured]
"""Records what a function launches."""


class DecodeGraphs:
    """Runs the model on inputs of the host, and knows which steps can be replayed.

    A graph has a fixed number of rows and a bound on their contexts, so steps are padded to the next of
    both. Shapes are captured in the order of their use: the second step of one is, unless another was just
    now; `capture_next` captures what is left, for an engine that has nothing else to do. So the first answer
    waits for none, and no step for more than one.

    All graphs read their inputs from the same memory, where each step's are sent behind the last replay.
    Without `capture`, or where capturing fails, every step is launched op by op. `max_bytes` bounds what the
    graphs take of the device.
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
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._forward, self._kv_layers, self._inputs = forward, kv_layers, inputs
        self._max_rows, self._context_length, self._device = max_rows, context_length, device
        self._capture, self._max_bytes, self._clock = capture, max_bytes, clock
        self._graphs: OrderedDict[DecodeShape, Captured] = OrderedDict()
        """The one that was used last is the last one."""
        span = min(SMALLEST_SPAN, context_length)
        first = [DecodeShape(rows, span) for rows in FIRST_ROWS if rows <= max_rows]
        self._uses = dict.fromkeys(first if capture else (), 0)
        """Steps of each shape that has no graph."""
        self._refused: set[DecodeShape] = set()
        self._not_before_s = 0.0
        self._memory: torch.Tensor | None = None

    def run(self, inputs: DecoderInputs, late: LateIds | None = None) -> torch.Tensor:
        """The hidden rows for inputs of the host, valid until the next call. `late` ids are filled in."""
        num_rows = len(inputs.plan.kv_lens)
        shape = self._shape(inputs)
        if shape is None:
            return self.launch(inputs, late)
        if shape not in self._graphs and shape not in self._refused:
            self._uses[shape] = self._uses.get(shape, 0) + 1
            if self._uses[shape] >= USES and self._clock() >= self._not_before_s:
                self._record(shape)
        graph = self._graphs.get(shape)
        if graph is None:
            return self._forward(self._inputs.send(inputs, shape, late=late), self._kv_layers)[:num_rows]
        self._graphs.move_to_end(shape)
        self._inputs.send(inputs, shape, self._memory, late)
        graph.replay()
        return graph.hidden[:num_rows]

    def launch(self, inputs: DecoderInputs, late: LateIds | None = None) -> torch.Tensor:
        """The same op by op, whatever the step."""
        return self._forward(self._inputs.send(inputs, late=late), self._kv_layers)

    def capture_next(self) -> bool:
        """Capture the shape that came most often and has no graph; whether there was one. For idle times."""
        largest = max((graph.num_bytes for graph in self._graphs.values()), default=0)
        is_full = len(self._graphs) == MOST_GRAPHS or self._num_bytes + largest > self._max_bytes
        if not self._uses or is_full:
            return False
        self._record(max(self._uses, key=self._uses.__getitem__))
        return True

    def _shape(self, inputs: DecoderInputs) -> DecodeShape | None:
        """The padded shape of a step that a graph may serve."""
        num_rows = len(inputs.plan.kv_lens)
        is_decode = num_rows == len(inputs.token_ids) == len(inputs.logit_rows) and not inputs.num_scored
        if self._capture is None or not is_decode or inputs.adapters:
            return None
        longest = int(inputs.plan.kv_lens.max())
        span = max(SMALLEST_SPAN, 1 << (longest - 1).bit_length())
        return DecodeShape(padded_rows(num_rows, self._max_rows), min(span, self._context_length))

    def _record(self, shape: DecodeShape) -> None:
        """Capture a shape, unless the device cannot."""
        assert self._capture is not None
        began_s = self._clock()
        if self._memory is None:
            largest = DecodeShape(self._max_rows, self._context_length)
            self._memory = torch.empty(
                self._inputs.num_bytes(largest), dtype=torch.uint8, device=self._device
            )
        placed = self._inputs.send(self._inputs.idle(1), shape, self._memory)
        try:
            if not self._uses[shape]:  # libraries load what they launch for the first time, and may then wait
                self._forward(placed, self._kv_layers)
            graph = self._capture(lambda: self._forward(placed, self._kv_layers))
        except (RuntimeError, NativeError) as error:  # torch says the former, our own launches the latter
            reason = " ".join(str(error).split())[:200]
            logger.warning("no CUDA graphs from now on, decoding is slower: %s", reason)
            self._capture = None
            self._graphs.clear()
            self._uses.clear()
            return
        self._graphs[shape] = graph
        del self._uses[shape]
        self._make_room(shape)
        now_s = self._clock()
        self._not_before_s = now_s + PAUSE * (now_s - began_s)

    def _make_room(self, shape: DecodeShape) -> None:
        """Drop what was not used for longest; `shape`, the newest, where it takes too much alone."""
        while len(self._graphs) > MOST_GRAPHS or self._num_bytes > self._max_bytes:
            dropped, graph = self._graphs.popitem(last=False)
            if dropped == shape:
                self._refused.add(shape)
                logger.warning(
                    "no CUDA graph of %d rows, which takes %d MiB", shape.num_rows, graph.num_bytes >> 20
                )

    @property
    def _num_bytes(self) -> int:
        return sum(graph.num_bytes for graph in self._graphs.values())


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

    def capture(run: Callable[[], torch.Tensor]) -> Captured:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        torch.cuda.empty_cache()  # as capturing begins with: it is not the graph's
        free_bytes, _ = torch.cuda.mem_get_info()
        try:
            # Another thread may be loading an adapter, which allocates: that is not part of this capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = run()
        finally:
            torch.cuda.set_stream(stream)  # torch stays on the one that it captured, where that failed
        return Captured(graph.replay, hidden, max(0, free_bytes - torch.cuda.mem_get_info()[0]))

    return capture
