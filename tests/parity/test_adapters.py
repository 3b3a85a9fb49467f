"""Adapters made by peft: the same tokens as peft and transformers."""

from __future__ import annotations

import random

import pytest
import torch

from engine.adapters.adapter_pool import PoolEntry
from helpers.adapters import LINEAR, MODULES, make_adapter, save_adapter
from helpers.tiny_models import VOCAB_SIZE, make_model, save_model
from parity.driving import make_request, make_runner, step_logits

FAMILIES = ("llama", "qwen2", "gemma2")
RANKS = (1, 8, 64, 100)
NUM_TOKENS = 48
MARGIN = 1e-4
PROMPT = torch.randint(3, VOCAB_SIZE, (20,), generator=torch.Generator().manual_seed(1)).tolist()


def random_subsets() -> list[tuple[str, ...]]:
    chooser = random.Random(5)
    return [tuple(chooser.sample(MODULES, chooser.randint(2, 8))) for _ in range(12)]


TARGETS = [*((module,) for module in MODULES), MODULES, LINEAR, *random_subsets()]
CASES = [(targets, RANKS[index % 4]) for index, targets in enumerate(TARGETS)]
CASES += [(MODULES, rank) for rank in (*RANKS, 256) if (MODULES, rank) not in CASES]
ALL_CASES = [(targets, rank) for targets in TARGETS for rank in RANKS]


class Family:
    """A small model on both sides."""

    def __init__(self, kind: str, directory) -> None:
        self.model = make_model(kind, num_hidden_layers=2)
        self.runner = make_runner(save_model(self.model, directory / "base"), max_lora_rank=256)
        self.directory = directory
        self.base_tokens = self.ours(None)

    def ours(self, adapter_directory) -> list[int]:
        """Greedy tokens."""
        request = make_request(PROMPT)
        if adapter_directory is not None:
            loaded = self.runner.adapter_reader.load(adapter_directory)
            request.adapter = PoolEntry(None, loaded.weights)
        while request.num_known < len(PROMPT) + NUM_TOKENS:
            logits = step_logits(self.runner, request, request.num_known - request.num_computed)
            request.token_ids[request.num_known] = int(logits.argmax())
            request.num_known += 1
        return request.token_ids[len(PROMPT) : request.num_known].tolist()

    def check(self, targets, rank: int, **fields) -> None:
        wrapped = make_adapter(self.model, targets, rank=rank, seed=rank, **fields)
        try:
            tokens = self.ours(save_adapter(wrapped, self.directory / "adapter"))
            with torch.no_grad():
                logits = wrapped(torch.tensor([PROMPT + tokens[:-1]]), use_cache=False).logits[0]
        finally:
            wrapped.unload()
        assert_greedy(tokens, logits[len(PROMPT) - 1 :])
        assert tokens != self.base_tokens, "the adapter changes nothing, so the test shows nothing"


def assert_greedy(tokens: list[int], logits: torch.Tensor) -> None:
    """Every token is their best; the first that is not may be behind by the margin, which ends the check."""
    for step, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        if int(row.argmax()) != token:
            behind = float(row.max() - row[token])
            assert behind < MARGIN, f"token {step} is {behind:g} behind"
            return


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def name_of(case: object) -> str:
    if not isinstance(case, tuple):
        return str(case)
    return "all" if case == MODULES else "+".join(module.split("_")[0] for module in case)


@pytest.mark.parametrize(("targets", "rank"), CASES, ids=name_of)
def test_tokens_equal_peft(family, targets, rank):
    family.check(targets, rank)


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "rank"), ALL_CASES, ids=name_of)
def test_tokens_equal_peft_for_every_rank(family, targets, rank):
    family.check(targets, rank)


def test_patterns_and_rank_stabilised_scale(family):
    family.check(
        r".*\.(self_attn\.[qv]_proj|mlp\..*_proj)",
        8,
        rank_pattern={"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 17, "model.layers.0.mlp.up_proj": 1},
        alpha_pattern={"v_proj": 40, r"layers\.0\.mlp\..*": 3.5},
        use_rslora=True,
    )


def test_only_some_layers_and_excluded_modules(family):
    family.check(LINEAR, 4, layers_to_transform=[1], exclude_modules=["k_proj"])


def test_the_margin_is_looked_at():
    """A token that is behind by more than the margin is noticed, also after one that is not."""
    logits = torch.tensor([[0.0, 1.0], [0.5, 0.6]])
    assert_greedy([1, 1], logits)
    with pytest.raises(AssertionError, match="token 1"):
        assert_greedy([1, 0], logits)
