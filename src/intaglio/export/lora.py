"""Export to LoRA, exactly: one factor is the change itself, the other says with zeros and ones where it goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..adapter.names import RANKS, lora_key
from ..core.entries import Slices
from ..core.selection import Selection
from ..model.structure import is_transposed
from .peft_folder import differences, export_peft, linear_owners, missed, refuse, target_modules
from .proof import InexactExport

__all__ = ["RANKS", "factors", "largest", "lora_rank", "refuse_both", "refuse_unsliced", "to_lora"]


def to_lora(
    delta: Delta,
    model: Any,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    ragged: bool = False,
    fill_layers: bool = False,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a stock PEFT LoRA folder that computes what the tuned model computes.

    With D = tuned − base, zero outside the chosen columns (or rows) idx of W:

        columns: A = one-hot(idx) [r, in],  B = D[:, idx] [out, r]
        rows:    A = D[idx] [r, in],        B = one-hot(idx) [out, r]

    The rank is the same in all modules, padded with zeros up to one that vLLM takes, and `lora_alpha = r`: no engine
    has to read patterns or scales. The folder is loaded with PEFT onto a copy of the base and compared in fp32 first.

    Args:
        delta: rows or columns (`Slices`) of linear weights, e.g. S2FT's.
        model: the base, in the type the delta was trained on; unchanged afterwards.
        directory: the new folder.
        dtype: of the factors; default float32, exact for every base. In bfloat16 D may round, which the check decides.
        ragged: give each module its own rank, by `rank_pattern` and an equal `alpha_pattern`: a smaller file with a scale of
            1 whether an engine reads patterns or not. Only PEFT and vLLM (0.32 or newer) take it; default False.
        fill_layers: write zeros for every layer of each projection, for engines that drop a projection which any layer
            lacks (LoRAX, TGI); default False.
        tokenizer: for prompts of text in the check; default None, drawn tokens only.
        overwrite: replace an earlier export; default False.

    Returns:
        path, rank, max_lora_rank (vLLM's), modules, filled (those of zeros), targets, rounded (values that base + D misses
        by a last bit, kept for `to_delta` in a file beside; 0 in bfloat16), bytes, compact_bytes, max_difference, tolerance,
        tokens.

    Raises:
        ValueError: where the delta holds anything but slices of linear weights, or more of one module than rank 512;
            for `ragged` with `fill_layers`; for another base; where `directory` exists; where the result is not exact.
            `model` is unchanged then.

    Example:
        >>> to_lora(Delta.load("adapter"), base, "lora")["rank"]
        64

    Source: arXiv 2412.06289 (S2FT), section 5.3 serves such adapters like LoRA.
    """
    refuse_both(ragged, fill_layers)
    padded = lora_rank(delta.selection)
    owners = linear_owners(delta, model, "LoRA")
    ranks = {path: _count(delta, name) if ragged else padded for name, (path, _) in owners.items()}
    filled = _siblings({path for path, _ in owners.values()}, model) if fill_layers else {}
    ranks |= dict.fromkeys(filled, padded)

    changes, tensors = {name: change.to(dtype) for name, change in differences(delta, model).items()}, {}
    for name, (path, module) in owners.items():
        tensors |= _named(path, factors(delta, name, changes[name], ranks[path], is_transposed(module)), dtype)
    for path, (inputs, outputs) in filled.items():
        tensors |= _named(path, (torch.zeros(padded, inputs), torch.zeros(outputs, padded)), dtype)
    transposed = any(is_transposed(module) for _, module in owners.values())
    config = _config(delta, model, ranks, transposed)
    figures = {"to": "lora", "rank": config.r, "max_lora_rank": padded, "modules": len(ranks), "filled": len(filled)}
    exact, common = missed(delta, model, changes), {"tokenizer": tokenizer, "overwrite": overwrite}
    figures |= {"targets": config.target_modules, "rounded": sum(t.numel() for key, t in exact.items() if key.endswith(".index"))}
    try:
        return export_peft(delta, model, directory, config, tensors, figures=figures, exact=exact, **common)
    except InexactExport as error:
        rounded = "" if dtype == torch.float32 else f"; factors in {dtype} round the change, float32 does not"
        raise InexactExport(f"{error}{rounded}") from error


