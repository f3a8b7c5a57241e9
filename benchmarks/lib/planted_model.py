"""A real model whose important layers are known: the teacher is the base with LoRA weights added in a few planted layers.

A small random Llama with LoRA in every layer learns the teacher's next-token distributions. All else being equal, training
the planted layers is what helps; layers are trained in turn through `intaglio.attach`, as a user would.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from intaglio import Batches, attach
from intaglio.method_kinds.layer_method import LayerMethod
from lib.planted_stack import inclusion

LAYERS, PLANTED = 8, 2  # a quarter, as many as train at a time by default
VOCABULARY, LENGTH, ROWS, RANK = 64, 16, 16, 4
TARGETS = ("o_proj", "down_proj")  # where LoRA is, and the teacher's change
STRENGTH = 1.0  # norm of what is planted, relative to the weight's


class Problem:
    """Base, teacher and held-out data of one seed.

    Attributes:
        base: the model all start from.
        planted: numbers of the planted layers, drawn at random.
        entropy: of the teacher's distributions, which no loss can go below.
        level: loss of the base.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.base = _base()
        self.planted = set(torch.randperm(LAYERS)[:PLANTED].tolist())
        self._teacher = _planted(self.base, self.planted)
        self._seed, self._held_out = seed, self.batch(torch.Generator().manual_seed(10_000 + seed), 16 * ROWS)
        self._fresh, self._batches = torch.Generator().manual_seed(30_000 + seed), list[dict[str, Tensor]]()
        target = self._held_out["target"]
        self.entropy = float(-(target * target.log()).sum(-1).mean())
        self.level = self.loss_of(self.base)

    def batch(self, generator: torch.Generator, rows: int = ROWS) -> dict[str, Tensor]:
        """Random tokens, and the teacher's next-token probabilities at each of them."""
        ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
        with torch.no_grad():
            return {"input_ids": ids, "target": self._teacher(input_ids=ids).logits.softmax(-1)}

    def training_batch(self, update: int) -> dict[str, Tensor]:
        """What update number `update` trains on, from 0; the same for every method."""
        while len(self._batches) <= update:
            self._batches.append(self.batch(self._fresh))
        return self._batches[update]

    def loss_of(self, model: nn.Module) -> float:
        """Held-out cross-entropy."""
        with torch.no_grad():
            return float(loss(model.eval(), self._held_out))

    def probe(self) -> Batches:
        """Batches like those that are trained on, for importance."""
        generator = torch.Generator().manual_seed(20_000 + self._seed)
        return Batches([self.batch(generator) for _ in range(64)], loss)


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy to the teacher's distributions, nats a token."""
    return -(batch["target"] * model(input_ids=batch["input_ids"]).logits.log_softmax(-1)).sum(-1).mean()


def train(problem: Problem, method: LayerMethod | str, looks: Sequence[int], lr: float, seed: int) -> dict[str, Any]:
    """Train a copy of the base.

    Args:
        problem: what is learned.
        method: how layers train in turn; "all": every layer at every update; "planted": always the planted ones, which no
            method could know.
        looks: updates after which to look, ascending.
        lr: of AdamW.
        seed: of LoRA's start, the same for every method.

    Returns:
        Lists with one item per look: `excess`, held-out loss above the teacher's entropy; `inclusion`, the chance that a
        planted layer trains; and `seconds_of_probes`.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(problem.base), config)
    tuner = None
    if isinstance(method, LayerMethod):
        tuner = attach(model, method, probe=problem.probe() if method.learns else None)
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    else:
        names = {f".layers.{i}." for i in (range(LAYERS) if method == "all" else problem.planted)}
        chosen = [p for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in names)]
        optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
    found: dict[str, list[Any]] = {"excess": [], "inclusion": []}
    for update in range(1, max(looks) + 1):
        loss(model.train(), problem.training_batch(update - 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update in looks:
            found["excess"].append(problem.loss_of(model) - problem.entropy)
            found["inclusion"].append(_inclusion(method, tuner, problem, seed))
    return found | {"seconds_of_probes": 0.0 if tuner is None else tuner.rotation.seconds}


def _inclusion(method: LayerMethod | str, tuner: Any, problem: Problem, seed: int) -> float:
    if isinstance(method, str):
        return 1.0
    return inclusion(method, tuner.rotation.importance, problem.planted, 400, seed)


def _base() -> LlamaForCausalLM:
    """A random Llama in which every layer matters: wider weights than a start for pre-training has."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=LENGTH, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def _planted(base: LlamaForCausalLM, layers: set[int]) -> LlamaForCausalLM:
    """The base plus a random change of rank `RANK` in every target of the planted ones."""
    teacher = copy.deepcopy(base)
    for number in sorted(layers):
        for name, weight in teacher.model.layers[number].named_parameters():
            if name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
                change = torch.randn(weight.shape[0], RANK) @ torch.randn(RANK, weight.shape[1])
                weight.add_(change * (STRENGTH * weight.norm() / change.norm()))
    return teacher
