"""What llama.cpp's q8_0 and q4_0 weights do to a model, from the public description of the formats.

Both have blocks of 32 with one scale in half precision. q8_0: the scale is the largest magnitude over
127, codes are rounded to nearest. q4_0: the scale is the value of largest magnitude over -8, codes
are floor(x / scale + 8.5), at most 15. Products quantise the activations to q8_0 too.
Source: ggml's documentation of its quantisation types.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]
BLOCK = 32


def blockwise(values: torch.Tensor, block: int, rounded: Rounding) -> torch.Tensor:
    """`rounded` gets and returns [..., blocks, block]; the last block is padded with zeros."""
    num_k = values.shape[-1]
    blocks = torch.nn.functional.pad(values, (0, -num_k % block)).unflatten(-1, (-1, block))
    return rounded(blocks).flatten(-2)[..., :num_k]


def q8_0(values: torch.Tensor) -> torch.Tensor:
    def rounded(blocks: torch.Tensor) -> torch.Tensor:
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        return torch.where(scale > 0, blocks / scale, 0).round() * scale.half().float()

    return blockwise(values, BLOCK, rounded)


def q4_0(values: torch.Tensor) -> torch.Tensor:
    def rounded(blocks: torch.Tensor) -> torch.Tensor:
        scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
        codes = (torch.where(scale != 0, blocks / scale, 0) + 8.5).floor().clamp(0, 15) - 8
        return codes * scale.half().float()

    return blockwise(values, BLOCK, rounded)


class RoundedLinear(torch.nn.Module):
    """A linear layer with rounded weights, that rounds what it reads."""

    def __init__(self, linear: torch.nn.Linear, weights: Rounding, activations: Rounding) -> None:
        super().__init__()
        self.weight, self.bias, self.activations = weights(linear.weight.data), linear.bias, activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.activations(x), self.weight, self.bias)


def with_rounded_weights(model, weights: Rounding, activations: Rounding = q8_0):
    """A copy of a transformers model whose linear layers and embedding are rounded."""
    model = copy.deepcopy(model)
    head = RoundedLinear(model.lm_head, weights, activations)
    embedding = model.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(weights(embedding.weight.data))
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, RoundedLinear(child, weights, activations))
    model.lm_head = head
    return model
