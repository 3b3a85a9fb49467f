"""Repeats the recipe of the bundled model: `python -m engine.demo.train --out DIR`.

Trains the tokenizer, then the model, on the generated corpus, then the adapters, and writes a model
directory in Hugging Face format. The same recipe and scores every time, not the same bytes.
Needs transformers and peft.
Cost: 67 minutes of CPU time for the model, 12 for the adapters.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from engine.demo.corpus import documents
from engine.demo.optimizer import Muon
from engine.demo.packing import Batch, batches
from engine.demo.tokenizer import (
    END_OF_TEXT,
    IM_END,
    MAX_LEN,
    VOCAB_SIZE,
    render,
    save_tokenizer,
    train_tokenizer,
)

TOKENIZER_DOCUMENTS = 20_000
BATCH_TOKENS = 4096
MUON_LR, ADAM_LR = 0.015, 2.5e-3
SAVE_EVERY = 500


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training. `peak` scales the learning rates, `drill_share` is that of the corpus."""

    steps: int
    warmup_steps: int
    peak: float
    drill_share: float

    def rate(self, step: int) -> float:
        """What the learning rates are scaled by: linear warm-up, then a cosine down to zero."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.peak * warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))


PHASES = (
    Phase(steps=2650, warmup_steps=100, peak=1.0, drill_share=0.1),
    Phase(steps=600, warmup_steps=20, peak=0.4, drill_share=0.45),
)

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
}


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, rope_theta=10000.0, use_cache=False, bos_token_id=None))


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write config.json, generation_config.json and the weights, rounded to bfloat16."""
    ends = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    ids = {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": ends[1]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        **SHAPE,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        **ids,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    weights = {
        n: w.detach().bfloat16().contiguous() for n, w in model.state_dict().items() if n != "lm_head.weight"
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy in nats of the tokens that the assistant says."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            attention_mask=batch.mask(),
            use_cache=False,
        ).last_hidden_state
        rows, columns = batch.is_target.nonzero(as_tuple=True)
        logits = model.lm_head(hidden[rows, columns - 1])
    return torch.nn.functional.cross_entropy(logits.float(), batch.token_ids[rows, columns])


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, phase: Phase, seed: int) -> None:
    """Run one phase; `out` holds the model after it. Effects: prints the loss and the CPU time spent."""
    opts = optimizers(model)
    peaks = [opt.param_groups[0]["lr"] for opt in opts]
    losses: list[float] = []
    stream = batches(documents(seed, phase.drill_share), tokenizer, BATCH_TOKENS)
    for step, batch in enumerate(islice(stream, phase.steps)):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, peak in zip(opts, peaks, strict=True):
            for group in opt.param_groups:
                group["lr"] = peak * phase.rate(step)
            opt.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 25 == 24:
            recent, cpu_s = sum(losses[-25:]) / 25, time.process_time()
            print(f"step {step + 1}/{phase.steps} loss {recent:.4f} cpu_s {cpu_s:.0f}", flush=True)
        if step % SAVE_EVERY == SAVE_EVERY - 1:
            save_model(model, tokenizer, out)
    save_model(model, tokenizer, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the corpus and the first weights (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(render(d) for d in islice(documents(args.seed + 1), TOKENIZER_DOCUMENTS))
    save_tokenizer(tokenizer, args.out)
    model = new_model(args.seed)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    model.model.compile(dynamic=False)  # one graph a row length; a third faster than without
    for number, phase in enumerate(PHASES):
        train(model, tokenizer, args.out, phase, args.seed + number)
    from engine.demo.train_adapters import train_adapters  # late: it needs peft, and this module

    train_adapters(args.out, args.seed + 10)


if __name__ == "__main__":
    main()
