"""The LoRA that an adapter is, exactly: one factor is the change itself, the other says with zeros and ones where it goes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..adapter.names import RANKS, lora_key
from ..core.entries import Slices
from ..core.selection import Selection
from ..model.structure import is_transposed
from .figures import exact, vllm
from .forms import Options
from .peft_folder import address, differences, export_peft, linear_owners, missed, refuse_parameters, target_modules
from .proof import InexactExport

__all__ = ["RANKS", "factors", "lines", "lora_rank", "prepare", "slices_of", "to_lora"]


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
    _refuse_both(ragged, fill_layers)
    slices, padded = slices_of(delta.selection), lora_rank(delta.selection)
    owners = linear_owners(delta, model, "LoRA")
    ranks = {path: slices[name].index.numel() if ragged else padded for name, (path, _) in owners.items()}
    filled = _siblings({path for path, _ in owners.values()}, model) if fill_layers else {}
    ranks |= dict.fromkeys(filled, padded)

    changes = {name: change.to(dtype) for name, change in differences(delta, model).items()}
    pairs = {path: factors(slices[n], changes[n], ranks[path], is_transposed(m)) for n, (path, m) in owners.items()}
    pairs |= {path: (torch.zeros(padded, i), torch.zeros(o, padded)) for path, (i, o) in filled.items()}
    tensors = {lora_key(path, letter): t.to(dtype) for path, pair in pairs.items() for letter, t in zip("AB", pair, strict=True)}
    config = _config(delta, model, ranks)
    figures = {"to": "lora", "rank": config.r, "max_lora_rank": padded, "modules": len(ranks), "filled": len(filled)}
    rounded, common = missed(delta, model, changes), {"tokenizer": tokenizer, "overwrite": overwrite}
    figures |= {
        "targets": config.target_modules,
        "rounded": sum(t.numel() for key, t in rounded.items() if key.endswith(".index")),
    }
    try:
        return export_peft(delta, model, directory, config, tensors, figures=figures, exact=rounded, **common)
    except InexactExport as error:
        advice = "" if dtype == torch.float32 else f"; factors in {dtype} round the change, float32 does not"
        raise InexactExport(f"{error}{advice}") from error


def prepare(delta: Delta, options: Options) -> dict[str, Any]:
    """The arguments of `to_lora`; refuses what no LoRA holds."""
    lora_rank(delta.selection)
    _refuse_both(options.ragged, options.fill_layers)
    dtype = getattr(torch, options.dtype or "float32")
    return {"dtype": dtype, "ragged": options.ragged, "fill_layers": options.fill_layers}


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the command shows of the figures."""
    filled = f", {figures['filled']} of them zeros" if figures["filled"] else ""
    yield "LoRA", f"rank {figures['rank']} in {figures['modules']} modules{filled}"
    yield from exact(figures)
    yield from vllm(figures)


def lora_rank(selection: Selection) -> int:
    """The rank of an exact LoRA: the most slices of one weight, rounded up to what vLLM accepts.

    Raises:
        ValueError: where a parameter is not made of slices of a matrix, or has more than 512.
    """
    counts = {name: entries.index.numel() for name, entries in slices_of(selection).items()}
    widest = max(counts, key=counts.__getitem__)
    fitting = [rank for rank in RANKS if rank >= counts[widest]]
    if not fitting:
        raise ValueError(
            f"cannot be exported as LoRA: {widest} has {counts[widest]} chosen slices, its rank; vLLM takes at most {RANKS[-1]}. "
            "Train fewer units of this projection (spread over more layers or projections), or use --to approximate-lora "
            "or --to merged"
        )
    return fitting[0]


def slices_of(selection: Selection) -> dict[str, Slices]:
    """The slices of each matrix, which is all that an exact LoRA holds.

    Raises:
        ValueError: naming the first parameter that is not made of slices of a matrix.
    """
    found = {n: e for n, e in selection.items() if isinstance(e, Slices) and len(e.shape) == 2}
    kinds = {n: e.kind for n, e in selection.items() if n not in found}
    problems = [f"{n}: holds {k} of a tensor of shape {list(selection[n].shape)}" for n, k in kinds.items()]
    # Other forms take scattered entries, but of linear weights only. Which weights are such the model would say, and it is not
    # read yet: matrices inside numbered layers are, but an embedding or a norm is not.
    linear = all(len(e.shape) == 2 and re.search(r"\.\d+\..*weight$", name) for name, e in selection.items())
    forms = "use --to supertuning (scattered entries of linear weights), --to approximate-lora (its loss measured) or --to merged"
    advice = forms if "elements" in kinds.values() and linear else "use --to merged"
    refuse_parameters(problems, "LoRA, which takes rows or columns of linear weights", advice)
    return found


def factors(entries: Slices, change: Tensor, rank: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one weight, fp32, padded with zeros.

    Args:
        entries: rows or columns of the weight.
        change: tuned minus base, compact.
        rank: at least the number of slices.
        transposed: whether the weight is stored as [in, out].
    """
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


def _refuse_both(ragged: bool, fill_layers: bool) -> None:
    if ragged and fill_layers:
        raise ValueError(
            "ragged and fill_layers: filled layers are for engines that stack all layers of one rank, which ragged ranks break; "
            "give one of them"
        )


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


def _config(delta: Delta, model: Any, ranks: Mapping[str, int]) -> Any:
    """PEFT's config for modules of these ranks, each with a scale of 1."""
    from peft import LoraConfig

    rank = max(ranks.values())
    pattern = {path: own for path, own in ranks.items() if own != rank}
    transposed = any(is_transposed(model.get_submodule(path)) for path in ranks)
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=dict(pattern), alpha_pattern=dict(pattern), fan_in_fan_out=transposed
    )
    return address(config, delta, model, target_modules(set(ranks), model))
