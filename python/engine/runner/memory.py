"""How much memory weights and cache take, before any of it is allocated. No torch here."""

from __future__ import annotations

import dataclasses

from engine.models.any_model import AnySpec
from engine.models.encoder_spec import EncoderSpec
from engine.models.spec import ModelSpec, num_elements

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
WEIGHT_BYTES = {**DTYPE_BYTES, "bf16_dot": 2, "int8": 1 + 4 / 128, "int4": 1 / 2 + 2 / 32, "fp8": 1}
"""Per weight, with its share of the scales."""
CODE_BYTES = {"int8": 1.0, "int4": 0.5, "int4_affine": 0.5}
SCALE_BYTES = {"int8": 4, "int4": 2, "int4_affine": 8}

ARRIVAL_BYTES = 4 << 20
"""What decode attention counts finished splits in."""
DRAW_BYTES = 48 << 10
"""Scratch memory for a drawn token; more where many log-probabilities are asked for."""
TOKEN_BYTES = 64
"""Of the arrays of a step, for a token and for a request, beside its block table."""
PACKED_ELEMENTS = 16 << 20
"""Of a matrix that a GPU quantises or packs at once."""
PACKING_BYTES = 24
"""For each of them: as they come, in float32 several times, and as codes."""
GRAPH_BYTES = 512 << 20
"""For nodes and arguments of all graphs of decode steps; not measured."""
DEQUANTIZING_BYTES = 17
"""For an element of a matrix while it becomes floats: its code, and four float32 copies at most."""
ENCODER_STEP_TOKENS = 1024
"""More rows make the products of an encoder no faster, and leave the caches."""

GPU_TEXT_TOKENS = 1024
"""Of a batch of texts that a GPU embeds. Each may be a text of its own, with a block of all layers."""
TEXT_BLOCK_SIZE = 16
"""Tokens of a block of texts that a decoder embeds, where no chat model says another."""


def block_bytes(spec: AnySpec, block_size: int, dtype: str) -> int:
    """Keys and values of one block, over all layers; of 8 bits with the scales."""
    head_bytes = spec.head_dim + 4 if dtype in ("int8", "fp8") else spec.head_dim * DTYPE_BYTES[dtype]
    return 2 * spec.num_layers * spec.num_kv_heads * block_size * head_bytes


def blocks_that_fit(spec: AnySpec, block_size: int, dtype: str, budget_bytes: int) -> int:
    """Whole blocks in a budget; 0 when not even one fits."""
    return max(budget_bytes, 0) // block_bytes(spec, block_size, dtype)


def weight_bytes(spec: AnySpec, dtype: str) -> int:
    """All matrices at `dtype`, or int8 or int4, but for those that the checkpoint has in few bits; norms and
    biases are within the rounding."""
    total = spec.num_parameters * WEIGHT_BYTES[dtype]
    for name, stored in spec.stored.items():
        own_bytes = CODE_BYTES[stored.dtype] + SCALE_BYTES[stored.dtype] / stored.group_len
        total += num_elements(spec, name) * (own_bytes - WEIGHT_BYTES[dtype])
    return round(total)


