"""A LoRA without its unimportant layers, and what each layer is worth on held-out data.

A record is what `RotationRecord.save` returns, and `rotation_record.read` reads from a run's `layers.json`.
"""

from __future__ import annotations

import csv
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ..adapter.folder import WEIGHTS, read_config
from ..adapter.names import PREFIX, changes_base
from ..core.probe import Probe, batch_on, label_count
from ..method_kinds.fields import count
from ..model import peft_layers as adapters
from ..model.calibration import quiet
from ..training.rotation_record import ranking
from .lora_folder import read_tensors
from .staging import mark, staged

__all__ = ["TABLE", "check_prunable", "losses", "most_important", "prune"]

TABLE = "pruning.csv"
_LORA = ".lora_"


def check_prunable(folder: Path, record: Mapping[str, Any], k: int) -> None:
    """Refuse what `prune` would refuse, before any weights are read.

    Raises:
        ValueError: as `prune`.
    """
    most_important(record, k)
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder}: holds a {kind} adapter; prune takes layers out of LoRA adapters")
    if config.get("target_parameters"):
        raise ValueError(f"{folder}: target_parameters (experts in one tensor) cannot be confined to layers; not supported")
    if start := changes_base(config):
        raise ValueError(
            f"{folder}: init_lora_weights={start!r} has changed the base's weights, so that a layer without its adapter is not "
            "the base's; train with the default initialisation to prune"
        )


