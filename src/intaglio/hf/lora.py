"""Export to LoRA, exactly: one factor is the change itself, the other says with zeros and ones where it goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..delta import Delta
from ..selection import Selection, Slices
from ..structure import is_transposed
from .equivalence import InexactExport
from .stock import export_peft, linear_owners, refuse, target_modules

__all__ = ["RANKS", "lora_rank", "to_lora"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


def to_lora(
    delta: Delta,
    model: Any,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
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
        tokenizer: for prompts of text in the check; default None, drawn tokens only.
        overwrite: replace an earlier export; default False.

    Returns:
        path, rank, modules, targets, bytes, compact_bytes, max_difference, tolerance, tokens.

    Raises:
        ValueError: where the delta holds anything but slices of linear weights, or more of one module than rank 512;
            for another base; where `directory` exists; where the result is not exact. `model` is unchanged then.

    Example:
        >>> to_lora(Delta.load("adapter"), base, "lora")["rank"]
        64

    Source: arXiv 2412.06289 (S2FT), section 5.3 serves such adapters like LoRA.
    """
    rank = lora_rank(delta.selection)
    owners = linear_owners(delta, model, "LoRA")
    targets = target_modules({path for path, _ in owners.values()}, model)

    def build(differences: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for name, (path, module) in owners.items():
            entries = delta.selection[name]
            assert isinstance(entries, Slices)  # lora_rank has refused all else
            for letter, factor in zip("AB", _factors(entries, differences[name], rank, is_transposed(module)), strict=True):
                tensors[f"base_model.model.{path}.lora_{letter}.weight"] = factor.to(dtype)
        return tensors

    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        fan_in_fan_out=any(is_transposed(module) for _, module in owners.values()),
        task_type="CAUSAL_LM" if model.can_generate() else None,
        base_model_name_or_path=delta.base,
        inference_mode=True,
    )
    config.target_modules = targets  # LoraConfig makes a set of it, whose order on disk would be chance
    figures = {"to": "lora", "rank": rank, "modules": len(owners), "targets": targets}
    try:
        return export_peft(delta, model, directory, config, build, tokenizer=tokenizer, overwrite=overwrite, figures=figures)
    except InexactExport as error:
        rounded = "" if dtype == torch.float32 else f"; factors in {dtype} round the change, float32 does not"
        raise InexactExport(f"{error}{rounded}") from error


def lora_rank(selection: Selection) -> int:
    """The rank of an exact LoRA: the most slices of one weight, rounded up to what vLLM accepts.

    Raises:
        ValueError: where a parameter is not made of slices of a matrix, or has more than 512.
    """
    kinds = {n: e.kind for n, e in selection.items() if not isinstance(e, Slices) or len(e.shape) != 2}
    scattered = "elements" in kinds.values()
    problems = [f"{n}: holds {k} of a tensor of shape {list(selection[n].shape)}" for n, k in kinds.items()]
    advice = "use --to supertuning (scattered entries of linear weights) or --to merged" if scattered else "use --to merged"
    refuse(problems, "LoRA, which takes rows or columns of linear weights", advice)
    counts = {n: e.index.numel() for n, e in selection.items() if isinstance(e, Slices)}
    widest = max(counts, key=counts.__getitem__)
    fitting = [rank for rank in RANKS if rank >= counts[widest]]
    if not fitting:
        raise ValueError(
            f"cannot be exported as LoRA: {widest} has {counts[widest]} chosen slices, which needs rank {counts[widest]}; "
            f"vLLM takes at most {RANKS[-1]}. Train fewer units of this projection (spread over more layers or "
            "projections), or use --to merged"
        )
    return fitting[0]


def _factors(entries: Slices, difference: Tensor, rank: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one weight, fp32, padded with zeros.

    Args:
        entries: n rows or columns.
        difference: tuned minus base, compact.
        rank: at least n.
        transposed: whether the weight is stored as [in, out].
    """
    inputs, outputs = entries.shape if transposed else entries.shape[::-1]
    d_OI = difference.T if transposed else difference
    chosen = torch.arange(entries.index.numel())
    a_RI, b_OR = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    if (entries.dim == 0) == transposed:  # slices of the input
        a_RI[chosen, entries.index.cpu()] = 1
        b_OR[:, : chosen.numel()] = d_OI
    else:
        a_RI[: chosen.numel()] = d_OI
        b_OR[entries.index.cpu(), chosen] = 1
    return a_RI, b_OR
