"""Every op in plain PyTorch: slow, obvious, the oracle that the native kernels are tested against.

The names and arguments are those of `engine.ops.native`, so that a test can run a whole model on
either. Sums are taken in float64; nothing here is meant to be fast.
"""

from __future__ import annotations

import torch

from engine.ops import reference_quantized, reference_sampling
from engine.ops.attention_plan import AttentionPlan
from engine.ops.sampling import SamplingTensors


class ExecutionContext:
    """Stands in for the native context; there is nothing to own."""

    def __init__(self, num_threads: int = 1, isa: str = "auto", rounds_attention: bool = False) -> None:
        self.num_threads, self.rounds_attention = num_threads, rounds_attention
        self.isa = "reference"


class PackedMatrix:
    """A weight matrix [out_features, in_features], stored as the numbers that its format can hold."""

    def __init__(self, out_features: int, in_features: int, dtype: str, group_len: int = 0) -> None:
        self.dtype = dtype
        self.is_quantized = dtype in reference_quantized.GROUP_LEN
        self._group_len = group_len or reference_quantized.GROUP_LEN.get(dtype, 0)
        self.is_rounded = dtype == "bf16_dot"
        kind = "bfloat16" if self.is_rounded else "float32" if self.is_quantized else dtype
        self.weight = torch.zeros(out_features, in_features, dtype=getattr(torch, kind))
        self.column_scales = torch.ones(in_features)
        self.column_order: list[int] = []

    def balance_columns(self, ctx, parts: list[torch.Tensor]) -> None:
        self.column_scales = reference_quantized.column_scales(parts)

    def pack_rows(self, ctx, row_start: int, weight: torch.Tensor) -> None:
        if self.is_quantized:
            weight = weight.float() / self.column_scales
            weight = reference_quantized.quantize_weights(weight, self.dtype, self._group_len)
        self.weight[row_start : row_start + weight.shape[0]] = weight.to(self.weight.dtype)

    def pack_codes(
        self, ctx, row_start: int, codes: torch.Tensor, scales: torch.Tensor, offsets=None
    ) -> None:
        weight = reference_quantized.dequantize(codes, scales, offsets, self.dtype, self._group_len)
        self.weight[row_start : row_start + weight.shape[0]] = weight


def linear(ctx, x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if weight.column_order:
        x = x[:, weight.column_order]
    if weight.is_rounded:
        x = x.bfloat16()
    if weight.is_quantized:
        x = reference_quantized.quantize_activations(x.float() * weight.column_scales)
    product = x.double() @ weight.weight.double().T
    out.copy_(product if bias is None else product + bias.double())


def embedding(ctx, token_ids: torch.Tensor, weight: PackedMatrix, out: torch.Tensor) -> None:
    rows = weight.weight[token_ids.long()] * weight.column_scales
    if weight.column_order:
        rows = rows[:, torch.tensor(weight.column_order).argsort()]
    out.copy_(rows)


class LoraAdapter:
    """Weights of an adapter by (site, module), stored as they are."""

    def __init__(self, dtype: str, sites) -> None:
        self.sites, self.dtype = sites, getattr(torch, dtype)
        self.weights: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def pack(self, site: int, module: int, a: torch.Tensor, b: torch.Tensor) -> None:
        self.weights[site, module] = a.to(self.dtype), b.to(self.dtype)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.weights.values() for tensor in pair)


class LoraPlan:
    """The rows of each adapter."""

    def __init__(self, adapters, cu_rows: torch.Tensor, row_ids: torch.Tensor) -> None:
        ends = cu_rows.tolist()
        rows = [row_ids[begin:end].long() for begin, end in zip(ends, ends[1:], strict=False)]
        self.rows_of_each = list(zip(adapters, rows, strict=True))


def lora(ctx, x: torch.Tensor, site: int, plan: LoraPlan, workspace, out: torch.Tensor) -> None:
    _add_low_rank(lambda rows, a: x[rows].double() @ a.double().T, site, plan, out)


def lora_embedding(ctx, token_ids: torch.Tensor, site: int, plan: LoraPlan, workspace, out) -> None:
    _add_low_rank(lambda rows, a: a.double()[:, token_ids[rows].long()].T, site, plan, out)


def _add_low_rank(shrink, site: int, plan: LoraPlan, out: torch.Tensor) -> None:
    for adapter, rows in plan.rows_of_each:
        for module, (first, count, _, scale) in enumerate(adapter.sites[site][2]):
            a, b = adapter.weights[site, module]
            delta = scale * shrink(rows, a) @ b.double().T
            columns = slice(first, first + count)
            out[rows, columns] = (out[rows, columns].double() + delta).to(out.dtype)