def prune(
    adapter: str | Path | PeftModel,
    record: Mapping[str, Any],
    k: int,
    output: str | Path,
    *,
    probe: Probe | None = None,
    counts: Iterable[int] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an ordinary PEFT folder of a LoRA that holds only its k most important layers.

    What lies outside the layers (a LoRA on the head, modules_to_save) stays. The result equals the whole adapter with that of
    all other layers switched off, bit for bit.

    Args:
        adapter: folder of a LoRA, or a PeftModel with it as its active adapter.
        record: of the run that trained it, with IST.
        k: layers to keep, from 1 to all.
        output: the new folder; beside the adapter `pruning.csv`, where there is a probe.
        probe: held-out data for the loss with fewer and fewer layers; the adapter must then be a PeftModel. Default none.
        counts: numbers of layers for which the loss is taken; default all down to 1.
        overwrite: replace an earlier result in `output`; default False.

    Returns:
        path, layers (paths of those kept), total (of all), tensors, entries, bytes of the weights, `of_bytes` before, and
        `losses`, as `losses` gives them (none without a probe).

    Raises:
        ValueError: for k out of range, a run that learned no importance, an adapter that is no LoRA, is another run's or
            also trains whole modules or biases in the layers, or an output folder that holds something else.

    Example:
        >>> prune("runs/ist/adapter", read(Path("runs/ist/layers.json")), 8, "runs/ist/pruned-8")["layers"]
        ['model.layers.3', …]
    """
    if probe is not None and not isinstance(adapter, PeftModel):
        raise ValueError("prune: the loss needs a model; give the PeftModel instead of a folder, or no probe")
    with _folder_of(adapter) as source:
        check_prunable(source, record, k)
        tensors = read_tensors(source / WEIGHTS)
        kept, config = _confined(tensors, source, record, most_important(record, k))
        table = [] if probe is None else losses(cast(PeftModel, adapter), record, probe, counts)
        with staged(output, overwrite=overwrite) as folder:
            config.save_pretrained(str(folder))
            safetensors.torch.save_file(kept, folder / WEIGHTS, {"format": "pt"})
            if (source / "README.md").is_file():
                shutil.copyfile(source / "README.md", folder / "README.md")
            result = {
                "path": str(output),
                "layers": [record["layers"][place] for place in sorted(most_important(record, k))],
                "total": len(record["layers"]),
                "tensors": len(kept),
                "entries": sum(tensor.numel() for tensor in kept.values()),
                "bytes": (folder / WEIGHTS).stat().st_size,
                "of_bytes": (source / WEIGHTS).stat().st_size,
                "losses": table,
            }
            if table:
                _write_table(table, folder / TABLE)
            mark(folder, {"form": "pruned", **result})
    return result


def losses(
    model: PeftModel, record: Mapping[str, Any], probe: Probe, counts: Iterable[int] | None = None
) -> list[dict[str, Any]]:
    """The loss with the adapter in the k most important layers only, for several k; the model is left as it was.

    Args:
        model: with the trained adapter active.
        record: of its run.
        probe: whose batches are all used, each by its number of labels.
        counts: the k; default all layers, then one fewer each time, down to 1.

    Returns:
        A row per k: `layers` (k), `loss`, and `last`, the least important layer kept.

    Raises:
        ValueError: for k out of range, or a model that has no adapter in one of the layers.
    """
    total = len(record["layers"])
    order = most_important(record, total)
    chosen = list(range(total, 0, -1) if counts is None else counts)
    for k in chosen:
        most_important(record, k)
    places = [_adapters_in(model, path) for path in record["layers"]]
    device = next(model.parameters()).device
    table = []
    with quiet(model), torch.no_grad():
        for k in chosen:
            idle = [layer for place in order[k:] for layer in places[place]]
            with adapters.damped(idle, 0.0):
                loss = _mean_loss(model, probe, device)
            table.append({"layers": k, "loss": loss, "last": record["layers"][order[k - 1]]})
    return table


def most_important(record: Mapping[str, Any], k: int) -> list[int]:
    """Places of the k most important layers in `record["layers"]`, the most important first.

    Raises:
        ValueError: for k out of range, or a run that learned no importance.
    """
    order = ranking(record)
    if count("layers", k) or k > len(order):
        raise ValueError(f"layers={k!r}: give a whole number from 1 to {len(order)}, the layers of this run")
    return order[:k]


@contextmanager
def _folder_of(adapter: str | Path | PeftModel) -> Any:
    if not isinstance(adapter, PeftModel):
        yield Path(adapter)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield adapters.save(adapter, Path(temporary) / "adapter")


def _confined(
    tensors: Mapping[str, Tensor], source: Path, record: Mapping[str, Any], best: list[int]
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The tensors of the best layers and of what is in no layer, and the config that asks for just these."""
    layer_of = {name: _layer_of(name, record["layers"]) for name in tensors}
    for name, place in layer_of.items():
        if place is not None and _LORA not in name:
            raise ValueError(f"{source}: {name} is no part of a LoRA but lies in a layer; prune cannot leave its like out")
    absent = set(range(len(record["layers"]))) - set(layer_of.values())
    if absent:
        raise ValueError(
            f"{source}: holds nothing in {record['layers'][min(absent)]}; it is not the adapter of this record's run"
        )
    kept = {name: tensor for name, tensor in tensors.items() if layer_of[name] is None or layer_of[name] in best}
    every, wanted = ([_module(n) for n in names if _LORA in n] for names in (tensors, kept))
    config = PeftConfig.from_pretrained(str(source))
    assert isinstance(config, LoraConfig)
    if len(best) < len(record["layers"]):
        _confine(config, record, best, set(every), set(wanted))
    return kept, config


def _confine(config: LoraConfig, record: Mapping[str, Any], best: list[int], every: set[str], wanted: set[str]) -> None:
    """Narrow a config from the modules `every` to `wanted`: by layers_to_transform, or where that cannot say it by names."""
    layers = [record["layers"][place] for place in best]
    stack = layers[0].rpartition(".")[0].rpartition(".")[2]
    numbers = sorted(int(path.rpartition(".")[2]) for path in layers if path.rpartition(".")[2].isdigit())
    if isinstance(config.target_modules, (list, set)):
        for pattern in (None, stack):
            config.layers_to_transform, config.layers_pattern = numbers, pattern or None
            if {name for name in every if check_target_module_exists(config, name) is True} == wanted:
                break
        else:
            config.layers_to_transform = config.layers_pattern = None
    if config.layers_to_transform is None:
        config.target_modules = wanted  # type: ignore[assignment]  # LoraConfig makes a set of any list itself
    for key in ("rank_pattern", "alpha_pattern"):
        # PEFT warns of a pattern that matches nothing.
        fits = {p: v for p, v in getattr(config, key).items() if any(re.match(rf"(.*\.)?({p})$", name) for name in wanted)}
        setattr(config, key, fits)


def _layer_of(name: str, layers: Sequence[str]) -> int | None:
    path = name.removeprefix(PREFIX)
    return next((place for place, layer in enumerate(layers) if path.startswith(f"{layer}.")), None)


def _module(name: str) -> str:
    return name.removeprefix(PREFIX).partition(_LORA)[0]


def _adapters_in(model: PeftModel, path: str) -> list[tuple[nn.Module, set[str]]]:
    prefix = f"{PREFIX}{path}."
    held = [p for name, p in model.named_parameters() if name.startswith(prefix) and _LORA in name]
    active = set(model.active_adapters)
    found = [(layer, names & active) for layer, names in adapters.adapters_of(model, held).values() if names & active]
    if not found:
        raise ValueError(f"{path}: the model has no active LoRA there; it is not the one of this record's run")
    return found


def _mean_loss(model: PeftModel, probe: Probe, device: torch.device) -> float:
    total = labels = 0.0
    for batch in probe.batches():
        batch = batch_on(batch, device)
        own = label_count(model, batch)
        total, labels = total + float(probe.loss(model, batch)) * own, labels + own
    if not labels:
        raise ValueError("prune: the probe has no labels to take a loss on; give it data")
    return total / labels


def _write_table(table: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
