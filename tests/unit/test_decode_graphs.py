"""Which steps are replayed, when they are captured, and what a replay reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.errors import NativeError
from engine.models.decoder import DecoderInputs
from engine.ops.attention_plan import AttentionPlan
from engine.ops.cuda.plan import TILE_ROWS, split_rows
from engine.ops.transfer import ALIGNMENT, send, total_bytes
from engine.runner import decode_graphs
from engine.runner.decode_graphs import (
    FIRST_ROWS,
    PAUSE,
    SMALLEST_SPAN,
    Captured,
    DecodeGraphs,
    cuda_capture,
    padded_rows,
)
from engine.runner.device_inputs import DecodeShape, DeviceInputs

CPU = torch.device("cpu")
BLOCK_SIZE, SPARE, MAX_ROWS, CONTEXT = 16, 999, 40, 5000


def inputs_of(kv_lens, counts=None, **more) -> DecoderInputs:
    """A step of rows with so many tokens in the cache, of which `counts` (one each) are computed."""
    counts = counts or [1] * len(kv_lens)
    ends = np.cumsum([0, *counts]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(kv_lens, counts, strict=True)])
    tables = np.arange(len(kv_lens) * 400, dtype=np.int32).reshape(len(kv_lens), 400)
    rows = torch.arange(ends[-1]) if more.pop("all_logits", True) else torch.from_numpy(ends[1:] - 1).long()
    return DecoderInputs(
        token_ids=torch.from_numpy(100 + positions.astype(np.int32)),
        positions=torch.from_numpy(positions.astype(np.int32)),
        slot_ids=torch.from_numpy(positions.astype(np.int64)),
        logit_rows=rows,
        plan=AttentionPlan(
            torch.from_numpy(ends), torch.tensor(kv_lens, dtype=torch.int32), torch.from_numpy(tables)
        ),
        **more,
    )


class Model:
    """Gives each row its token id, and keeps what it was launched with and how."""

    def __init__(self) -> None:
        self.launches: list[DecoderInputs] = []
        self.num_captured = self.num_replayed = 0
        self.refusal: Exception | None = None
        self.now_s, self.graph_bytes = 0.0, 1 << 20
        self.hidden = torch.zeros(MAX_ROWS, 1)

    def forward(self, inputs, kv_layers):
        self.launches.append(inputs)
        hidden = self.hidden[: len(inputs.logit_rows)]
        hidden[:, 0] = inputs.token_ids[inputs.logit_rows]
        return hidden

    def capture(self, run):
        if self.refusal is not None:
            raise self.refusal
        self.num_captured += 1
        hidden = run()

        def replay():
            self.num_replayed += 1
            run()

        return Captured(replay, hidden, self.graph_bytes)

    def clock(self) -> float:
        """A capture takes a second, by the clock."""
        return self.now_s + self.num_captured

    def graphs(self, captures=True, max_bytes=1 << 40) -> DecodeGraphs:
        return DecodeGraphs(
            self.forward,
            [],
            DeviceInputs(CPU, block_size=BLOCK_SIZE, spare_block=SPARE),
            max_rows=MAX_ROWS,
            context_length=CONTEXT,
            device=CPU,
            capture=self.capture if captures else None,
            max_bytes=max_bytes,
            clock=self.clock,
        )


def test_the_second_step_of_a_shape_is_captured_and_all_later_ones_replayed():
    model = Model()
    graphs = model.graphs()
    for step, kv_lens in enumerate([(5, 9, 30), (6, 10, 31), (7, 1024, 32), (8, 3, 33)]):
        hidden = graphs.run(inputs_of(kv_lens))
        assert hidden[:, 0].tolist() == [99 + n for n in kv_lens], "a replay reads this step's inputs"
        assert (model.num_captured, model.num_replayed) == (min(step, 1), max(0, step))
    padded = model.launches[-1]
    assert len(padded.token_ids) == 4 and padded.plan.kv_lens.tolist() == [8, 3, 33, 1]
    assert padded.slot_ids[3] == SPARE * BLOCK_SIZE and (padded.plan.block_tables[3] == SPARE).all()
    assert padded.plan.block_tables.shape == (4, SMALLEST_SPAN // BLOCK_SIZE)
    assert padded.plan.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]
    assert padded.plan.decode_rows.tolist() == [0, 1, 2, 3] and len(padded.plan.tiles) == 0
    assert padded.plan.max_decode_kv_len == SMALLEST_SPAN


def test_a_shape_that_no_step_had_is_launched_once_before_it_is_captured():
    """Libraries load kernels at their first launch, and may wait then, which no capture allows."""
    model = Model()
    graphs = model.graphs()
    num_before: list[int] = []
    capture = model.capture
    graphs._capture = lambda run: num_before.append(len(model.launches)) or capture(run)
    assert graphs.capture_next() and num_before == [1]
    launched, captured = model.launches
    assert launched.token_ids.shape == captured.token_ids.shape, "on the very inputs of the capture"
    assert launched.token_ids.data_ptr() == captured.token_ids.data_ptr()
    graphs.run(inputs_of((5, 9)))
    assert graphs.capture_next() and num_before == [1, 3], "that of a step was launched with the step"


def test_longer_contexts_and_more_rows_are_other_shapes():
    model = Model()
    graphs = model.graphs()
    for kv_lens in [(1024,), (1025,), (CONTEXT,), (3, 3), (3,) * 9, (3,) * 16, (3,) * MAX_ROWS]:
        graphs.run(inputs_of(kv_lens))
        graphs.run(inputs_of(kv_lens))
        model.now_s += PAUSE
    assert model.num_captured == 6, "9 and 16 rows share one"
    assert max(launch.plan.max_decode_kv_len for launch in model.launches) == CONTEXT


@pytest.mark.parametrize(
    "step",
    [
        {"kv_lens": (5, 9), "counts": [1, 2]},
        {"kv_lens": (7,), "counts": [7], "all_logits": False},
        {"kv_lens": (5, 9), "num_scored": 1},
        {"kv_lens": (5, 9), "adapters": [object()], "adapter_of_token": np.array([0, -1])},
    ],
)
def test_other_steps_are_launched_op_by_op(step):
    model = Model()
    graphs = model.graphs()
    for _ in range(3):
        graphs.run(inputs_of(**step))
    assert model.num_captured == 0 and len(model.launches) == 3
    launched = model.launches[-1]
    assert len(launched.token_ids) == sum(step.get("counts", [1, 1])), "nothing is padded"
    assert launched.plan.max_kv_len == max(step["kv_lens"])
    assert launched.host_logit_rows.tolist() == launched.logit_rows.tolist()


def test_without_capture_nothing_is_padded():
    model = Model()
    graphs = model.graphs(captures=False)
    for _ in range(3):
        assert len(graphs.run(inputs_of((4, 5, 6)))) == 3
    assert [len(launch.token_ids) for launch in model.launches] == [3, 3, 3]


@pytest.mark.parametrize("error", [RuntimeError, NativeError])
def test_a_device_that_cannot_capture_goes_on_without(error, caplog):
    """Whether torch says so or a launch of our own."""
    model = Model()
    model.refusal = error("operation not permitted when stream is capturing")
    graphs = model.graphs()
    for _ in range(4):
        assert graphs.run(inputs_of((4, 5, 6)))[:, 0].tolist() == [103, 104, 105]
    assert len(model.launches) == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "decoding is slower" in caplog.text


def test_graphs_are_bounded_and_the_least_used_makes_room(monkeypatch):
    monkeypatch.setattr(decode_graphs, "MOST_GRAPHS", 5)
    model = Model()
    graphs = model.graphs()
    for rows in (1, 2, 4, 8, 16, 24, 1, 32):
        for _ in range(2):
            graphs.run(inputs_of((3,) * rows))
        model.now_s += PAUSE
    assert [shape.num_rows for shape in graphs._graphs] == [8, 16, 24, 1, 32]
    assert model.num_captured == 8, "one row was dropped, and captured again"
    assert not graphs.capture_next(), "an idle engine drops none for another"


def test_captures_take_a_tenth_of_the_time_while_requests_run():
    """And no step waits for two of them."""
    model = Model()
    graphs = model.graphs()
    began_s, steps = model.clock(), 0
    for rows in range(1, MAX_ROWS + 1):
        for _ in range(40):
            before = model.num_captured
            graphs.run(inputs_of((3,) * rows))
            assert model.num_captured <= before + 1
            model.now_s, steps = model.now_s + 0.05, steps + 1
    assert model.num_captured > 4 and model.num_captured <= 1 + (model.clock() - began_s) / (1 + PAUSE)


def test_an_idle_engine_captures_the_shapes_that_came_most_and_then_small_ones():
    model = Model()
    graphs = model.graphs()
    model.now_s = -1e9  # while requests run, nothing would be captured
    graphs._not_before_s = 0.0
    for rows, uses in ((3, 2), (9, 5), (17, 1)):
        for _ in range(uses):
            graphs.run(inputs_of((3,) * rows))
    assert model.num_captured == 0
    order = []
    while graphs.capture_next():
        order.append(len(model.launches[-1].token_ids))
    assert order == [16, 4, 24, *(rows for rows in FIRST_ROWS if rows != 4)]
    assert not graphs.capture_next() and model.num_captured == len(order)
    num_launches, hidden = len(model.launches), graphs.run(inputs_of((3,) * 9))
    assert model.num_replayed == 1 and len(model.launches) == num_launches + 1
    assert hidden[:, 0].tolist() == [102] * 9, "captured on idle rows, replayed on these"


def test_no_capture_no_idle_work():
    model = Model()
    assert not model.graphs(captures=False).capture_next()
    model.refusal = RuntimeError("not here")
    graphs = model.graphs()
    assert graphs.capture_next() and not graphs.capture_next()


def test_graphs_keep_to_their_memory():
    model = Model()
    graphs = model.graphs(max_bytes=3 << 20)
    for rows in (1, 2, 4, 8, 16):
        for _ in range(2):
            graphs.run(inputs_of((3,) * rows))
        model.now_s += PAUSE
    assert [shape.num_rows for shape in graphs._graphs] == [4, 8, 16]
    assert not graphs.capture_next(), "an idle engine drops none for another"


def test_a_graph_that_is_too_large_alone_is_not_tried_again(caplog):
    model = Model()
    model.graph_bytes = 4 << 20
    graphs = model.graphs(max_bytes=3 << 20)
    for _ in range(5):
        assert graphs.run(inputs_of((5,)))[:, 0].tolist() == [104]
        model.now_s += PAUSE
    assert model.num_captured == 1 and len(graphs._graphs) == 0
    assert "no CUDA graph of 1 rows, which takes 4 MiB" in caplog.text


@pytest.mark.parametrize("max_rows", [1, 3, 8, 40, 256, 1000])
def test_every_number_of_rows_has_room(max_rows):
    padded = [padded_rows(count, max_rows) for count in range(1, max_rows + 1)]
    assert all(count <= p <= max_rows for count, p in enumerate(padded, 1))
    assert padded == sorted(padded) and all(p <= max(1, 2 * count) for count, p in enumerate(padded, 1))
    assert len(set(padded)) <= 60


def test_memory_of_a_shape_holds_its_inputs():
    inputs = DeviceInputs(CPU, block_size=BLOCK_SIZE, spare_block=SPARE)
    for shape in (DecodeShape(1, 16), DecodeShape(3, 17), DecodeShape(40, 5000)):
        memory = torch.empty(inputs.num_bytes(shape), dtype=torch.uint8)
        sent = inputs.send(inputs_of((1,)), shape, memory)
        assert sent.plan.block_tables.shape == (shape.num_rows, -(-shape.max_kv_len // BLOCK_SIZE))
        end = memory.data_ptr() + len(memory)
        assert memory.data_ptr() <= sent.token_ids.data_ptr() < sent.plan.decode_rows.data_ptr() < end


def test_arrays_arrive_as_they_were_and_aligned():
    arrays = [
        np.arange(5, dtype=np.int32),
        np.arange(3, dtype=np.int64),
        np.empty((0, 2), np.int32),
        np.arange(12, dtype=np.float32).reshape(3, 4)[:, :2],
        np.array([1, 2, 3], np.uint8),
    ]
    memory = torch.full((total_bytes(arrays) + 32,), 77, dtype=torch.uint8)
    for sent in (send(arrays, CPU), send(arrays, CPU, memory)):
        for array, tensor in zip(arrays, sent, strict=True):
            assert np.array_equal(tensor.numpy(), array) and tensor.numpy().dtype == array.dtype
            assert (tensor.data_ptr() - sent[0].data_ptr()) % ALIGNMENT == 0 or tensor.numel() == 0
    assert (memory[-32:] == 77).all()


def test_work_of_attention_covers_every_query_once():
    counts = [1, TILE_ROWS, 1, TILE_ROWS + 1, 2, 3 * TILE_ROWS]
    decode_rows, tiles = split_rows(np.cumsum([0, *counts]).astype(np.int32))
    assert decode_rows.tolist() == [0, 2] and decode_rows.dtype == tiles.dtype == np.int32
    covered = [(s, q) for s, first in tiles.tolist() for q in range(first, min(first + TILE_ROWS, counts[s]))]
    assert covered == [(s, q) for s, count in enumerate(counts) if count > 1 for q in range(count)]
    assert split_rows(np.array([0], np.int32))[1].shape == (0, 2)


def test_a_capture_that_fails_leaves_no_stream_behind(monkeypatch):
    """torch.cuda.graph stays on its own stream when the end of the capture fails."""
    streams = ["ours"]

    class Graph:
        def __init__(self, *arguments, **options) -> None: ...

        def __enter__(self) -> None:
            streams.append("captured")

        def __exit__(self, *error) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    with pytest.raises(RuntimeError, match="previous error during capture"):
        cuda_capture()(lambda: torch.zeros(1))
    assert streams == ["ours", "captured", "ours"]


def test_a_graph_takes_what_is_less_free_afterwards_but_for_what_torch_kept(monkeypatch):
    kept, taken = [30], []

    class Graph:
        def __init__(self, *arguments, **options) -> None: ...

        def replay(self) -> None: ...

        def __enter__(self) -> None:
            kept.clear()
            taken.append(7)

        def __exit__(self, *error) -> None: ...

    free = {"mem_get_info": lambda: (100 - sum(kept) - sum(taken), 100), "empty_cache": kept.clear}
    streams = {"current_stream": lambda: "ours", "set_stream": lambda stream: None}
    names = {"graph_pool_handle": lambda: (0, 1), "CUDAGraph": Graph, "graph": Graph, **free, **streams}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert cuda_capture()(lambda: torch.zeros(1)).num_bytes == 7
