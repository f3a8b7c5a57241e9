"""A stack of layers whose importance is known: nothing is trained, damping layer i costs c_i and costs add up.

The methods' own pure functions are driven, `suppressed_sets`, `learn` and `active`, with losses that this model answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intaglio.method_kinds.layer_method import LayerMethod

LAYERS, TOP = 32, 8


def costs(seed: int, mean: float) -> Tensor:
    """Exponential damping costs of `LAYERS` layers, fp64."""
    noise = torch.rand(LAYERS, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    return -mean * (1 - noise).log()


def learn(method: LayerMethod, cost: Tensor, loss: float, updates: Sequence[int], seed: int, draws: int = 400) -> dict[str, Any]:
    """Run a method against a stack; what it knows after each of so many importance updates.

    Args:
        method: IST or RST.
        cost: what damping each layer adds to the loss, fp64 `[L]`.
        loss: without damping.
        updates: when to look, ascending.
        seed: of the method's draws.
        draws: active sets drawn to estimate how often a layer trains; they come from a generator of their own.

    Returns:
        Lists with one item per look: `inclusion`, the chance that a truly top layer trains in a step; `spearman`, the rank
        correlation of importance and cost, None while importance has no ranks.
    """
    importance, generator = torch.zeros_like(cost), torch.Generator().manual_seed(seed)
    top = set(cost.topk(TOP).indices.tolist())
    found: dict[str, list[Any]] = {"inclusion": [], "spearman": []}
    for update in range(1, max(updates) + 1):
        sets = method.suppressed_sets(importance, generator)
        importance = method.learn(importance, sets, [loss + float(cost[places].sum()) for places in sets])
        if update in updates:
            found["inclusion"].append(inclusion(method, importance, top, draws, seed))
            found["spearman"].append(spearman(importance, cost))
    return found


def inclusion(method: LayerMethod, importance: Tensor, top: set[int], draws: int, seed: int) -> float:
    """How often a layer of `top` is active, over so many draws."""
    generator = torch.Generator().manual_seed(7 + seed)
    hits = sum(len(top.intersection(method.active(importance, generator))) for _ in range(draws))
    return hits / (draws * len(top))


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation of two vectors without ties; None where `a` is constant."""
    if bool((a == a[0]).all()):
        return None
    ranks = [x.argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
