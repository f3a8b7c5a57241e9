"""PEFT's own sparse adapter (SUPERTUNING): values that are added at flat positions of linear weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..adapter.names import PREFIX
from ..core.entries import Entries
from .figures import exact
from .peft_folder import address, differences, export_peft, linear_owners, refuse_parameters, target_modules

__all__ = ["lines", "to_supertuning"]


def to_supertuning(
    delta: Delta,
    model: Any,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a stock PEFT SUPERTUNING folder that computes what the tuned model computes.

    PEFT derives the number of entries from one share for all modules, `int(numel · (1 − sparsity))`. The share is that
    of the densest module; the others are padded with zeros at places that are not used.

    Args:
        delta: slices or single entries of linear weights.
        model: the base, in the type the delta was trained on; unchanged afterwards.
        directory: the new folder.
        tokenizer: for prompts of text in the check; default None, drawn tokens only.
        overwrite: replace an earlier export; default False.

    Returns:
        path, sparsity, modules, targets, entries, padded, bytes, compact_bytes, max_difference, tolerance, tokens.

    Raises:
        ValueError: where the delta holds anything but weights of `nn.Linear`; for another base; where `directory`
            exists; where the result is not exact. `model` is unchanged then.

    Example:
        >>> to_supertuning(Delta.load("adapter"), base, "supertuning")["entries"]
        1385856

    Source: PEFT's SupertuningConfig (arXiv 2607.09287).
    """
    owners = linear_owners(delta, model, "SUPERTUNING")
    others = [n for n, (_, module) in owners.items() if not isinstance(module, nn.Linear)]
    refuse_parameters([f"{n}: its layer is no nn.Linear" for n in others], "SUPERTUNING", "use --to merged")
    sparsity = _sparsity(list(delta.selection.values()))
    targets = target_modules({path for path, _ in owners.values()}, model)

    changes, tensors = differences(delta, model), {}
    for name, (path, _) in owners.items():
        key, entries = f"{PREFIX}{path}.supertuning", delta.selection[name]
        index, values = _padded(entries, changes[name], _slots(entries.numel, sparsity))
        tensors |= {f"{key}_indices": index, f"{key}_values": values}

    from peft import SupertuningConfig

    config = address(SupertuningConfig(sparsity=sparsity), delta, model, targets)
    padded = sum(_slots(entries.numel, sparsity) for entries in delta.selection.values())
    figures = {"to": "supertuning", "sparsity": sparsity, "modules": len(owners), "targets": targets}
    figures |= {"entries": delta.selection.size, "padded": padded}
    return export_peft(delta, model, directory, config, tensors, tokenizer=tokenizer, overwrite=overwrite, figures=figures)


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the command shows of the figures."""
    padding = f"{figures['padded'] - figures['entries']:,} places of padding"
    yield "SUPERTUNING", f"sparsity {figures['sparsity']:.4g}, {figures['entries']:,} values and {padding}"
    yield from exact(figures)


def _slots(numel: int, sparsity: float) -> int:
    """Entries that PEFT reserves in a weight; the same expression as its, so that rounding agrees."""
    return int(numel * (1 - sparsity))


def _sparsity(selection: list[Entries]) -> float:
    """The greatest sparsity that leaves room for every module's entries."""
    sparsity = 1 - max(entries.count / entries.numel for entries in selection)
    while any(_slots(entries.numel, sparsity) < entries.count for entries in selection):
        sparsity = math.nextafter(sparsity, 0.0)
    return sparsity


def _padded(entries: Entries, difference: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(positions int32 [slots], values fp32 [slots]): the chosen entries, then zeros at the first unused places."""
    index = entries.flat()
    unused = torch.ones(entries.numel, dtype=torch.bool)
    unused[index] = False
    fill = unused.nonzero().flatten()[: slots - index.numel()]
    # Compact values lie in memory in the order of `flat()`, for every kind of entries.
    return torch.cat([index, fill]).int(), torch.cat([difference.flatten(), torch.zeros(fill.numel())])
