"""The way back: a LoRA of which one factor only picks rows or columns is a sparse adapter, and becomes one again."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..adapter.folder import WEIGHTS, read_config
from ..adapter.names import LORA_KEY, changes_base, lora_key, lora_scale
from ..core.entries import Slices
from ..core.files import read_mapping
from ..core.fingerprint import fingerprint
from ..core.selection import Selection
from ..model.structure import is_transposed
from .peft_folder import EXACT, load_stock, size_of, write_marker
from .proof import InexactExport, answer, applied, compare, prompts
from .staging import MARKER, staged

__all__ = ["Picks", "StockLora", "beyond", "check_config", "picks", "read_lora", "to_delta"]


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
    exact = _tensors(path / EXACT) if exported and (path / EXACT).is_file() else {}
    return StockLora(config, _modules(path), exported, exact, path)


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
        used, index = _one_hot(hot_RN)
        if used is not None and index is not None:
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
        work = copy.deepcopy(model).eval()
        with applied(Delta.load(folder), work):
            work.float()
            reference = answer(work, prompts(work, tokenizer))
        try:
            check = compare(reference, load_stock(work, lora.path).get_base_model())
        except InexactExport as error:
            raise InexactExport(f"{error}; the change does not fit {model.dtype}, try --dtype float32") from error
        figures = {"to": "delta", "entries": delta.selection.size, "modules": len(delta.selection)}
        figures |= {"source_bytes": size_of(lora.path), **check}
        return write_marker(folder, directory, delta, figures)


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse the config of a LoRA whose rank, scale, patterns or base's name cannot be read.

    Raises:
        ValueError: naming the folder and the field.
    """
    r, alpha, base = (config.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path"))
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"{folder}: damaged: r={r!r} in its config is no rank")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"{folder}: damaged: lora_alpha={alpha!r} in its config is no number")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{folder}: damaged: base_model_name_or_path={base!r} in its config is no name")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{folder}: damaged: {key} holds {pattern!r}, no regular expression ({error})") from error


def beyond(config: Mapping[str, Any]) -> str | None:
    """What a LoRA has beyond two factors and a scale; None where nothing."""
    names = (
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "layer_replication",
        "trainable_token_indices",
        "alora_invocation_tokens",
    )
    for name in (*names, "use_qalora", "use_bdlora", "target_parameters"):
        if config.get(name):
            return f"{name}={config[name]!r}"
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']!r}"
    start = changes_base(config)
    return f"init_lora_weights={start!r}" if start else None


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from error


def _modules(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = _tensors(folder / WEIGHTS)
    paths = [found["path"] for key in tensors if (found := LORA_KEY.fullmatch(key)) and found["letter"] == "A"]
    keys = {lora_key(path, letter) for path in paths for letter in "AB"}
    if not paths or keys != tensors.keys():
        odd = next(iter(sorted(keys ^ tensors.keys())), "nothing")
        raise ValueError(f"{folder / WEIGHTS}: not pairs of lora_A and lora_B of linear modules: {odd}")
    found = {path: (tensors[lora_key(path, "A")], tensors[lora_key(path, "B")]) for path in paths}
    for path, (a_RI, b_OR) in found.items():
        if a_RI.dim() != 2 or b_OR.dim() != 2 or a_RI.shape[0] != b_OR.shape[1]:
            raise ValueError(f"{folder / WEIGHTS}: {path}: factors of shapes {list(a_RI.shape)} and {list(b_OR.shape)}")
    return found


def _one_hot(hot_RN: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(used ranks as a mask `[r]`, the position each picks `[used]`); None where the factor is not one-hot."""
    ones = hot_RN != 0
    used, index = ones.any(1), ones.int().argmax(1)
    picked = index[used]
    regular = bool((ones.sum(1) <= 1).all()) and bool((hot_RN[ones] == 1).all())
    return (used, picked) if regular and 0 < picked.numel() == picked.unique().numel() else (None, None)


def _delta(lora: StockLora, model: Any) -> Delta:
    """The adapter of a LoRA on this base."""
    parameters, selection, values, prints = dict(model.named_parameters()), {}, {}, {}
    for path in (name.removesuffix(".weight") for name in _in_order(lora, parameters)):
        picked = picks(lora, path)
        if picked is None:
            continue
        transposed = is_transposed(model.get_submodule(path))
        weight = _weight(parameters[f"{path}.weight"], path, lora, transposed)
        entries = Slices(tuple(weight.shape), int(picked.reads != transposed), picked.index)
        base = entries.to(weight.device).gather(weight).cpu()
        name, change = f"{path}.weight", picked.change.T if transposed else picked.change
        tuned = _corrected(lora, name, (base.float() + change).to(base.dtype), change)
        selection[name], values[name], prints[name] = entries, tuned, fingerprint(base)
    if not selection:
        raise ValueError(f"{lora.path}: changes nothing: all its factors are zero")
    method, total = lora.exported.get("method"), sum(parameter.numel() for parameter in parameters.values())
    return Delta(Selection(selection), values, prints, method if isinstance(method, dict) else {}, lora.base, total)


def _corrected(lora: StockLora, name: str, values: Tensor, change: Tensor) -> Tensor:
    """Values with those replaced that the export noted, none of which is further away than rounding of the change."""
    index, exact = lora.exact.get(f"{name}.index"), lora.exact.get(f"{name}.values")
    if index is None or exact is None or exact.dtype != values.dtype:
        return values
    corrected = values.clone().flatten()
    near = change.abs().flatten() * 2**-7 + values.float().abs().flatten() * 2**-7
    known = index.dtype == torch.int64 and index.shape == exact.shape and 0 <= int(index.min()) <= int(index.max()) < near.numel()
    if not known or not bool(((exact - corrected[index]).float().abs() <= near[index]).all()):
        raise ValueError(
            f"{lora.path / EXACT}: {name}: damaged, or of another adapter; without this file values may miss a last bit"
        )
    corrected[index] = exact
    return corrected.view_as(values)


def _in_order(lora: StockLora, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the weights of a LoRA's modules, in the base's order."""
    names = {f"{path}.weight" for path in lora.modules}
    if missing := sorted(names - parameters.keys()):
        raise ValueError(f"{missing[0]}: the base has no such parameter; this LoRA's base is {lora.base!r}")
    return [name for name in parameters if name in names]


def _weight(weight: nn.Parameter, path: str, lora: StockLora, transposed: bool) -> nn.Parameter:
    """The base's weight, which the factors must fit."""
    a_RI, b_OR = lora.modules[path]
    expected, stored = (b_OR.shape[0], a_RI.shape[1]), tuple(weight.shape[::-1] if transposed else weight.shape)
    if stored != expected:
        raise ValueError(f"{path}: the LoRA fits a weight of shape {list(expected)}, the base has {list(stored)}: another base")
    return weight
