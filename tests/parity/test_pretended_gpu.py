"""--device cuda from flags to tokens, with a GPU that is only pretended: kernels emulated and interpreted."""

from __future__ import annotations

import pytest

from engine import LLM, SamplingParams
from engine.config.model_location import bundled_model
from helpers.pretend_gpu import pretended
from helpers.tiny_models import make_model, save_model

PROMPTS = [[5, 6, 7] * 5, [9, 10, 11] * 7, [5, 6, 7] * 5 + [8]]
SIZES = {
    "context_length": 128,
    "max_running_requests": 4,
    "chunked_prefill_size": 32,
    "max_total_tokens": 1024,
    "max_lora_rank": 8,
    "dtype": "float32",
}


def answers(directory, **options) -> list[list[int]]:
    fields = (
        {"dtype": "float32", "tokenizer_path": str(bundled_model()), "max_lora_rank": 8} | SIZES | options
    )
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(str(directory), **fields) as llm:
        outputs = llm.generate(PROMPTS, [params] * len(PROMPTS), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("gemma2", {"deterministic": True})])
def test_an_engine_answers_as_on_the_cpu(kind, options, tmp_path):
    save_model(make_model(kind), tmp_path)
    expected = answers(tmp_path)
    with pretended():
        assert answers(tmp_path, device="cuda", **options) == expected
