"""The recipe of the bundled model from end to end, with a few steps of a tiny shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.demo import train, train_adapters
from engine.demo.tokenizer import IM_END
from engine.demo.voices import VOICES

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory that the command writes."""
    out = tmp_path_factory.mktemp("recipe") / "model"
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TOKENIZER_DOCUMENTS", 200)
        patch.setattr(train, "BATCH_TOKENS", 2048)
        patch.setattr(train, "SHAPE", {**train.SHAPE, **SHAPE, "num_key_value_heads": 1})
        phase = train.Phase(steps=2, warmup_steps=1, peak=1.0, drill_share=0.5)
        patch.setattr(train, "PHASES", (phase,) * len(train.PHASES))
        patch.setattr(train, "SAVE_EVERY", 1)
        patch.setattr(train_adapters, "STEPS", dict.fromkeys(VOICES, 1))
        patch.setattr(torch._dynamo.config, "disable", True)  # compiling takes longer than these steps
        patch.setattr("sys.argv", ["train", "--out", str(out), "--threads", "1"])
        train.main()
    yield out
    torch.set_num_threads(num_threads)


def test_it_writes_a_checkpoint_that_is_whole(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "adapters"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert {path.name for path in (made / "adapters").iterdir()} == set(VOICES)
    config = json.loads((made / "config.json").read_text())
    assert config["hidden_size"] == 64 and config["torch_dtype"] == "bfloat16"


@torch.no_grad()
def test_it_is_served_as_transformers_runs_it(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)
    with LLM(str(made), dtype="float32", num_threads=1) as llm:
        (answer,) = llm.chat([CHAT], params, use_tqdm=False)
        assert answer.prompt_token_ids == ids
        _, first = answer.outputs[0].logprobs[0]
        assert first.top_ids == expected.indices.tolist()
        assert first.top_logprobs == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert tokenizer.convert_tokens_to_ids(IM_END) in llm.tokenizer.eos_token_ids
        for voice in VOICES:
            path = str(made / "adapters" / voice)
            (spoken,) = llm.chat([CHAT], params, lora_path=path, use_tqdm=False)
            assert spoken.outputs[0].logprobs != answer.outputs[0].logprobs, "it has learned something"
