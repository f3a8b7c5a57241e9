"""Two toy tasks, to copy a string of symbols (A) and to shift every symbol by one (B), and a small model that knows A."""

from __future__ import annotations

import torch
import transformers
from torch import nn

SYMBOLS, LENGTH, SEPARATOR = 20, 8, 20
TASKS = {"A": (21, 0), "B": (22, 1)}  # its token, and the shift it asks for


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


def pretrained(seed: int, steps: int) -> transformers.LlamaForCausalLM:
    """A small Llama that can do task A, after some 600 steps."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config)
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), "A", steps, seed)
    return model
