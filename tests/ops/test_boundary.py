"""The DLPack boundary: what a native call takes, what it refuses, and that it keeps nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch

from engine import _native
from engine.errors import NativeError


@pytest.fixture(scope="module")
def ctx():
    return _native.ExecutionContext(1)


def norm(ctx, x, weight=None, out=None, eps=1e-6):
    weight = torch.ones(x.shape[-1]) if weight is None else weight
    out = torch.full(tuple(x.shape), float("nan")) if out is None else out
    _native.rms_norm(ctx, x, weight, eps, out)
    return out


def expected_norm(x, eps=1e-6):
    x = torch.as_tensor(np.asarray(x)).double()
    return (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)).float()


def test_every_tensor_kind_is_taken(ctx):
    x = torch.randn(3, 40)
    for kind in (x, torch.nn.Parameter(x), x.numpy(), x.clone().requires_grad_()):
        torch.testing.assert_close(norm(ctx, kind), expected_norm(x))


def test_offsets_and_row_strides_are_honoured(ctx):
    storage = torch.randn(10, 100)
    x = storage[2:7, 30:70]
    assert not x.is_contiguous()
    target = torch.full((5, 60), float("nan"))
    norm(ctx, x, out=target[:, 7:47])
    torch.testing.assert_close(target[:, 7:47], expected_norm(x))
    assert target[:, :7].isnan().all() and target[:, 47:].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "x: expected float32, got float64"),
        ({"out": np.zeros((3, 8), np.uint16)}, "out: expected float32, got another dtype"),
        ({"x": torch.zeros(3, 8, dtype=torch.bfloat16)}, "x: expected float32, got bfloat16"),
        ({"x": torch.zeros(8)}, r"x: expected \[T, n\], got \[8\]"),
        ({"weight": torch.ones(7)}, r"weight: expected \[n=8\], got \[7\]"),
        ({"out": torch.zeros(4, 8)}, r"out: expected \[T=3, n=8\], got \[4, 8\]"),
        ({"x": torch.zeros(8, 3).t()}, r"x: expected contiguous rows, got strides \[1, 3\]"),
        ({"weight": torch.ones(16)[::2]}, r"weight: expected a contiguous tensor, got strides \[2\]"),
        ({"weight": torch.zeros(1, 1, 1, 3, 8)}, r"weight: expected \[n=8\], got \[1, 1, 1, 3, \.\.\.\]"),
        ({"x": torch.zeros(3, 8, dtype=torch.complex64)}, "x: expected float32, got another dtype"),
    ],
)
def test_a_wrong_tensor_is_named(ctx, change, message):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.ones(8), "out": torch.zeros(3, 8), **change}
    with pytest.raises(NativeError, match=message) as caught:
        norm(ctx, **arguments)
    assert caught.value.slug == "invalid_argument"


def test_a_read_only_array_is_refused(ctx):
    x = np.zeros((3, 8), np.float32)
    x.flags.writeable = False
    with pytest.raises((NativeError, BufferError)):
        norm(ctx, x)


@pytest.mark.parametrize("junk", [None, "x", 3, [1.0, 2.0], object()])
def test_what_is_no_tensor_is_a_type_error(ctx, junk):
    with pytest.raises(TypeError, match="rms_norm"):
        _native.rms_norm(ctx, junk, torch.ones(8), 1e-6, torch.zeros(3, 8))


class Producer:
    """A tensor type without an exchange table, with a `__dlpack__` of the caller's choice."""

    def __init__(self, produce):
        self._produce = produce

    def __dlpack__(self, **kwargs):
        return self._produce(**kwargs)

    def __dlpack_device__(self):
        return (1, 0)


def test_producers_from_before_dlpack_1_are_taken(ctx):
    array = np.ones((2, 8), np.float32)

    class Old(Producer):
        def __dlpack__(self):
            return array.__dlpack__()

    out = torch.zeros(2, 8)
    _native.rms_norm(ctx, Old(None), torch.ones(8), 0.0, out)
    torch.testing.assert_close(out, torch.ones(2, 8))


def test_a_producer_that_raises_or_lies_does_no_harm(ctx):
    def explode(**_):
        raise RuntimeError("no tensor today")

    with pytest.raises(RuntimeError, match="no tensor today"):
        _native.rms_norm(ctx, Producer(explode), torch.ones(8), 1e-6, torch.zeros(2, 8))
    with pytest.raises(NativeError, match="something else than a DLPack capsule"):
        _native.rms_norm(ctx, Producer(lambda **_: 5), torch.ones(8), 1e-6, torch.zeros(2, 8))
    capsule = np.ones((2, 8), np.float32).__dlpack__()
    _native.rms_norm(ctx, Producer(lambda **_: capsule), torch.ones(8), 1e-6, torch.zeros(2, 8))
    with pytest.raises(NativeError, match="DLPack capsule"):  # a capsule can be consumed only once
        _native.rms_norm(ctx, Producer(lambda **_: capsule), torch.ones(8), 1e-6, torch.zeros(2, 8))


