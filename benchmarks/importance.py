"""Learned importance on planted problems, where the right layers are known: are they chosen, and does it pay?

stack   No model: 32 layers whose damping costs (exponential, mean 0.005 to 0.02) add up to a loss of 0.3, 1 or 3. The methods'
        own pure functions are driven. Shown are the chance that one of the truly 8 most important layers trains in a step
        (0.25 by chance) and the rank correlation of importance and cost, after so many importance updates (one for every
        10 training updates): medians and quartiles over costs and draws. Targets, from IST's checklist: by default and at
        loss 3, 0.40 and 0.9 after 300.
model   A small random Llama of 8 layers with LoRA in all of them learns from a teacher: itself with LoRA weights added in 2
        layers. Trained through `attach` as a user would, by default 2 layers at a time and a probe every 10 updates. Shown
        are the chance that a planted layer trains, and held-out loss above the least possible, beside training all layers
        and training just the planted ones; differences from RST are paired by seed, with 95 % t-intervals.

    python benchmarks/importance.py --write                  # ten minutes on two idle CPU cores
    python benchmarks/importance.py --parts stack --draws 12

With --write, a part that is not run keeps what an earlier run has written.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from intaglio import IST, RST
from lib import command_line, importance_report, planted_model, planted_stack, results
from lib.machine import device

AUTHORS = IST(law="multinomial", reward="faithful", floor=0.0)
UNIFORM = IST(law="uniform", reward="faithful", floor=0.0)
STACK = {"IST, default": IST(), "IST, authors' rule": AUTHORS, "IST, authors' reward, uniform law": UNIFORM, "RST": RST()}
MODEL = {
    "all layers": "all",
    "planted layers only": "planted",
    "IST, default": IST(),
    "IST, authors' rule": AUTHORS,
    "RST": RST(),
}
LOSSES, MEANS = (0.3, 1.0, 3.0), (0.005, 0.01, 0.02)
UPDATES = (10, 30, 100, 300, 1000, 3000)
LOOKS = (30, 100, 200, 300)


def stack_part(draws: int, until: int) -> dict[str, Any]:
    """Runs of every method: loss → method → `draws` runs for each mean cost."""
    found: dict[str, Any] = {}
    updates = [update for update in UPDATES if update <= until]
    for loss in LOSSES:
        found[f"{loss:g}"] = of_loss = {}
        for name, method in STACK.items():
            of_loss[name] = [
                planted_stack.learn(method, planted_stack.costs(seed, mean), loss, updates, seed)
                for mean in MEANS
                for seed in range(draws)
            ]
            print(f"loss {loss:g}, {name}", flush=True)
    return {"updates": updates, "losses": found}


def model_part(seeds: int, lr: float, until: int) -> dict[str, Any]:
    """Runs of every method, one per seed; those of a seed share the problem, the data and LoRA's start."""
    found: dict[str, Any] = {name: [] for name in MODEL}
    levels, looks = [], [update for update in LOOKS if update <= until]
    for seed in range(seeds):
        problem = planted_model.Problem(seed)
        levels.append([problem.level, problem.entropy])
        for name, method in MODEL.items():
            found[name].append(planted_model.train(problem, method, looks, lr, seed))
            print(f"seed {seed}, {name}: {[round(x, 3) for x in found[name][-1]['excess']]}", flush=True)
    return {"updates": looks, "lr": lr, "levels": levels, "runs": found}


def main() -> None:
    """Run and print; write files."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=["stack", "model"], default=["stack", "model"])
    parser.add_argument("--draws", type=int, default=4, help="draws of the stack's costs, for each of their means")
    parser.add_argument("--seeds", type=int, default=6, help="of the model")
    parser.add_argument("--lr", type=float, default=1e-2, help="of the model's AdamW")
    parser.add_argument("--until", type=int, default=UPDATES[-1], help="updates after which no more is looked at")
    parser.add_argument("--threads", type=int, default=1)
    command_line.add_write(parser, "importance")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    how = {"command": command_line.command(), "device": device()}
    measured: dict[str, Any] = {}
    for name in arguments.parts:
        part = (
            stack_part(arguments.draws, arguments.until)
            if name == "stack"
            else model_part(arguments.seeds, arguments.lr, arguments.until)
        )
        measured[name] = how | part
    print(importance_report.text(measured))
    if arguments.write:
        rounded = json.loads(json.dumps(measured), parse_float=lambda number: round(float(number), 5))
        merged = results.read(arguments.write) | rounded
        text = importance_report.text(merged)
        results.write(arguments.write, merged, text, lambda path: importance_report.draw(merged, path), indent=None)


if __name__ == "__main__":
    main()
