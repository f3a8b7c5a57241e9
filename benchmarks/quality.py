"""Learning and forgetting: a small transformer knows one task, and each method teaches it another.

The model is trained from nothing to copy a string of symbols (task A), then fine-tuned to shift every symbol by one (task
B), with equal trainable counts and, for each method, the best of three learning rates. Printed per method, over seeds: the
loss on B before and after, and how much the loss on A rose (S2FT reference checklist 23).

    python benchmarks/quality.py                # about four minutes on two CPU cores
    python benchmarks/quality.py --strategies   # S2FT's ways to select instead of its rivals
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from intaglio import S2FT, Batches, Full, Random, attach
from lib import command_line, results
from lib.machine import device
from lib.tables import row, table
from lib.toy_tasks import TASKS, batch, loss_on, pretrained, train

RATES = (1e-3, 3e-3, 1e-2)


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
    parser = command_line.parser(__doc__)
    parser.add_argument("--strategies", action="store_true", help="compare S2FT's ways to select")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=600, help="steps on task A")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, help="also write files of this name")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    bases = {seed: pretrained(seed, arguments.pretraining) for seed in range(arguments.seeds)}
    before = {task: statistics.mean(loss_on(base, task) for base in bases.values()) for task in TASKS}
    lines = [
        f"before: loss on A {before['A']:.3f}, on B {before['B']:.3f} (means of {arguments.seeds} seeds)\n",
        *table("| | trainable | loss on B after | worst seed | loss on A after | lr |", [], "lrrrrl"),
    ]
    print("\n".join(lines))
    figures = {}
    for name, start in (STRATEGIES if arguments.strategies else RIVALS).items():
        figures[name] = runs = [run(start, base, arguments.steps, seed) for seed, base in bases.items()]
        lines.append(outcome(name, runs))
        print(lines[-1], flush=True)
    if arguments.output:
        head = f"# Does it learn, and does it forget?\n\n`{command_line.command()}` on {device()}.\n\n"
        results.write(arguments.output, {"before": before, "runs": figures}, head + "\n".join(lines) + "\n")


def outcome(name: str, runs: list[dict[str, float]]) -> str:
    """One line of the table."""
    b, a = ([run[task] for run in runs] for task in ("B", "A"))
    rates = ", ".join(f"{run['lr']:g}" for run in runs)
    return row(
        [name, f"{runs[0]['trainable']:,}", f"{statistics.mean(b):.4f}", f"{max(b):.4f}", f"{statistics.mean(a):.3f}", rates]
    )


if __name__ == "__main__":
    main()
