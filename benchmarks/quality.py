"""Does it learn, and does it forget? A small transformer knows one task; each method teaches it another.

The model is trained from nothing to copy a string of symbols (task A), then fine-tuned to shift every symbol by one (task
B), with equal trainable counts and, for each method, the best of three learning rates. Printed per method, over seeds: the
loss on B before and after, and how much the loss on A rose (S2FT reference checklist 23).

    python benchmarks/quality.py                # about four minutes on two CPU cores
    python benchmarks/quality.py --strategies   # S2FT's ways to select instead of its rivals
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from intaglio import S2FT, Batches, Full, Random, attach

SYMBOLS, LENGTH, SEPARATOR = 20, 8, 20
TASKS = {"A": (21, 0), "B": (22, 1)}  # its token, and the shift it asks for
RATES = (1e-3, 3e-3, 1e-2)


def batch(task: str, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """[task] symbols [separator] shifted symbols; the loss is on the last part."""
    token, shift = TASKS[task]
    symbols = torch.randint(0, SYMBOLS, (rows, LENGTH), generator=generator)
    answer = (symbols + shift) % SYMBOLS
    start, middle = torch.full((rows, 1), token), torch.full((rows, 1), SEPARATOR)
    ids = torch.cat([start, symbols, middle, answer], dim=1)
    return {"input_ids": ids, "labels": torch.cat([torch.full((rows, LENGTH + 2), -100), answer], dim=1)}


@torch.no_grad()
def loss_on(model: nn.Module, task: str) -> float:
    """Loss on held-out examples of a task."""
    return model(**batch(task, 256, torch.Generator().manual_seed(10**6))).loss.item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: str, steps: int, seed: int) -> None:
    """Plain steps on fresh examples of a task."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(**batch(task, 64, generator)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def pretrained(seed: int) -> transformers.LlamaForCausalLM:
    """A small Llama that can do task A."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config)
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), "A", 600, seed)
    return model


def sparse(method: Any, probe: bool = False) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """Start one of our methods."""

    def start(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        data = Batches([batch("B", 64, torch.Generator().manual_seed(i)) for i in range(4)]) if probe else None
        return attach(model, method, probe=data).optimizer(torch.optim.AdamW, lr=lr, weight_decay=0.0)

    return start


def lora(r: int, targets: list[str]) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """Start PEFT's LoRA."""

    def start(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        wrapped = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets))
        return torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    return start


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
# About 10,400 trainable numbers each: 3 heads of 16 × 96 and 60 channels of 96, spread over three layers.
RIVALS = {
    "S2FT o + down": sparse(S2FT(o=3, down=60)),
    "S2FT q + k": sparse(S2FT(q=3, k=4, o=None, down=None)),
    "LoRA all linear": lora(2, LINEAR),
    "LoRA o + down": lora(6, ["o_proj", "down_proj"]),
    "random entries": sparse(Random(budget=10_368, include=("*_proj.weight",))),
    "full fine-tuning": sparse(Full()),
}
STRATEGIES = {
    f"{select}, {'largest' if largest else 'smallest'}": sparse(
        S2FT(o=3, down=60, select=select, largest=largest), probe=select in ("activation", "product", "gradient")
    )
    for select in ("weight", "activation", "product", "gradient")
    for largest in (False, True)
}
STRATEGIES = {"random": sparse(S2FT(o=3, down=60))} | STRATEGIES


def run(start: Callable[[nn.Module, float], torch.optim.Optimizer], base: nn.Module, steps: int, seed: int) -> dict[str, float]:
    """The learning rate of lowest final loss on B."""
    outcomes = []
    for lr in RATES:
        model = copy.deepcopy(base)
        optimizer = start(model, lr)
        count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        train(model, optimizer, "B", steps, seed + 1000)
        outcomes.append({"lr": lr, "trainable": count, "B": loss_on(model, "B"), "A": loss_on(model, "A")})
    return min(outcomes, key=lambda outcome: outcome["B"])


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", action="store_true", help="compare S2FT's ways to select")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    bases = {seed: pretrained(seed) for seed in range(arguments.seeds)}
    before = {task: statistics.mean(loss_on(base, task) for base in bases.values()) for task in TASKS}
    print(f"before: loss on A {before['A']:.3f}, on B {before['B']:.3f} (means of {arguments.seeds} seeds)\n")
    print("| | trainable | loss on B after | worst seed | loss on A after | lr |\n|---|---:|---:|---:|---:|---|")
    figures = {}
    for name, start in (STRATEGIES if arguments.strategies else RIVALS).items():
        runs = [run(start, base, arguments.steps, seed) for seed, base in bases.items()]
        figures[name] = runs
        after = {task: [r[task] for r in runs] for task in TASKS}
        rates = ", ".join(f"{r['lr']:g}" for r in runs)
        means = {task: statistics.mean(values) for task, values in after.items()}
        print(
            f"| {name} | {runs[0]['trainable']:,} | {means['B']:.4f} | {max(after['B']):.4f} | {means['A']:.3f} | {rates} |",
            flush=True,
        )
    if arguments.output:
        arguments.output.write_text(json.dumps({"before": before, "runs": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