def test_an_optional_tensor_is_held_during_the_call(ctx):
    """What a producer makes for the call alone must not be freed before the call has read it."""
    made = []
    out = np.zeros((2, 8), np.float32)

    def produce_bias(**kwargs):
        array = np.ones(8, np.float32)
        made.append(weakref.ref(array))
        return array.__dlpack__(**kwargs)

    def produce_out(**kwargs):
        assert made[0]() is not None, "freed while the arguments are still being read"
        return out.__dlpack__(**kwargs)

    weight = _native.PackedMatrix(8, 4, "float32")
    weight.pack_rows(ctx, 0, torch.zeros(8, 4))
    _native.linear(ctx, np.ones((2, 4), np.float32), weight, Producer(produce_bias), Producer(produce_out))
    assert (out == 1).all()
    assert made[0]() is None, "kept after the call"


class OldTensor(ctypes.Structure):
    """DLManagedTensor, as producers from before DLPack 1 fill it. Nobody to call when it is done with."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 2),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


@contextlib.contextmanager
def made_by_hand(numbers: np.ndarray, *, device: int = 1, offset: int = 0):
    """A float32 tensor [2, 8] of `numbers` as neither torch nor numpy makes it, but others do."""
    shape = (ctypes.c_int64 * 2)(2, 8)
    managed = OldTensor(
        numbers.ctypes.data, (device, 0), 2, (2, 32), 1, shape, None, offset * numbers.itemsize, None, None
    )
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    capsule = new_capsule(ctypes.addressof(managed), b"dltensor", None)
    yield Producer(lambda **_: capsule)


def test_a_byte_offset_and_absent_strides_are_honoured(ctx):
    numbers = np.arange(32, dtype=np.float32)
    with made_by_hand(numbers, offset=12) as x:
        out = norm(ctx, x, torch.ones(8), torch.zeros(2, 8))
    torch.testing.assert_close(out, expected_norm(numbers[12:28].reshape(2, 8)))


@pytest.mark.parametrize(("device", "name"), [(2, "cuda"), (13, "cuda"), (8, "another device")])
def test_a_tensor_on_another_device_is_named(ctx, device, name):
    numbers = np.zeros(16, np.float32)
    with (
        made_by_hand(numbers, device=device) as x,
        pytest.raises(NativeError, match=f"^x: expected a tensor on cpu, got {name}$"),
    ):
        norm(ctx, x, torch.ones(8), torch.zeros(2, 8))
    with (
        made_by_hand(numbers, device=device) as out,
        pytest.raises(NativeError, match=f"^out: expected a tensor on cpu, got {name}$"),
    ):
        norm(ctx, torch.zeros(2, 8), torch.ones(8), out)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_nothing_is_kept(ctx, kind):
    def make(*shape):
        return torch.ones(*shape) if kind == "torch" else np.ones(shape, np.float32)

    tensors = [make(4, 8), make(8), make(4, 8)]
    for attempt in range(3):
        if attempt == 2:
            tensors[1] = make(9)  # refused half way
        before = [sys.getrefcount(tensor) for tensor in tensors]
        for _ in range(50):
            try:
                _native.rms_norm(ctx, tensors[0], tensors[1], 1e-6, tensors[2])
            except NativeError:
                assert attempt == 2
        gc.collect()
        assert [sys.getrefcount(tensor) for tensor in tensors] == before


def test_empty_tensors(ctx):
    assert norm(ctx, torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("num_threads", [0, -1, 5000])
def test_thread_counts_are_checked(num_threads):
    with pytest.raises(NativeError, match="num_threads: expected 1 to 1024"):
        _native.ExecutionContext(num_threads)


def test_threads_that_the_system_refuses_are_an_error():
    script = """
import resource
from pathlib import Path
from engine import _native, errors
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)  # room for the stacks of a few threads
try:
    _native.ExecutionContext(1000)
except errors.NativeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "num_threads: the system refused to start 1000 threads" in done.stdout


def test_unknown_instruction_set_names_what_there_is():
    with pytest.raises(NativeError, match="baseline.*got 'sse9'"):
        _native.ExecutionContext(1, "sse9")


def test_one_context_serves_many_threads():
    # More threads than cores, so that workers lose theirs in the middle of a region.
    ctx = _native.ExecutionContext(8)
    failures = []

    def hammer(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            x = torch.randn(int(torch.randint(1, 200, (1,), generator=generator)), 48, generator=generator)
            if not torch.allclose(norm(ctx, x), expected_norm(x), atol=1e-5):
                failures.append(x.shape)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_contexts_come_and_go():
    x = torch.randn(64, 32)
    for num_threads in (1, 2, 3, 7) * 10:
        ctx = _native.ExecutionContext(num_threads)
        torch.testing.assert_close(norm(ctx, x), expected_norm(x))
