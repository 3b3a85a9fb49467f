"""Random adapters, made and saved by peft."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES = (*LINEAR, "lm_head", "embed_tokens")


def make_adapter(model, targets: str | Sequence[str] = LINEAR, *, rank: int = 8, seed: int = 0, **fields):
    """The model wrapped by peft, with random weights large enough to change every answer.

    `unload()` of what is returned gives the model back as it was.
    """
    import peft

    config = peft.LoraConfig(
        r=rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        **{"lora_alpha": 16, "task_type": "CAUSAL_LM", **fields},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, which are told apart here
        wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" not in name:
                continue
            if "_A" in name:
                spread = 1.0 if "embedding_A" in name else parameter.shape[1] ** -0.5
            else:  # what is added is about as large as the layer's own output
                spread = parameter.shape[1] ** 0.5 / 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return wrapped


def save_adapter(wrapped, directory: Path) -> Path:
    """Save as peft does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(directory)
    return directory
