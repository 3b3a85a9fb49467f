"""Checkpoints in few bits, written plainly after the published layouts: a number at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.tiny_models import make_model, save_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(numbers: torch.Tensor, bits: int = 4, order=None) -> torch.Tensor:
    """int32 words of numbers [..., n]: number order[i] of each word's share in its i-th lowest bits."""
    in_word = 32 // bits
    numbers = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[-1] % in_word)).unflatten(
        -1, (-1, in_word)
    )
    words = torch.zeros(numbers.shape[:-1], dtype=torch.int64)
    for i in range(in_word):
        words |= numbers[..., i if order is None else order[i]] << bits * i
    return torch.where(words >= 2**31, words - 2**32, words).int()


class Quantized:
    """Random codes, scales and zero points of a matrix, and the numbers that they stand for."""

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        bits=4,
        group_size=32,
        symmetric=False,
        order=False,
        dtype=torch.float16,
    ):
        rows, columns = weight.shape
        seed = rows * 1000 + columns
        generator = torch.Generator().manual_seed(seed)
        size, middle = group_size or columns, 1 << bits - 1
        groups = -(-columns // size)
        self.codes = torch.randint(1 << bits, (rows, columns), generator=generator)
        std = float(weight.float().std()) / (4.6 if bits == 4 else 74)
        self.scales = (torch.rand(rows, groups, generator=generator).add(0.5) * std).to(dtype)
        low, high = (middle, middle + 1) if symmetric else (middle - 3, middle + 4)
        self.zeros = torch.randint(low, high, (rows, groups), generator=generator)
        if not symmetric:
            self.zeros[0, 0], self.zeros[-1, -1] = 0, (1 << bits) - 1
        self.group_of_column = torch.arange(columns) // size
        if order:
            self.group_of_column = self.group_of_column[torch.randperm(columns, generator=generator)]
        scales, zeros = self.scales.double()[:, self.group_of_column], self.zeros[:, self.group_of_column]
        self.weight = ((self.codes - zeros) * scales).float()


def awq(q: Quantized) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack(q.codes.T, order=AWQ_ORDER),
        "qzeros": pack(q.zeros.T, order=AWQ_ORDER),
        "scales": q.scales.T.contiguous(),
    }


def gemv(q: Quantized, group_size: int) -> dict[str, torch.Tensor]:
    """Zero points fill words, and as many words as groups of 128 columns have."""
    groups = q.scales.shape[1]
    words = -(-groups // 8)
    if group_size in (32, 64):
        words = -(-words // (128 // group_size)) * (128 // group_size)
    fill = (0, 8 * words - groups)
    return {
        "qweight": pack(q.codes),
        "qzeros": pack(torch.nn.functional.pad(q.zeros, fill)),
        "scales": torch.nn.functional.pad(q.scales, fill),
    }


def gptq(q: Quantized, bias: int = 1) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack(q.codes).T.contiguous(),
        "qzeros": pack((q.zeros.T - bias) % 16),
        "scales": q.scales.T.contiguous(),
        "g_idx": q.group_of_column.int(),
    }


def packed(q: Quantized, bits: int, symmetric: bool, order: bool) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": pack(q.codes, bits),
        "weight_scale": q.scales,
        "weight_shape": torch.tensor(q.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(q.zeros.T, bits).T.contiguous()
    if order:
        tensors["weight_g_idx"] = q.group_of_column.int()
    return tensors


def plain(q: Quantized, symmetric: bool) -> dict[str, torch.Tensor]:
    tensors = {"weight": (q.codes - 128).to(torch.int8), "weight_scale": q.scales}
    return tensors if symmetric else {**tensors, "weight_zero_point": (q.zeros - 128).to(torch.int8)}


def compressed(layout: str, bits: int, group_size: int, symmetric: bool, order: bool) -> dict:
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    weights["actorder"] = "group" if order else None
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def write_quantized(directory: Path, method: str, *, kind: str = "llama", group_size: int = 32, **options):
    """Save a tiny model whose linear layers are in few bits; the model with the numbers they stand for."""
    model = make_model(kind, **({"use_sliding_window": False} if kind.startswith("qwen") else {}))
    bits = options.get("bits", 8 if method == "int-quantized" else 4)
    symmetric, order = options.get("symmetric", bits == 8), options.get("order", False)
    dtype = options.get("dtype", torch.float16)
    writers = {
        "awq": awq,
        "awq-gemv": lambda q: gemv(q, group_size),
        "awq-symmetric": lambda q: {key: value for key, value in awq(q).items() if key != "qzeros"},
        "gptq": gptq,
        "gptq_v2": lambda q: gptq(q, 0),
        "pack-quantized": lambda q: packed(q, bits, symmetric, order),
        "int-quantized": lambda q: plain(q, symmetric),
    }
    configs = {
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group_size or -1, "zero_point": True},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": group_size or -1, "sym": symmetric},
    }
    configs["gptq"]["desc_act"] = order
    configs["awq-gemv"] = {**configs["awq"], "version": "gemv"}
    configs["awq-symmetric"] = {**configs["awq"], "zero_point": False}
    configs["gptq_v2"] = {**configs["gptq"], "checkpoint_format": "gptq_v2"}
    config = configs.get(method) or compressed(method, bits, group_size, symmetric, order)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "layers" not in name:
                tensors[name] = parameter.clone()
                continue
            q = Quantized(
                parameter, bits=bits, group_size=group_size, symmetric=symmetric, order=order, dtype=dtype
            )
            parameter.copy_(q.weight)
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.{part}": tensor for part, tensor in writers[method](q).items()}
    save_model(model, directory)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, directory / "model.safetensors")
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    return model
