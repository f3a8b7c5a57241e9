"""A LoRA of which one factor only picks rows or columns, turned back into the sparse adapter that it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..adapter.folder import read_config
from ..adapter.names import lora_scale
from ..core.entries import Slices
from ..core.files import read_mapping
from ..core.fingerprint import fingerprint
from ..core.selection import Selection
from ..model.structure import is_transposed
from .figures import exactness
from .forms import DTYPES, Options
from .lora_folder import beyond, check_config, read_factors, read_tensors
from .peft_folder import EXACT, load_stock, size_of, write_marker
from .proof import InexactExport, compare, tuned_answer
from .staging import MARKER, staged

__all__ = ["Picks", "StockLora", "base_dtype", "lines", "picks", "prepare", "read_lora", "to_delta"]


@dataclass(frozen=True)
class StockLora:
    """A PEFT LoRA folder.

    Attributes:
        config: adapter_config.json.
        modules: module path → (A `[r, in]`, B `[out, r]`), as stored.
        exported: the figures of our export, where it is one; else empty.
        exact: tuned values that base + B·A misses by a last bit, which our export keeps (`stock.missed`).
        path: the folder.
    """

    config: Mapping[str, Any]
    modules: Mapping[str, tuple[Tensor, Tensor]]
    exported: Mapping[str, Any]
    exact: Mapping[str, Tensor]
    path: Path

    @property
    def base(self) -> str | None:
        """Name of the base model."""
        return self.config.get("base_model_name_or_path")

    def scale(self, path: str) -> float:
        """What PEFT multiplies B·A of a module by."""
        return lora_scale(self.config, path, self.modules[path][0].shape[0])


@dataclass(frozen=True)
class Picks:
    """What a one-hot LoRA module changes.

    Attributes:
        reads: whether it picks inputs (columns of W); else outputs (rows).
        index: the picked positions, sorted, int64 `[n]`.
        change: fp32, `[out, n]` for inputs, `[n, in]` for outputs.
    """

    reads: bool
    index: Tensor
    change: Tensor


def read_lora(folder: str | os.PathLike[str]) -> StockLora:
    """Read a PEFT LoRA folder and refuse what no sparse adapter can hold, without a model.

    Raises:
        ValueError: for another kind of adapter, a damaged one, or features beyond B·A.
    """
    path = Path(folder)
    config = read_config(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: not a LoRA folder (peft_type is {config.get('peft_type')!r}); --to delta takes a LoRA")
    if problem := beyond(config):
        raise ValueError(f"{path}: cannot become a sparse adapter: it has {problem}, which is more than a product of two factors")
    check_config(path, config)
    marker = path / MARKER
    exported = read_mapping(marker) if marker.is_file() else {}
    exact = read_tensors(path / EXACT) if exported and (path / EXACT).is_file() else {}
    return StockLora(config, read_factors(path), exported, exact, path)


def prepare(lora: StockLora, options: Options) -> dict[str, Any]:
    """No arguments of `to_delta`; refuses a LoRA that is not one-hot."""
    for module in lora.modules:
        picks(lora, module)
    return {}


def base_dtype(lora: StockLora, options: Options) -> torch.dtype | None:
    """The type to load the base in: the one asked for, else the one that our export notes; None for its own."""
    name = options.dtype or lora.exported.get("base_dtype")
    return getattr(torch, name) if name in DTYPES else None


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the command shows of the figures."""
    yield "adapter", f"{figures['entries']:,} values in {figures['modules']} parameters"
    yield "size", f"{figures['compact_bytes'] / 1e6:.2f} MB (the LoRA: {figures['source_bytes'] / 1e6:.2f} MB)"
    yield from exactness(figures)


def picks(lora: StockLora, path: str) -> Picks | None:
    """What a module changes; None where it changes nothing (zeros written for an engine's sake).

    Raises:
        ValueError: where neither factor is one-hot.
    """
    a_RI, b_OR = (factor.float() for factor in lora.modules[path])
    if not (a_RI.any() or b_OR.any()):
        return None
    scale = lora.scale(path)
    for reads, hot_RN, other_RM in ((True, a_RI, b_OR.T), (False, b_OR.T, a_RI)):
        if (found := _one_hot(hot_RN)) is not None:
            used, index = found
            order = index.argsort()
            change = other_RM[used][order] * scale
            return Picks(reads, index[order], change.T if reads else change)
    raise ValueError(
        f"{lora.path}: cannot become a sparse adapter: {path}: neither factor is one-hot (only zeros, and a single 1 per used "
        "rank, each at another place), so that it changes the whole weight"
    )


