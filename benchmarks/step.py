"""What a training step costs: seconds, peak memory and bytes kept for backward, of every way to fine-tune.

Each contestant lives in a process of its own, so that its peak memory is its own, and the processes take turns, so that a
noisy machine is equally unkind to all: compare the ratios. Weights are random; a step costs what it would with real ones.

    python benchmarks/step.py                                             # SmolLM2-135M's shape, 4 × 128 tokens, CPU
    python benchmarks/step.py --shape llama-3.2-1b --length 512 --batch 4 --dtype bfloat16
    python benchmarks/step.py --grid figure5 --dtype bfloat16             # the eight cells of the S2FT paper's Figure 5

On a GPU, shapes that do not fit side by side are run one process after the other (--one-by-one).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
    "llama-3.2-1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-3.2-3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
                     "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-3-8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "intermediate_size": 14336, "vocab_size": 128256},
    "llama-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
                 "vocab_size": 32000},
    "llama-13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824,
                  "vocab_size": 32000},
}  # fmt: skip
GRIDS = {"figure5": [(shape, t, b) for shape in ("llama-7b", "llama-13b") for t in (512, 1024) for b in (1, 2)]}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
READERS = ["o_proj", "down_proj"]


def floor(model: nn.Module, rank: int) -> Step:
    """Forward and the gradient of the inputs alone: what no method that reaches the first layer can go below."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return Step(model, [])


def full(model: nn.Module, rank: int) -> Step:
    """Every weight."""
    return Step(model, list(model.parameters()))


def lisa(model: nn.Module, rank: int) -> Step:
    """Two whole layers, embeddings and head (LISA, between two of its draws)."""
    model.requires_grad_(False)
    layers = model.model.layers
    for module in (layers[len(layers) // 3], layers[2 * len(layers) // 3], model.get_input_embeddings(), model.lm_head):
        module.requires_grad_(True)
    return Step(model, [p for p in model.parameters() if p.requires_grad])


def lora(model: nn.Module, rank: int) -> Step:
    """PEFT's LoRA on all linear layers."""
    from peft import LoraConfig

    return _peft(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LINEAR))


def lora_same_targets(model: nn.Module, rank: int) -> Step:
    """PEFT's LoRA on o and down, as many trainable numbers."""
    from peft import LoraConfig

    widths = sum(sum(m.weight.shape) for n, m in model.named_modules() if n.endswith(tuple(READERS)))
    return _peft(model, LoraConfig(r=round(_trainable(model, rank) / widths), target_modules=READERS))


def dora(model: nn.Module, rank: int) -> Step:
    """PEFT's DoRA on all linear layers."""
    from peft import LoraConfig

    return _peft(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LINEAR, use_dora=True))


def shira(model: nn.Module, rank: int) -> Step:
    """PEFT's SHiRA on all linear layers."""
    from peft import ShiraConfig

    return _peft(model, ShiraConfig(r=rank, target_modules=ALL_LINEAR, random_seed=0))


def s2ft(model: nn.Module, rank: int, *, permute: bool = False) -> Step:
    """S2FT on o and down in index form, half of the numbers in each."""
    from intaglio import attach

    tuner = attach(model, _s2ft(model, rank), permute=permute)
    return Step(model, tuner.parameters(), tuner.watch)


def s2ft_permuted(model: nn.Module, rank: int) -> Step:
    """S2FT with co-permuted heads and channels."""
    return s2ft(model, rank, permute=True)


def s2ft_peft(model: nn.Module, rank: int) -> Step:
    """S2FT through PEFT: get_peft_model(model, S2FTConfig(…))."""
    from intaglio.hf import S2FTConfig

    method = _s2ft(model, rank)
    return _peft(model, S2FTConfig(o=method.o, down=method.down))


CONTESTANTS: dict[str, tuple[str, Callable[[nn.Module, int], Step]]] = {
    "floor": ("frozen floor", floor),
    "s2ft": ("S2FT, index form", s2ft),
    "s2ft_permuted": ("S2FT, permuted", s2ft_permuted),
    "s2ft_peft": ("S2FT, PEFT face", s2ft_peft),
    "lora": ("LoRA, all linear", lora),
    "lora_same_targets": ("LoRA, o and down", lora_same_targets),
    "dora": ("DoRA, all linear", dora),
    "shira": ("SHiRA, all linear", shira),
    "lisa": ("LISA-like, 2 layers", lisa),
    "full": ("full fine-tuning", full),
}


