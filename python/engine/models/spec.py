"""The facts of a checkpoint that the engine needs. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding. Only the fields of its `kind` have a meaning.

    Units: positions are tokens; `rotary_dim` counts elements of a head, the first ones.
    Source: Su et al. 2021; Chen et al. 2023 (linear); Peng et al. 2023 (YaRN); Llama 3.1 model card;
    Ding et al. 2024 (LongRoPE).
    """

    kind: str
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The mixture of experts of a model, and how its checkpoint names it.

    `weighs_all`: an expert's weight is its share in the softmax over all experts; otherwise over the
    chosen ones. `layers` has one entry a layer: whether it has experts instead of one MLP.
    Source: Jiang et al. 2024 (Mixtral), section 2.1.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    weighs_all: bool
    layers: tuple[bool, ...]
    module_name: str
    """Under a layer's prefix; holds the router and `experts`."""
    router_name: str
    projection_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacking: str = "none"
    """"none" where each expert has tensors of its own; "dense" or "mxfp4" where those of all are one."""
    has_bias: bool = False
    swiglu: tuple[float, float] | None = None
    """Alpha and limit of `ops.clamped_swiglu`; None for silu."""


@dataclasses.dataclass(frozen=True)
class StoredFormat:
    """How a checkpoint stores a matrix in few bits: packed as it is, whatever the other matrices become.

    `dtype` and `group_len` are those of a packed matrix. `has_order`: its columns are grouped in an order of
    their own, which no other matrix need share.
    """

    dtype: str
    group_len: int
    has_order: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer in numbers and flags.

    `windows` has one entry a layer: the tokens that a query sees, itself included; 0 means all.
    `ropes` has one entry a layer, None where positions are not encoded.
    `dtype` is that of the checkpoint, not of the computation.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    ropes: tuple[RopeSpec | None, ...]
    windows: tuple[int, ...]
    activation: str
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: str
    """"none"; "head", over each head of q and k; or "row", over all heads of a token at once."""
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    attention_scale: float
    """What the product of a query and a key is multiplied by."""
    attention_softcap: float = 0.0
    """Bound c of attention scores, c tanh(score / c); 0 for none."""
    logit_softcap: float = 0.0
    """The same of logits."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What a layer's two updates are multiplied by before they are added to the residual stream."""
    logit_divisor: float = 1.0
    norms: str = "before"
    """Where a layer normalises: "before" attention and MLP, "after" them, or "both"."""
    norm_offset: float = 0.0
    """What is added to the checkpoint's norm weights."""
    experts: ExpertsSpec | None = None
    is_causal: bool = True
    """Otherwise tokens see later ones, too: a model that embeds and cannot generate. A window then counts the
    tokens on each side."""
    has_sinks: bool = False
    """Whether each query head has a learned score that takes part in the softmax and adds no value."""
    has_fused_projections: bool = False
    """Whether the checkpoint stores q, k and v as one tensor, and gate and up as one."""
    stored: Mapping[str, StoredFormat] = dataclasses.field(default_factory=dict)
    """Matrices that the checkpoint holds in few bits, by name without ".weight"."""
    largest_dequantized: int = 0
    """Elements of the largest matrix that becomes floats while it is loaded."""

    def in_full(self) -> ModelSpec:
        """The same model with nothing in few bits, as for invented weights."""
        experts = self.experts
        if experts is not None and experts.stacking != "none":
            experts = dataclasses.replace(experts, stacking="dense")
        return dataclasses.replace(self, stored={}, experts=experts)

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def dense_size(self) -> int:
        """`intermediate_size`, or 0 where every layer has experts, whose rows are their own."""
        return 0 if self.experts is not None and all(self.experts.layers) else self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Elements of all projection matrices and embeddings; norms and biases are not worth counting."""
        attention = (self.qkv_size + self.num_heads * self.head_dim) * self.hidden_size
        mlp = 3 * self.intermediate_size * self.hidden_size
        experts = self.experts
        num_sparse = sum(experts.layers) if experts else 0
        mlps = (self.num_layers - num_sparse) * mlp
        if experts:
            mlps += num_sparse * experts.num_experts * (3 * experts.intermediate_size + 1) * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * attention + mlps + embeddings


def num_elements(spec: ModelSpec, name: str) -> int:
    """Of the matrix of a layer, by its name without ".weight"; 0 for a name that is none's."""
    kind = name.rpartition(".")[2]
    inner, heads = spec.intermediate_size, spec.num_heads * spec.head_dim
    if spec.experts is not None and ".experts." in name:
        inner = spec.experts.intermediate_size
        kinds = ("gate_proj", "up_proj", "down_proj")
        kind = dict(zip(spec.experts.projection_names, kinds, strict=True)).get(kind, kind)
    rows = {
        "q_proj": heads,
        "k_proj": spec.num_kv_heads * spec.head_dim,
        "v_proj": spec.num_kv_heads * spec.head_dim,
        "o_proj": heads,
        "qkv_proj": spec.qkv_size,
        "gate_proj": inner,
        "up_proj": inner,
        "down_proj": inner,
        "gate_up_proj": 2 * inner,
        "embed_tokens": spec.vocab_size,
        "lm_head": spec.vocab_size,
    }
    return rows.get(kind, 0) * spec.hidden_size
