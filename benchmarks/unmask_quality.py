"""Quality of step-by-step unmasking: questions that the paper leaves open, on a small transformer.

The model and the tasks are those of quality.py: it is trained from nothing to copy (task A) and then taught to shift by one
(task B), by each variant with the same budget B and number of steps T. Four questions, each a block of the table:

    score      |g| alone (exponent 0) against D3 (exponent 1, eps 1), and with an eps at which |w| counts
    growth     all of B by the first gradient (static) against step by step (increment)
    bias       Adam's bias correction by the update's number (global) against by the entry's own age (per_entry)
    until      all unmasked after a quarter, half or the whole of the run, under a learning rate that falls linearly to 0

Printed per variant, as mean ± standard deviation over seeds: held-out loss on B, and loss on A, which is what it forgot. The
learning rate is for each variant the best of four by the mean over seeds, and is given; where it is the smallest or the
largest of them, a better one may lie outside. A variant that belongs to several questions is run once.

    python benchmarks/unmask_quality.py                          # about ten minutes on two CPU cores
    python benchmarks/unmask_quality.py --questions until --seeds 5
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from torch import nn

from intaglio import ID3, Updates, attach
from lib import command_line, results, tables
from lib.machine import device
from lib.toy_tasks import batch, loss_on, pretrained

PLAIN: dict[str, Any] = {"exponent": 1.0, "eps": 1.0}  # what a variant does not change
UPDATES: dict[str, Any] = {"bias_correction": "global"}
CONSTANT, DECAY = "constant", "linear"
ROWS = 32

Variant = tuple[dict[str, Any], dict[str, Any], str]  # fields of ID3, fields of Updates, the learning rate's schedule
QUESTIONS: dict[str, dict[str, Variant]] = {
    "score": {
        "gradient alone": ({"exponent": 0.0}, {}, CONSTANT),
        "D3 (1, 1)": ({}, {}, CONSTANT),
        "D3 (1, 0.01)": ({"eps": 0.01}, {}, CONSTANT),
    },
    "growth": {
        "increment, gradient alone": ({"exponent": 0.0}, {}, CONSTANT),
        "static, gradient alone": ({"exponent": 0.0, "mode": "static"}, {}, CONSTANT),
        "increment, D3 (1, 1)": ({}, {}, CONSTANT),
        "static, D3 (1, 1)": ({"mode": "static"}, {}, CONSTANT),
        "increment, linear decay": ({}, {}, DECAY),
        "static, linear decay": ({"mode": "static"}, {}, DECAY),
    },
    "bias": {
        "global": ({}, {}, CONSTANT),
        "per entry": ({}, {"bias_correction": "per_entry"}, CONSTANT),
        "global, linear decay": ({}, {}, DECAY),
        "per entry, linear decay": ({}, {"bias_correction": "per_entry"}, DECAY),
    },
    "until": {
        "until 0.25, linear decay": ({"until": 0.25}, {}, DECAY),
        "until 0.5, linear decay": ({"until": 0.5}, {}, DECAY),
        "until 1, linear decay": ({}, {}, DECAY),
    },
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int, decay: str) -> None:
    """Plain steps on fresh examples of task B; the rate stays, or falls linearly to 0 just after the last step."""
    share = (lambda step: 1 - step / steps) if decay == DECAY else (lambda step: 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(**batch("B", ROWS, generator)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def run(variant: Variant, base: nn.Module, lr: float, seed: int, options: Any) -> dict[str, float]:
    """Fine-tune a copy of the base; held-out losses."""
    fields, updates, decay = variant
    model = copy.deepcopy(base)
    method = ID3(**({"budget": options.budget, "steps": options.steps} | PLAIN | fields))
    tuner = attach(model, method, updates=Updates(**(UPDATES | updates)))
    train(model, tuner.optimizer(torch.optim.AdamW, lr=lr, weight_decay=0.0), options.steps, seed + 1000, decay)
    if tuner.selection.size != options.budget:
        raise SystemExit(f"{method}: {tuner.selection.size} entries were unmasked, not {options.budget}")
    return {"B": loss_on(model, "B"), "A": loss_on(model, "A")}


def best(variant: Variant, bases: dict[int, nn.Module], options: Any) -> dict[str, Any]:
    """The runs of all seeds at the learning rate of lowest mean loss on B, and the mean at the others."""
    runs = {lr: [run(variant, base, lr, seed, options) for seed, base in bases.items()] for lr in options.rates}
    means = {lr: statistics.mean(r["B"] for r in of_lr) for lr, of_lr in runs.items()}
    lr = min(means, key=lambda rate: means[rate])
    return {"lr": lr, "runs": runs[lr], "mean_by_lr": means}


def row(question: str, name: str, outcome: dict[str, Any]) -> str:
    """One line of the table."""
    spread = {task: [r[task] for r in outcome["runs"]] for task in ("B", "A")}
    cells = [f"{statistics.mean(v):.4f} ± {statistics.stdev(v) if len(v) > 1 else 0.0:.4f}" for v in spread.values()]
    return tables.row([question, name, *cells, f"{outcome['lr']:g}"])


def main() -> None:
    """Run and print a table."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=600, help="steps on task A")
    parser.add_argument("--steps", type=int, default=150, help="T")
    parser.add_argument("--budget", type=int, default=3300, help="B, about 1 %% of the model's weights")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2], help="learning rates to try")
    parser.add_argument("--threads", type=int, default=2)
    command_line.add_write(parser, "unmask_quality")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bases: dict[int, nn.Module] = {seed: pretrained(seed, arguments.pretraining) for seed in range(arguments.seeds)}
    before = {task: statistics.mean(loss_on(base, task) for base in bases.values()) for task in ("A", "B")}
    weights = sum(p.numel() for p in bases[0].parameters())
    lines = [
        f"{arguments.budget:,} of {weights:,} weights, {arguments.steps} steps, {arguments.seeds} seeds, learning rates "
        f"{', '.join(f'{r:g}' for r in arguments.rates)}. Before: loss on A {before['A']:.3f}, on B {before['B']:.3f}.\n",
        *tables.table("| question | variant | loss on B | loss on A | lr |", [], "ll"),
    ]
    print("\n".join(lines), flush=True)
    figures: dict[str, Any] = {}
    done: dict[str, Any] = {}
    for question in arguments.questions:
        for name, variant in QUESTIONS[question].items():
            outcome = done.get(repr(variant)) or best(variant, bases, arguments)
            figures[f"{question}: {name}"] = done[repr(variant)] = outcome
            lines.append(row(question, name, outcome))
            print(lines[-1], flush=True)
    if arguments.write:
        head = f"# Quality of step-by-step unmasking, toy scale\n\n`{command_line.command()}` on {device()}.\n\n"
        results.write(arguments.write, {"before": before, "figures": figures}, head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