def refuse_both(ragged: bool, fill_layers: bool) -> None:
    """Refuse two layouts at once.

    Raises:
        ValueError: naming both.
    """
    if ragged and fill_layers:
        raise ValueError(
            "ragged and fill_layers: filled layers are for engines that stack all layers of one rank, which ragged ranks break; "
            "give one of them"
        )


def lora_rank(selection: Selection) -> int:
    """The rank of an exact LoRA: the most slices of one weight, rounded up to what vLLM accepts.

    Raises:
        ValueError: where a parameter is not made of slices of a matrix, or has more than 512.
    """
    refuse_unsliced(selection)
    widest, count = largest(selection)
    fitting = [rank for rank in RANKS if rank >= count]
    if not fitting:
        raise ValueError(
            f"cannot be exported as LoRA: {widest} has {count} chosen slices, which needs rank {count}; vLLM takes at most "
            f"{RANKS[-1]}. Train fewer units of this projection (spread over more layers or projections), or use "
            "--to approximate-lora or --to merged"
        )
    return fitting[0]


def refuse_unsliced(selection: Selection) -> None:
    """Refuse what no exact LoRA holds.

    Raises:
        ValueError: naming the first parameter that is not made of slices of a matrix.
    """
    kinds = {n: e.kind for n, e in selection.items() if not isinstance(e, Slices) or len(e.shape) != 2}
    problems = [f"{n}: holds {k} of a tensor of shape {list(selection[n].shape)}" for n, k in kinds.items()]
    scattered = (
        "use --to supertuning (scattered entries of linear weights), --to approximate-lora (its loss measured) or --to merged"
    )
    advice = scattered if "elements" in kinds.values() else "use --to merged"
    refuse(problems, "LoRA, which takes rows or columns of linear weights", advice)


def largest(selection: Selection) -> tuple[str, int]:
    """The parameter with the most chosen slices, and how many."""
    counts = {n: e.index.numel() for n, e in selection.items() if isinstance(e, Slices)}
    widest = max(counts, key=counts.__getitem__)
    return widest, counts[widest]


def factors(delta: Delta, name: str, change: Tensor, rank: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one weight, fp32, padded with zeros.

    Args:
        delta: rows or columns of the weight.
        name: of the parameter.
        change: tuned minus base, compact.
        rank: at least the number of slices.
        transposed: whether the weight is stored as [in, out].
    """
    entries = delta.selection[name]
    assert isinstance(entries, Slices)  # lora_rank has refused all else
    inputs, outputs = entries.shape if transposed else entries.shape[::-1]
    d_OI = change.T if transposed else change
    chosen = torch.arange(entries.index.numel())
    a_RI, b_OR = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    if (entries.dim == 0) == transposed:  # slices of the input
        a_RI[chosen, entries.index.cpu()] = 1
        b_OR[:, : chosen.numel()] = d_OI
    else:
        a_RI[: chosen.numel()] = d_OI
        b_OR[entries.index.cpu(), chosen] = 1
    return a_RI, b_OR


def _count(delta: Delta, name: str) -> int:
    entries = delta.selection[name]
    assert isinstance(entries, Slices)  # lora_rank has refused all else
    return entries.index.numel()


def _siblings(paths: set[str], model: nn.Module) -> dict[str, tuple[int, int]]:
    """Linear modules called like those of `paths` in other layers: path → (inputs, outputs)."""
    last, found = {path.rpartition(".")[2] for path in paths}, {}
    for path, module in model.named_modules():
        if path in paths or path.rpartition(".")[2] not in last:
            continue
        if isinstance(module, nn.Linear):
            found[path] = module.in_features, module.out_features
        elif is_transposed(module):
            found[path] = tuple(module.get_parameter("weight").shape)
    return found


def _named(path: str, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's factors as PEFT names them."""
    return {lora_key(path, letter): t.to(dtype) for letter, t in zip("AB", pair, strict=True)}


def _config(delta: Delta, model: Any, ranks: Mapping[str, int], transposed: bool) -> Any:
    """PEFT's config for modules of these ranks, each with a scale of 1."""
    from peft import LoraConfig

    rank = max(ranks.values())
    pattern = {path: own for path, own in ranks.items() if own != rank}
    targets = target_modules(set(ranks), model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=targets,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM" if model.can_generate() else None,
        base_model_name_or_path=delta.base,
        inference_mode=True,
    )
    config.target_modules = targets  # LoraConfig makes a set of it, whose order on disk would be chance
    return config