def num_text_blocks(max_tokens: int, max_len: int, block_size: int) -> int:
    """Of the largest batch that a decoder embeds: one text of `max_len` tokens, or `max_tokens` texts."""
    return max(max_tokens, -(-max_len // block_size))


def text_bytes(spec: ModelSpec, dtype: str, max_tokens: int, max_len: int) -> int:
    """Keys, values and rows of the largest batch that a decoder embeds; a text whose tokens see both ways is
    computed as a whole."""
    num_rows = max_tokens if spec.is_causal else max(max_tokens, max_len)
    num_blocks = num_text_blocks(max_tokens, max_len, TEXT_BLOCK_SIZE)
    return num_blocks * block_bytes(spec, TEXT_BLOCK_SIZE, dtype) + 4 * num_rows * row_elements(spec)


def own_text_bytes(spec: AnySpec, dtype: str, block_size: int, max_tokens: int, max_len: int) -> int:
    """What a chat model that also embeds takes beside what it generates with, whose rows it uses."""
    return num_text_blocks(max_tokens, max_len, block_size) * block_bytes(spec, block_size, dtype)


def encoder_text_bytes(spec: EncoderSpec, max_len: int) -> int:
    """Rows of the largest batch of an encoder, and a block of keys and values of one layer for each token,
    as each may be a text of its own."""
    num_rows = max(ENCODER_STEP_TOKENS, max_len)
    row = 7 * spec.hidden_size + (3 if spec.is_gated else 1) * spec.intermediate_size
    return 4 * num_rows * (row + 2 * TEXT_BLOCK_SIZE * spec.hidden_size)


def gpu_encoder_bytes(spec: EncoderSpec, dtype: str, max_len: int) -> int:
    """The same on a GPU, with tables of positions; up to eight rows in float32, of norms while they are
    computed or of what is pooled, and one of the inner size that an activation gives."""
    num_rows = max(ENCODER_STEP_TOKENS, max_len)
    size = DTYPE_BYTES[dtype]
    temporary = num_rows * (4 * 8 * spec.hidden_size + size * spec.intermediate_size)
    tables = 4 * max_len * spec.head_dim * len(set(spec.rope_thetas))
    return encoder_text_bytes(spec, max_len) * size // 4 + temporary + tables + TOKEN_BYTES * 2 * num_rows


def gpu_decoder_bytes(spec: ModelSpec, dtype: str, max_len: int) -> int:
    """What a decoder that only embeds takes of a GPU beside its weights: rows of its own, too."""
    num_rows = GPU_TEXT_TOKENS if spec.is_causal else max(GPU_TEXT_TOKENS, max_len)
    rows = num_rows * row_elements(spec) * DTYPE_BYTES[dtype]
    tables = sum(4 * max_len * rope.rotary_dim for rope in set(spec.ropes) if rope)
    experts = expert_bytes(spec, num_rows, DTYPE_BYTES[dtype])
    pooled = 4 * (num_rows - GPU_TEXT_TOKENS) * spec.hidden_size * (2 + 6)
    blocks = gpu_text_bytes(spec, dtype, TEXT_BLOCK_SIZE, GPU_TEXT_TOKENS, max_len)
    return blocks + pooled + rows + tables + experts + ARRIVAL_BYTES


def gpu_text_bytes(spec: ModelSpec, dtype: str, block_size: int, chunk: int, max_len: int) -> int:
    """The same on a GPU, with rows in float32 while they are pooled. What is pooled of all texts, at most six
    ways, is as much as the rows."""
    num_tokens = min(chunk, GPU_TEXT_TOKENS)
    rows = 4 * num_tokens * spec.hidden_size * (2 + 6)
    return own_text_bytes(spec, dtype, block_size, num_tokens, max_len) + rows


def row_elements(spec: ModelSpec) -> int:
    """Of everything that the workspace keeps of a row."""
    row = 4 * spec.hidden_size + 2 * spec.num_heads * spec.head_dim + spec.qkv_size
    return row + 3 * spec.dense_size


def split_bytes(spec: ModelSpec, max_rows: int, context_length: int) -> int:
    """What decode attention of a GPU leaves of each split of the keys; see cuda/kernel_args.h."""
    splits = min(-(-context_length // 256), 64)
    return 4 * max_rows * splits * spec.num_heads * (spec.head_dim + 4)


def expert_bytes(spec: ModelSpec, num_rows: int, size: int) -> int:
    """Rows of a GPU's experts, in elements of `size` bytes: one for each that a row has chosen; what they are
    sorted by; and their scores, with the rows that a float32 router sees."""
    if spec.experts is None:
        return 0
    own = spec.experts
    row = (3 * own.intermediate_size + spec.hidden_size) * size + 40
    return num_rows * (own.num_chosen * row + 4 * (spec.hidden_size + 3 * own.num_experts))


def graph_bytes(spec: ModelSpec, max_rows: int, context_length: int, size: int) -> int:
    """What graphs of decode steps may take at most: what the largest needs while it runs, which all of them
    share, and the graphs themselves."""
    experts = expert_bytes(spec, max_rows, size)
    return GRAPH_BYTES + max(split_bytes(spec, max_rows, context_length), experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBounds:
    """Of the steps of an engine on a GPU: tokens, requests and drawn tokens of one, tokens of a request."""

    max_tokens: int
    max_rows: int
    max_draws: int
    context_length: int
    block_size: int
    max_lora_rank: int


def step_bytes(spec: ModelSpec, bounds: StepBounds, dtype: str, quantization: str) -> dict[str, int]:
    """What steps take of a GPU beside weights, cache and graphs, by what it is for: what stays allocated, and
    what each needs while it runs."""
    size, num_tokens, context_length = DTYPE_BYTES[dtype], bounds.max_tokens, bounds.context_length
    heads = spec.num_heads * spec.head_dim
    num_parts = 1 if spec.has_fused_projections else 3
    lora = 4 * max(num_tokens, bounds.max_draws) * num_parts * bounds.max_lora_rank
    moves_columns = quantization == "int8" or any(kept.has_order for kept in spec.stored.values())
    moved = num_tokens * max(spec.hidden_size, heads, spec.intermediate_size) * size if moves_columns else 0
    logits = 4 * (2 * spec.vocab_size + -(-spec.vocab_size // 32))  # as they come, as changed, and a bit each
    tables = 4 * bounds.max_rows * -(-context_length // bounds.block_size)
    return {
        "rows": num_tokens * row_elements(spec) * size + moved + lora,
        "logits and draws": bounds.max_draws * (logits + DRAW_BYTES),
        "attention": split_bytes(spec, bounds.max_rows, context_length) + ARRIVAL_BYTES,
        **({"experts": expert_bytes(spec, num_tokens, size)} if spec.experts else {}),
        "positions": sum(4 * context_length * rope.rotary_dim for rope in set(spec.ropes) if rope),
        "inputs": 2 * (tables + TOKEN_BYTES * (num_tokens + bounds.max_rows)),
    }
