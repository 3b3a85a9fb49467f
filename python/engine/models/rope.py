"""Cosine and sine tables of rotary position embedding."""

from __future__ import annotations

import math

import torch

from engine.models.spec import RopeSpec


def rope_tables(rope: RopeSpec, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables for positions 0 to `num_positions` - 1.

    Shapes: cos and sin float32 [num_positions, rotary_dim / 2].
    Cost: 4 bytes * rotary_dim * num_positions.
    """
    angles = (
        torch.arange(num_positions, dtype=torch.float32)[:, None]
        * inverse_frequencies(rope, num_positions)[None, :]
    )
    return angles.cos().mul_(rope.attention_factor), angles.sin().mul_(rope.attention_factor)


def inverse_frequencies(rope: RopeSpec, num_positions: int) -> torch.Tensor:
    """Radians a token, float32 [rotary_dim / 2], in the order of operations of `transformers`.

    LongRoPE has two sets. The one for long contexts is taken where `num_positions` exceeds what the
    model was first trained on, for short prompts too: a token's keys must not depend on what follows it.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    periods = rope.theta**exponents
    plain = 1.0 / periods
    if rope.kind == "longrope":
        is_long = num_positions > rope.original_max_positions
        return 1.0 / (torch.tensor(rope.long_factors if is_long else rope.short_factors) * periods)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        ramp = _yarn_ramp(rope)
        return (1.0 / (rope.factor * periods)) * (1 - ramp) + plain * ramp
    return plain


def _llama3(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / plain
    longest_kept = rope.original_max_positions / rope.high_freq_factor
    shortest_stretched = rope.original_max_positions / rope.low_freq_factor
    scaled = torch.where(wavelengths > shortest_stretched, plain / rope.factor, plain)
    smooth = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_stretched)
    return torch.where(between, blended, scaled)


def _yarn_ramp(rope: RopeSpec) -> torch.Tensor:
    """Share of the unscaled frequency, 1 for fast dimensions down to 0 for slow ones."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    dimensions = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    return 1 - torch.clamp((dimensions - low) / (high - low), 0, 1)


def device_rope_tables(
    rope: RopeSpec, num_positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on a device. Computed on the CPU wherever they go, so that every device turns by the same
    angles."""
    with torch.device("cpu"):
        cos, sin = rope_tables(rope, num_positions)
    return cos.to(device), sin.to(device)