def rms_norm(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    wide = x.double()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(wide * scale * weight.double())


def add_rms_norm(
    ctx, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    residual.add_(x)
    rms_norm(ctx, residual, weight, eps, out)


def rope(
    ctx, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    half = cos.shape[1]
    c, s = (table[positions.long()].double()[:, None, :] for table in (cos, sin))
    for heads in (q, k):
        first, second = heads[..., :half].double(), heads[..., half : 2 * half].double()
        turned = torch.cat([first * c - second * s, second * c + first * s], -1)
        heads[..., : 2 * half] = turned.to(heads.dtype)


def rope_append_kv(
    ctx, q, k, v, cos, sin, positions, k_cache, v_cache, slot_ids, kv_scales: torch.Tensor | None = None
) -> None:
    rope(ctx, q, k, cos, sin, positions)
    append_kv(ctx, k, v, k_cache, v_cache, slot_ids, kv_scales)


def append_kv(
    ctx,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_ids: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> None:
    block_size = v_cache.shape[2]
    blocks, offsets = slot_ids // block_size, slot_ids % block_size
    if kv_scales is not None:
        k, kv_scales[blocks, :, 0, offsets] = quantize_heads(k)
        v, kv_scales[blocks, :, 1, offsets] = quantize_heads(v)
    k_cache[blocks, :, :, offsets] = k.to(k_cache.dtype)
    v_cache[blocks, :, offsets, :] = v.to(v_cache.dtype)


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [T, G, D] and scales [T, G] of float32 x, in the very roundings of the native op."""
    largest = x.abs().amax(-1)
    is_zero = largest < 1e-35
    factor = torch.where(is_zero, 0, 127 / largest)
    codes = torch.nan_to_num((x * factor[..., None]).round(), 0, 0, 0).to(torch.int8)
    scales = torch.where(is_zero, 0, largest / 127)
    return codes, scales.masked_fill(~x.isfinite().all(-1), float("nan"))


def paged_attention(
    ctx,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int,
    softcap: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> None:
    block_size = v_cache.shape[2]
    is_rounded = getattr(ctx, "rounds_attention", False) and k_cache.dtype == torch.bfloat16
    if kv_scales is not None:
        k_cache = k_cache * kv_scales[:, :, 0, None, :].double()
        v_cache = v_cache * kv_scales[:, :, 1, :, None].double()
    for row, kv_len in enumerate(plan.kv_lens.tolist()):
        first, last = plan.cu_seqlens_q[row : row + 2].tolist()
        blocks = plan.block_tables[row, : -(-kv_len // block_size)].long()
        keys = k_cache[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :kv_len].double()
        values = v_cache[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, :kv_len].double()
        queries = (q[first:last].bfloat16() if is_rounded else q[first:last]).double()
        attended = _attend(queries, keys, values, scale, window, softcap, plan.is_causal, sinks, is_rounded)
        out[first:last] = attended.to(out.dtype)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    is_causal: bool,
    sinks: torch.Tensor | None,
    is_rounded: bool,
) -> torch.Tensor:
    """Attention of one sequence. Shapes: q [n, H, D], the last n positions; keys, values [G, kv_len, D]."""
    num_queries, num_heads, _ = q.shape
    num_kv_heads, kv_len, _ = keys.shape
    group = num_heads // num_kv_heads
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("nhd,hkd->hnk", q, keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(kv_len - num_queries, kv_len)[:, None] - torch.arange(kv_len)[None, :]
    visible = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if window > 0:
        visible &= distance.abs() < window
    scores = scores.masked_fill(~visible, float("-inf"))
    beside = torch.full((num_heads,), float("-inf")) if sinks is None else sinks
    scores = torch.cat([scores, beside.double()[:, None, None].expand(-1, num_queries, 1)], -1)
    weights = scores.softmax(-1)[:, :, :-1]
    return torch.einsum("hnk,hkd->nhd", _rounded(weights) if is_rounded else weights, values)


def _rounded(weights: torch.Tensor) -> torch.Tensor:
    """To bfloat16, relative to the largest of each 256 tokens."""
    parts = [(part, part.amax(-1, keepdim=True).clamp_min(1e-300)) for part in weights.split(256, -1)]
    return torch.cat([(part / largest).bfloat16() * largest for part, largest in parts], -1)


def silu_mul(ctx, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = gate_up.double().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def gelu_mul(ctx, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = gate_up.double().chunk(2, -1)
    out.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up)


def clamped_swiglu(ctx, gate_up: torch.Tensor, alpha: float, limit: float, out: torch.Tensor) -> None:
    gate, up = gate_up.double().chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    out.copy_((up + 1) * gate * torch.sigmoid(alpha * gate))


def softcap(ctx, x: torch.Tensor, cap: float) -> None:
    x.copy_(cap * torch.tanh(x.double() / cap))


def erf_gelu_mul(ctx, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = gate_up.double().chunk(2, -1)
    out.copy_(torch.nn.functional.gelu(gate) * up)


def gated_linear(
    ctx, x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, activation: str, out: torch.Tensor
) -> None:
    gate_up = torch.empty(len(x), 2 * out.shape[1])
    linear(ctx, x, weight, bias, gate_up)
    multiply = {"silu": silu_mul, "gelu_tanh": gelu_mul, "gelu": erf_gelu_mul}[activation]
    multiply(ctx, gate_up, out)


def gated_mlp(
    ctx,
    x: torch.Tensor,
    gate_up: PackedMatrix,
    gate_up_bias: torch.Tensor | None,
    activation: str,
    product: torch.Tensor,
    down: PackedMatrix,
    down_bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    gated_linear(ctx, x, gate_up, gate_up_bias, activation, product)
    linear(ctx, product, down, down_bias, out)


def activate(ctx, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
        "tanh": torch.tanh,
    }
    out.copy_(functions[activation](x.double()))


def layer_norm(
    ctx,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    if residual is not None:
        x = residual.add_(x)
    wide_bias = None if bias is None else bias.double()
    out.copy_(torch.nn.functional.layer_norm(x.double(), weight.shape, weight.double(), wide_bias, eps))


def pool(
    ctx,
    x: torch.Tensor,
    cu_rows: torch.Tensor,
    first_positions: torch.Tensor,
    mode: str,
    out: torch.Tensor,
) -> None:
    for text in range(len(out)):
        rows = x[cu_rows[text] : cu_rows[text + 1]].double()
        if mode == "max":
            out[text] = torch.cat([out[text : text + 1].double(), rows]).amax(0)
        else:
            positions = first_positions[text] + torch.arange(len(rows)) + 1
            weights = (
                positions.double() if mode == "weighted_sum" else torch.ones(len(rows), dtype=torch.float64)
            )
            out[text] = out[text].double() + weights @ rows


def sample(ctx, tensors: SamplingTensors) -> None:
    for row in range(len(tensors.out_ids)):
        logits = tensors.logits[row]
        params = _row_params(tensors, row)
        tensors.out_ids[row] = reference_sampling.sample_row(logits, params)
        num_top = int(tensors.num_top_logprobs[row])
        if num_top >= 0:
            logprobs = reference_sampling.reported(
                logits, params, processed=tensors.reports_processed, as_logits=tensors.reports_logits
            )
            tensors.out_logprobs[row] = logprobs[tensors.out_ids[row]]
            top = logprobs.topk(num_top)
            tensors.top_ids[row, :num_top], tensors.top_logprobs[row, :num_top] = top.indices, top.values


def score_tokens(
    ctx, logits, token_ids, num_top_logprobs, out_logprobs, top_ids, top_logprobs, reports_logits=False
) -> None:
    for row, (token_id, num_top) in enumerate(zip(token_ids, num_top_logprobs.tolist(), strict=True)):
        logprobs = reference_sampling.reported(logits[row], as_logits=reports_logits)
        out_logprobs[row] = logprobs[token_id]
        top = logprobs.topk(num_top)
        top_ids[row, :num_top], top_logprobs[row, :num_top] = top.indices, top.values


def _row_params(tensors: SamplingTensors, row: int) -> reference_sampling.RowParams:
    def ragged(values: torch.Tensor, indptr: torch.Tensor) -> list:
        return values[indptr[row] : indptr[row + 1]].tolist()

    known, prompt_len = ragged(tensors.token_ids, tensors.token_indptr), int(tensors.prompt_lens[row])
    bias_ids = ragged(tensors.bias_ids, tensors.bias_indptr)
    bias_values = ragged(tensors.bias_values, tensors.bias_indptr)
    return reference_sampling.RowParams(
        temperature=float(tensors.temperature[row]),
        top_k=int(tensors.top_k[row]),
        top_p=float(tensors.top_p[row]),
        min_p=float(tensors.min_p[row]),
        repetition_penalty=float(tensors.repetition_penalty[row]),
        frequency_penalty=float(tensors.frequency_penalty[row]),
        presence_penalty=float(tensors.presence_penalty[row]),
        seed=int(tensors.seeds[row]),
        choice=int(tensors.choices[row]),
        position=int(tensors.positions[row]),
        prompt=tuple(known[:prompt_len]),
        output=tuple(known[prompt_len:]),
        logit_bias=tuple(zip(bias_ids, bias_values, strict=True)),
    )