def to_delta(
    lora: StockLora, model: Any, directory: str | os.PathLike[str], *, tokenizer: Any = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the sparse adapter that a one-hot LoRA is: the inverse of `to_lora`, whatever its layout.

    Tuned values are base + B·A in fp32, rounded to the base's type, or what our export noted where that misses one by a last
    bit: those of the adapter that was exported, bit for bit.

    Args:
        lora: of `read_lora`.
        model: the base, in the type that the adapter is to have; unchanged afterwards.
        directory: the new folder.
        tokenizer: for prompts of text in the check; default None, drawn tokens only.
        overwrite: replace an earlier export; default False.

    Returns:
        path, entries, modules, bytes, compact_bytes, source_bytes (the LoRA's), max_difference, tolerance, tokens.

    Raises:
        ValueError: for a LoRA that is not one-hot; for another base, as far as shapes tell; where `directory` exists; where
            the adapter does not compute what PEFT computes with the LoRA. `model` is unchanged then.

    Example:
        >>> to_delta(read_lora("lora"), base, "adapter")["entries"]
        1385856
    """
    delta = _delta(lora, model)
    with staged(directory, overwrite=overwrite) as folder:
        delta.save(folder)
        base, reference = tuned_answer(Delta.load(folder), model, tokenizer)
        try:
            check = compare(reference, load_stock(base, lora.path).get_base_model())
        except InexactExport as error:
            raise InexactExport(f"{error}; the change does not fit {model.dtype}, try --dtype float32") from error
        figures = {"to": "delta", "entries": delta.selection.size, "modules": len(delta.selection)}
        figures |= {"source_bytes": size_of(lora.path), **check}
        return write_marker(folder, directory, delta, figures)


def _one_hot(hot_RN: Tensor) -> tuple[Tensor, Tensor] | None:
    """(used ranks as a mask `[r]`, the position each picks `[used]`); None where the factor is not one-hot."""
    ones = hot_RN != 0
    used, index = ones.any(1), ones.int().argmax(1)
    picked = index[used]
    regular = bool((ones.sum(1) <= 1).all()) and bool((hot_RN[ones] == 1).all())
    return (used, picked) if regular and 0 < picked.numel() == picked.unique().numel() else None


def _delta(lora: StockLora, model: Any) -> Delta:
    """The adapter of a LoRA on this base."""
    selection, values, prints = {}, {}, {}
    for path, weight in _weights(lora, model).items():
        picked, transposed = picks(lora, path), is_transposed(model.get_submodule(path))
        if picked is None:
            continue
        entries = Slices(tuple(weight.shape), int(picked.reads != transposed), picked.index)
        base = entries.to(weight.device).gather(weight).cpu()
        name, change = f"{path}.weight", picked.change.T if transposed else picked.change
        tuned = _corrected(lora, name, (base.float() + change).to(base.dtype), change)
        selection[name], values[name], prints[name] = entries, tuned, fingerprint(base)
    if not selection:
        raise ValueError(f"{lora.path}: changes nothing: all its factors are zero")
    method, total = lora.exported.get("method"), sum(parameter.numel() for parameter in model.parameters())
    return Delta(Selection(selection), values, prints, method if isinstance(method, dict) else {}, lora.base, total)


def _weights(lora: StockLora, model: Any) -> dict[str, nn.Parameter]:
    """Module path → the base's weight, which the factors must fit, in the base's order."""
    names = {f"{path}.weight": path for path in lora.modules}
    found = {names[name]: weight for name, weight in model.named_parameters() if name in names}
    if missing := sorted(lora.modules.keys() - found.keys()):
        raise ValueError(f"{missing[0]}.weight: the base has no such parameter; this LoRA's base is {lora.base!r}")
    for path, weight in found.items():
        a_RI, b_OR = lora.modules[path]
        fitting = (b_OR.shape[0], a_RI.shape[1])
        shape = tuple(weight.shape[::-1] if is_transposed(model.get_submodule(path)) else weight.shape)
        if shape != fitting:
            raise ValueError(f"{path}: the LoRA fits a weight of shape {list(fitting)}, the base has {list(shape)}: another base")
    return found


def _corrected(lora: StockLora, name: str, values: Tensor, change: Tensor) -> Tensor:
    """Values with those replaced that the export noted, none of which is further away than rounding of the change."""
    index, exact = lora.exact.get(f"{name}.index"), lora.exact.get(f"{name}.values")
    if index is None or exact is None or exact.dtype != values.dtype:
        return values
    corrected = values.clone().flatten()
    near = change.abs().flatten() * 2**-7 + values.float().abs().flatten() * 2**-7
    inside = bool(((index >= 0) & (index < near.numel())).all())
    known = index.dtype == torch.int64 and index.shape == exact.shape and inside
    if not known or not bool(((exact - corrected[index]).float().abs() <= near[index]).all()):
        raise ValueError(
            f"{lora.path / EXACT}: {name}: damaged, or of another adapter; without this file values may miss a last bit"
        )
    corrected[index] = exact
    return corrected.view_as(values)
