"""Whether a model that runs through transformers computes what it should, and the same in every batch.

Most of its code is not ours. Before it serves, a few tokens go through it in several ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import ConfigError, EngineError
from engine.models.any_model import AnyModel, AnySpec
from engine.models.decoder import DecoderInputs
from engine.models.fallback.spec import TransformersSpec
from engine.models.spec import ModelSpec
from engine.runner.kv_cache import KVCache
from engine.runner.text_batch import TextBatch

if TYPE_CHECKING:
    from engine.models.fallback.decoder import TransformersDecoder

BLOCK_SIZE = 16
TEXT_LENS = (61, 34, 1)
STEPS = ((1, 0, 1), (3, 17, 0), (16, 1, 0), (2, 3, 0), (38, 0, 0), (1, 13, 0))
"""Tokens that each text gets in each step: odd chunks, beside others and alone."""

MIXES_ROWS = frozenset({"convolution", "cumprod", "_fft_r2c"})
"""Functions that look at earlier rows, which may be of another request."""

TOLERANCE = {"none": 1e-3, "bf16_dot": 0.05, "int8": 0.05, "int4": 0.05}
"""Of a row's length, between two orders of sums; fewer bits make steps of small differences."""

ROW_INDEPENDENT = frozenset(
    ("native_layer_norm", "_softmax", "mean", "sum", "pow", "amax", "max", "aminmax", "topk", "sort")
    + ("index_add", "index_put", "index_select", "index", "gather", "scatter", "nonzero", "embedding")
    + ("cat", "stack", "clone", "copy", "fill", "zero", "_to_copy", "_unsafe_view", "constant_pad_nd")
    + ("empty", "empty_like", "zeros", "zeros_like", "ones", "full", "new_empty", "new_zeros", "arange")
    + ("repeat", "_local_scalar_dense")
)
"""Functions of torch whose result for a row comes from that row alone, in one order, beside those that torch
itself calls pointwise or views. Products of matrices are not among them. In-place forms count as their plain
ones."""


class Verdict(NamedTuple):
    """`reason` says what speaks against it, or is empty."""

    is_batch_invariant: bool
    reason: str


def check_batches(model: AnyModel, spec: AnySpec, quantization: str) -> Verdict:
    """A model of ours is batch-invariant by its making; another is tried.

    Raises: `ConfigError` for one that is not served right, or fails.
    """
    if isinstance(spec, ModelSpec):
        return Verdict(True, "")
    try:
        return _try(model, spec, quantization)
    except EngineError:
        raise
    except Exception as error:  # the configuration is foreign input, and so is the code that follows it
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{spec.architecture} cannot compute with this configuration: {reason}") from None


def _try(model: TransformersDecoder, spec: TransformersSpec, quantization: str) -> Verdict:
    """Compare whole texts with odd pieces of them in mixed batches, and with transformers' own attention.

    The verdict is that bits are the same and that only functions that cannot change them ran.
    Raises: `ConfigError` when results differ by more than rounding: the model is not served right this way.
    """
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, spec.vocab_size, length) for length in TEXT_LENS]
    tolerance = TOLERANCE[quantization]
    alone = [_Run(model, spec, [text]).step([len(text)]) for text in texts]
    for states, text in zip(alone, texts, strict=True):
        if _difference(states[0], model.compute_alone(torch.from_numpy(text))) > tolerance:
            raise ConfigError(
                f"{spec.architecture} does not compute the same with paged attention; not served"
            )
    run = _Run(model, spec, texts)
    with _Functions() as seen:
        pieces = [run.step(counts) for counts in STEPS]
    joined = [torch.cat([step[text] for step in pieces]) for text in range(len(texts))]
    differences = [_difference(ours, whole[0]) for ours, whole in zip(joined, alone, strict=True)]
    if max(differences) > tolerance / 10 or seen.others & MIXES_ROWS:
        raise ConfigError(
            f"{spec.architecture} keeps more than keys and values from token to token, which is not supported"
        )
    if any(not torch.equal(ours, whole[0]) for ours, whole in zip(joined, alone, strict=True)):
        return Verdict(False, "a batch changes last bits")
    if seen.others:
        return Verdict(False, f"it runs {', '.join(sorted(seen.others))}, whose bits may depend on the batch")
    return Verdict(True, "")


class _Run:
    """Texts that are computed piece by piece, on a cache of their own."""

    def __init__(self, model: TransformersDecoder, spec: TransformersSpec, texts: list[np.ndarray]) -> None:
        self._model, self._texts = model, texts
        lens = np.array([len(text) for text in texts])
        self._batch = TextBatch(lens, BLOCK_SIZE, is_causal=True)
        num_blocks = int((-(-lens // BLOCK_SIZE)).sum())
        cache = KVCache(spec, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32)
        self._kv_layers, self._done = cache.layers, np.zeros(len(texts), np.int64)

    def step(self, counts: tuple[int, ...] | list[int]) -> list[torch.Tensor]:
        """The hidden states of the next tokens of each text."""
        taken = np.array(counts)
        positions, slot_ids, plan = self._batch.piece(self._done, taken)
        pieces = [
            text[start : start + count]
            for text, start, count in zip(self._texts, self._done, taken, strict=True)
        ]
        self._done += taken
        inputs = DecoderInputs(
            token_ids=torch.from_numpy(np.concatenate(pieces).astype(np.int32)),
            positions=positions,
            slot_ids=slot_ids,
            logit_rows=torch.arange(taken.sum()),
            plan=plan,
        )
        hidden = self._model.forward(inputs, self._kv_layers)
        self._model.project(hidden[:1])
        return list(hidden.clone().split(taken.tolist()))


class _Functions(TorchDispatchMode):
    """Collects which functions of torch run that are not known to be row-independent."""

    def __init__(self) -> None:
        super().__init__()
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_outer = name == "bmm" and args[0].shape[-1] == 1  # angles: one product an element, no sum
        is_elementwise = torch.Tag.pointwise in func.tags or func.is_view
        is_exact = not any(isinstance(arg, list) or _is_rounded(arg) for arg in args)  # whole numbers alone
        if not (is_outer or is_elementwise or is_exact or name.removesuffix("_") in ROW_INDEPENDENT):
            self.others.add(name)
        return func(*args, **(kwargs or {}))


def _is_rounded(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Between rows, in units of their length; the median, for rounding may send some to other experts.

    Infinite for numbers that are none.
    """
    ratios = (ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-30)
    return float(ratios.median()) if torch.isfinite(ratios).all() else float("inf")