class Step:
    """One contestant: a model, what it trains, and the parts of a step."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        watch: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] = lambda optimizer: optimizer,
    ) -> None:
        self.model, self.trainable = model, sum(p.numel() for p in parameters)
        self.optimizer = watch(torch.optim.AdamW(parameters, lr=1e-4)) if parameters else None

    def run(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """Seconds of forward, backward and optimizer."""
        marks = [_now()]
        loss = self.model(**batch).loss
        marks.append(_now())
        loss.backward()
        marks.append(_now())
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        marks.append(_now())
        forward, backward, optimizer = (after - before for before, after in itertools.pairwise(marks))
        return {"forward": forward, "backward": backward, "optimizer": optimizer, "total": marks[-1] - marks[0]}

    def bytes_kept(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        """Bytes alive for backward beside parameters and buffers: in all, and without the head and its loss."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}
        at_head: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, inputs: at_head.append(sum(kept.values())))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**batch).loss
        handle.remove()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return {"kept": sum(kept.values()), "kept_in_layers": at_head[0]}


def _peft(model: nn.Module, config: Any) -> Step:
    from peft import get_peft_model

    wrapped = get_peft_model(model, config)
    return Step(wrapped, [p for p in wrapped.parameters() if p.requires_grad])


def _trainable(model: nn.Module, rank: int) -> int:
    """Trainable numbers of LoRA on all linear layers: what the others match."""
    return rank * sum(sum(m.weight.shape) for n, m in model.named_modules() if n.endswith(tuple(ALL_LINEAR)))


