"""Layers and ranks of a next LoRA, by the importance that IST has learned.

A record is what `training.rotation_record.save` returns, and `read` there reads from a run's `layers.json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..export.pruned import most_important
from ..method_kinds.fields import count, refuse
from ..training.rotation_record import ranking

__all__ = ["layers_to_transform", "rank_pattern"]


def layers_to_transform(record: Mapping[str, Any], k: int) -> list[int]:
    """The numbers of the k most important layers, ascending, for `LoraConfig(layers_to_transform=…)`.

    PEFT finds a layer's number behind the first two names of a path (`model.layers.3`). Where the stack is at the model's
    root (`h.3`, in a bare GPT2Model) it needs `layers_pattern="h"` beside.

    Args:
        record: of a run with IST.
        k: how many, from 1 to all.

    Raises:
        ValueError: for k out of range, a run that learned no importance, or layers that numbers do not tell apart.

    Example:
        >>> LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=layers_to_transform(record, 8))
    """
    layers = record["layers"]
    stacks = sorted({path.rpartition(".")[0] for path in layers})
    if len(stacks) > 1 or not all(path.rpartition(".")[2].isdigit() for path in layers):
        raise ValueError(
            f"layers_to_transform: PEFT goes by the number of a layer, which does not tell those of {', '.join(stacks[:2])} "
            "apart; use rank_pattern, or prune"
        )
    return sorted(int(layers[place].rpartition(".")[2]) for place in most_important(record, k))


def rank_pattern(record: Mapping[str, Any], r: int, *, least: int = 1, most: int | None = None) -> dict[str, int]:
    """Ranks in proportion to importance, for `LoraConfig(r=r, rank_pattern=…)`.

    A layer's share is that of its weight in IST's draws, sigmoid(I_i) / Σ sigmoid(I). All ranks add up to r · layers exactly,
    by largest remainders, so that parameters are as many as with r everywhere (where all layers are alike).

    PEFT scales a layer by lora_alpha / rank. To leave the scale as it is with r everywhere, give
    `alpha_pattern={key: lora_alpha * rank / r for key, rank in pattern.items()}`.

    Args:
        record: of a run with IST.
        r: mean rank, at least 1.
        least: smallest rank, from 1 to r; default 1.
        most: greatest rank, at least r; default as large as the share asks for.

    Returns:
        A regular expression that PEFT matches with all modules of a layer, and no others → its rank; one per layer.

    Raises:
        ValueError: for ranks out of range, or a run that learned no importance.

    Example:
        >>> LoraConfig(r=8, rank_pattern=rank_pattern(record, 8))
    """
    refuse("rank_pattern", count("r", r) + count("least", least) + count("most", most, none="no bound"))
    if least > r or (most is not None and most < r):
        raise ValueError(f"rank_pattern: the mean r={r} cannot lie outside least={least} … most={most}")
    ranking(record)  # refuses where nothing was learned
    weights = torch.tensor(record["importance"], dtype=torch.float64).sigmoid().tolist()
    ranks = _apportion(weights, r * len(weights), least, r * len(weights) if most is None else most)
    # "^": PEFT would allow anything before it; the dot: layer 1 is not layer 10.
    return {rf"^{re.escape(path)}(\..*)?": rank for path, rank in zip(record["layers"], ranks, strict=True)}


def _apportion(weights: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Whole numbers within bounds that add up to `total`, as near to proportional to `weights` as can be."""
    fixed: dict[int, int] = {}
    while True:
        free = [i for i in range(len(weights)) if i not in fixed]
        left, mass = total - sum(fixed.values()), math.fsum(weights[i] for i in free)
        quota = {i: left * weights[i] / mass for i in free}
        below, above = {i for i in free if quota[i] < least}, {i for i in free if quota[i] > most}
        if not below and not above:
            break
        # The bound that is missed by more is settled first: what it takes or gives may put the other right.
        missing = math.fsum(least - quota[i] for i in below)
        excess = math.fsum(quota[i] - most for i in above)
        fixed |= dict.fromkeys(below, least) if missing >= excess else dict.fromkeys(above, most)
    floors = {i: int(quota[i]) for i in free}
    ranked = sorted(free, key=lambda i: floors[i] - quota[i])
    extra = set(ranked[: left - sum(floors.values())])
    return [fixed[i] if i in fixed else floors[i] + (i in extra) for i in range(len(weights))]
