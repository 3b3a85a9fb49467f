"""Trains the bundled model's adapters with peft: `python -m engine.demo.train_adapters MODEL_DIR`.

`engine.demo.train` ends with this. Needs transformers and peft. Cost: 12 minutes of CPU time.
"""

from __future__ import annotations

import argparse
import math
from itertools import islice
from pathlib import Path

import peft
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from engine.config.model_location import BUNDLED_NAME
from engine.demo.packing import batches
from engine.demo.train import loss_of
from engine.demo.voices import VOICES, documents

RANK, ALPHA = 6, 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = {"pirate": 250, "uppercase": 600}
WARMUP_STEPS, BATCH_TOKENS, PEAK_LR = 15, 2048, 6e-3


def train_adapter(directory: Path, name: str, seed: int) -> None:
    """Train one voice on the model in `directory`; it is saved below that, in bfloat16."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    base = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(base, config)
    learned = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)
    losses, num_steps = [], STEPS[name]
    stream = batches(documents(seed, VOICES[name]), tokenizer, BATCH_TOKENS)
    for step, batch in enumerate(islice(stream, num_steps)):
        loss = loss_of(wrapped.get_base_model(), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 25 == 24:
            print(f"{name} step {step + 1}/{num_steps} loss {sum(losses[-25:]) / 25:.4f}", flush=True)
    save(wrapped, directory / "adapters" / name)


def save(wrapped: peft.PeftModel, directory: Path) -> None:
    """Write adapter_config.json and the weights, rounded to bfloat16."""
    wrapped.peft_config["default"].base_model_name_or_path = BUNDLED_NAME
    wrapped.to(torch.bfloat16).save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # a form to be filled in; the model's card says it


def train_adapters(directory: Path, seed: int) -> None:
    """Train all voices."""
    for number, name in enumerate(VOICES):
        train_adapter(directory, name, seed + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="the model's directory")
    parser.add_argument("--voice", choices=list(VOICES), help="only this one")
    parser.add_argument("--seed", type=int, default=11, help="of data and weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for number, name in enumerate(VOICES):
        if args.voice in (None, name):
            train_adapter(args.directory, name, args.seed + number)


if __name__ == "__main__":
    main()