def _s2ft(model: nn.Module, rank: int) -> Any:
    from intaglio import S2FT

    config = model.config
    head = config.hidden_size * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    wanted = _trainable(model, rank)
    heads = max(1, round(wanted / 2 / head))
    return S2FT(o=heads, down=max(1, round((wanted - heads * head) / config.hidden_size)))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def child(task: dict[str, Any]) -> None:
    """Build one contestant, then take a turn for every line on standard input."""
    import transformers

    from intaglio.hf.meter import peak_memory

    answers, sys.stdout = sys.stdout, sys.stderr  # the libraries may print
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = SHAPES[task["shape"]]
    config = transformers.LlamaConfig(**shape, max_position_embeddings=max(2048, task["length"]), use_cache=False)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, task["dtype"]))
    model.train()
    step = CONTESTANTS[task["contestant"]][1](model, task["rank"])
    ids = torch.randint(0, shape["vocab_size"], (task["batch"], task["length"]), device=device)
    batch = {"input_ids": ids, "labels": ids}
    kept = step.bytes_kept(batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step.run(batch)
    print(json.dumps({"trainable": step.trainable, **kept}), file=answers, flush=True)
    for _ in sys.stdin:
        step.run(batch)  # warm the caches that the others have taken
        times = [step.run(batch) for _ in range(task["steps"])]
        memory, kind = peak_memory()
        print(json.dumps({"times": times, "peak_memory": memory, "memory_kind": kind}), file=answers, flush=True)


class Contestant:
    """The parent's end of a child."""

    def __init__(self, name: str, task: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--child", json.dumps(task | {"contestant": name})]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.result: dict[str, Any] = {"label": CONTESTANTS[name][0], "times": []} | self._answer()

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.result["times"] += answer.pop("times")
        self.result |= answer

    def close(self) -> dict[str, Any]:
        self.process.communicate()
        return self.result

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contestant died, see above: {self.process.args}")
        return json.loads(line)


def measure(task: dict[str, Any], names: list[str], rounds: int, *, one_by_one: bool) -> dict[str, Any]:
    """Rounds of turns; who does not fit in memory (exit with an error) stops the benchmark."""
    groups = [[name] for name in names] if one_by_one else [names]
    results = {}
    for group in groups:
        running = {name: Contestant(name, task) for name in group}
        for turn in range(rounds):
            print(f"round {turn + 1} of {rounds}: {', '.join(group)}", file=sys.stderr)
            for contestant in running.values():
                contestant.turn()
        results |= {name: contestant.close() for name, contestant in running.items()}
    return {"task": task, "results": {name: _summary(result) for name, result in results.items()}}


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    times = result.pop("times")
    medians = {part: statistics.median(t[part] for t in times) for part in times[0]}
    return result | {"seconds": medians, "fastest": min(t["total"] for t in times), "steps": len(times)}


def table(measured: dict[str, Any]) -> str:
    """Markdown: medians, and ratios to the frozen floor and to LoRA."""
    results, task = measured["results"], measured["task"]
    lines = [
        f"### {task['shape']}, {task['batch']} × {task['length']} tokens, {task['dtype']}\n",
        "| | trainable | forward s | backward s | optimizer s | step s | ÷ floor | ÷ LoRA | peak memory GB | ÷ LoRA | "
        "kept for backward MB | ÷ LoRA | of it in the layers MB | ÷ LoRA |",
        "|---" + "|---:" * 13 + "|",
    ]
    rival = results.get("lora")
    for result in results.values():
        seconds = result["seconds"]

        def over(get: Callable[[dict[str, Any]], float], base: dict[str, Any] | None, result: dict[str, Any] = result) -> str:
            return f"{get(result) / get(base):.2f}" if base else ""

        cells = [
            result["label"],
            f"{result['trainable']:,}",
            *(f"{seconds[part]:.3f}" for part in ("forward", "backward", "optimizer", "total")),
            over(lambda r: r["seconds"]["total"], results.get("floor")),
            over(lambda r: r["seconds"]["total"], rival),
            f"{result['peak_memory'] / 1e9:.2f}",
            over(lambda r: r["peak_memory"], rival),
            f"{result['kept'] / 1e6:.0f}",
            over(lambda r: r["kept"], rival),
            f"{result['kept_in_layers'] / 1e6:.0f}",
            over(lambda r: r["kept_in_layers"], rival),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(measured: dict[str, Any], path: Path) -> None:
    """Stacked bars of the step's parts, and bytes kept for backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results, task = list(measured["results"].values())[::-1], measured["task"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.42 * len(results) + 1.6), sharey=True, layout="constrained")
    labels = [result["label"] for result in results]
    start = [0.0] * len(results)
    for part, colour in (("forward", "#4477aa"), ("backward", "#66ccee"), ("optimizer", "#ccbb44")):
        widths = [result["seconds"][part] for result in results]
        left.barh(labels, widths, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for label, total in zip(labels, start, strict=True):
        left.text(total, label, f" {total:.2f}", va="center", fontsize=8)
    left.set_xlim(0, max(start) * 1.1)
    left.set_xlabel("seconds per step (median)")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    kept = [result["kept"] / 1e6 for result in results]
    right.barh(labels, kept, color="#ee6677")
    for label, size in zip(labels, kept, strict=True):
        right.text(size, label, f" {size:.0f}", va="center", fontsize=8)
    right.set_xlim(0, max(kept) * 1.12)
    right.set_xlabel("MB kept for the backward pass")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{task['shape']}, {task['batch']} × {task['length']} tokens, {task['dtype']}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--grid", choices=GRIDS, help="several cells instead of --shape, --length and --batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank; the others match its trainable count")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--one-by-one", action="store_true", help="one process at a time, where memory is short")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step"), help="name without suffix")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    cells = GRIDS[arguments.grid] if arguments.grid else [(arguments.shape, arguments.length, arguments.batch)]
    common = {"dtype": arguments.dtype, "rank": arguments.rank, "steps": arguments.steps}
    measured = []
    for shape, length, batch in cells:
        task = common | {"shape": shape, "length": length, "batch": batch}
        names = arguments.only or list(CONTESTANTS)
        measured.append(measure(task, names, arguments.rounds, one_by_one=arguments.one_by_one))
        print(table(measured[-1]))
    _write(measured, arguments.output)


def _write(measured: list[dict[str, Any]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    head = f"# Cost of a step\n\n`python {' '.join(sys.argv)}` on {device}, torch {torch.__version__}; medians.\n\n"
    output.with_suffix(".json").write_text(json.dumps({"device": device, "cells": measured}, indent=1) + "\n")
    output.with_suffix(".md").write_text(head + "\n".join(table(cell) for cell in measured))
    for cell in measured:
        task = cell["task"]
        suffix = "" if len(measured) == 1 else f"-{task['shape']}-{task['batch']}x{task['length']}"
        draw(cell, output.with_name(f"{output.name}{suffix}.png"))


if __name__ == "__main__":
    main()
