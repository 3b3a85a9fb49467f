"""Scores a model directory on what training never showed: `python -m engine.demo.evaluate DIR`.

Prints a Markdown table. Needs transformers; the weights are used as they are stored, in bfloat16
rounding, and multiplied in fp32.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from engine.demo.cases import HELPFUL, Case, all_cases, france, voice_cases
from engine.demo.tokenizer import END_OF_TEXT, IM_END
from engine.demo.voices import VOICES

BATCH = 64
MAX_NEW_TOKENS = 300
SEEDS = 20


class Answer(NamedTuple):
    """What the model wrote, and whether it ended by itself."""

    text: str
    ended: bool


class Answerer:
    """A model and its tokenizer, answering prompts in batches."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.pad_id = self.tokenizer.token_to_id(END_OF_TEXT)
        self.end_ids = {self.pad_id, self.tokenizer.token_to_id(IM_END)}

    def with_adapter(self, directory: Path) -> Answerer:
        """The same model with an adapter of peft's."""
        import peft

        adapted = copy.copy(self)
        adapted.model = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), directory).eval()
        return adapted

    def answer(self, prompts: list[str], temperature: float = 0.0) -> list[Answer]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            answers |= zip(chosen, self._batch([prompts[i] for i in chosen], temperature), strict=True)
        return [answers[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _batch(self, prompts: list[str], temperature: float) -> list[Answer]:
        encoded = [e.ids for e in self.tokenizer.encode_batch(prompts)]
        width = max(map(len, encoded))
        token_ids = torch.tensor([[self.pad_id] * (width - len(ids)) + ids for ids in encoded])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        output = self.model.generate(
            input_ids=token_ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            use_cache=True,
            **sampling,
        )
        return [self._read(row) for row in output[:, width:].tolist()]

    def _read(self, token_ids: list[int]) -> Answer:
        end = next((i for i, t in enumerate(token_ids) if t in self.end_ids), None)
        return Answer(self.tokenizer.decode(token_ids[:end]), end is not None)


def is_right(case: Case, answer: Answer) -> bool:
    return (answer.ended or case.may_run_on) and case.accepts(answer.text)


def score(answerer: Answerer, cases: list[Case], failures: int = 0) -> int:
    """How many answers at temperature 0 are right. Prints up to `failures` that are not."""
    answers = answerer.answer([c.prompt for c in cases])
    wrong = [(c, a) for c, a in zip(cases, answers, strict=True) if not is_right(c, a)]
    for case, answer in wrong[:failures]:
        print(f"  {case.prompt[-160:]!r} -> {answer.text!r}")
    return len(cases) - len(wrong)


def sampled_france(answerer: Answerer) -> list[tuple[str, int]]:
    """The README's question at temperature 1, once for each of twenty seeds."""
    rows = []
    for name, before in (("no system prompt", []), ("a system prompt", [HELPFUL])):
        case, right = france(before), 0
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            right += is_right(case, answerer.answer([case.prompt], temperature=1.0)[0])
        rows.append((f"capital of France at temperature 1, {name}", right))
    return rows


def score_model(answerer: Answerer, failures: int) -> None:
    """The rows of the model without adapters."""
    for name, cases in all_cases().items():
        right = score(answerer, cases, failures)
        print(f"| {name} | {right} | {len(cases)} | {right / len(cases):.0%} |", flush=True)
    for name, right in sampled_france(answerer):
        print(f"| {name} | {right} | {SEEDS} | {right / SEEDS:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--failures", type=int, default=0, help="wrong answers to print for each skill")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--only-adapters", action="store_true", help="leave the model itself out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    answerer = Answerer(args.directory)
    print("| skill | right | of | share |\n|---|---|---|---|")
    if not args.only_adapters:
        score_model(answerer, args.failures)
    for voice in VOICES:
        adapted = answerer.with_adapter(args.directory / "adapters" / voice)
        for name, cases in voice_cases(voice).items():
            right = score(adapted, cases, args.failures)
            print(f"| {name} | {right} | {len(cases)} | {right / len(cases):.0%} |", flush=True)


if __name__ == "__main__":
    main()
