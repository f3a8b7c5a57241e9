"""A record of a run whose layers trained in turn: which layers trained when, and what was learned about them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from ..adapter.names import PREFIX
from ..core.files import are_numbers, is_number, read_mapping
from ..model.peft_layers import is_peft

if TYPE_CHECKING:
    from .rotation import Rotation

__all__ = ["FILE", "RotationRecord", "ranking", "read", "rows", "to_csv"]

FILE, _POINTS = "layers.json", 200
_KINDS: dict[str, type | tuple[type, ...]] = {
    "layers": list,
    "method": dict,
    "updates": int,
    "probes": int,
    "skipped": int,
    "seconds": (int, float),
    "importance": (list, type(None)),
    "visits": list,
    "learned": list,
    "draws": list,
    "trained": dict,
}


@final
class RotationRecord:
    """A record of a run whose layers train in turn.

    Args:
        rotation: of the run.
    """

    def __init__(self, rotation: Rotation) -> None:
        self._rotation = rotation

    def save(self, folder: Path) -> dict[str, Any]:
        """Write `layers.json` into the folder of a run, and return it.

        However long the run, at most 200 moments of it are kept, evenly spread; visits and importance at the end are exact.

        Returns:
            layers: module path of each layer, as in the base model.
            method: fields of the method.
            updates, probes, skipped, seconds (of probes, in this process).
            importance: per layer, higher is more important; None where the method learns none.
            visits: updates in which each layer was trained.
            learned: `[update, importance per layer]` after each probe.
            draws: `[update, layers that train from then on]`.
            trained: at: updates that bound the periods, from 0; share: per period and layer, of its updates that trained it.

        Example:
            >>> record = tuner.rotation.recorder().save(Path("runs/demo"))
        """
        rotation, method, history = self._rotation, self._rotation.method, self._rotation.history
        prefix = PREFIX if is_peft(rotation.model) else ""
        updates = sum(rotation.visits) // method.active_count(len(rotation.layers))
        record = {
            "layers": [path.removeprefix(prefix) for path in rotation.layers.paths],
            "method": method.to_dict(),
            "updates": updates,
            "probes": rotation.probes,
            "skipped": rotation.skipped,
            "seconds": rotation.seconds,
            "importance": rotation.importance.tolist() if method.learns else None,
            "visits": list(rotation.visits),
            "learned": [[step, list(importance)] for step, importance, *_ in _thinned(history["probes"])],
            "draws": [[step, list(active)] for step, active in _thinned(history["draws"])],
            "trained": _shares(history["draws"], updates, len(rotation.layers)),
        }
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        (folder / FILE).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        return record


def read(path: Path) -> dict[str, Any] | None:
    """The record of a run; None where there is none.

    Raises:
        ValueError: where it is damaged.
    """
    if not path.is_file():
        return None
    record = read_mapping(path)
    problem = _problem(record)
    if problem is not None:
        raise ValueError(f"{path}: damaged, {problem}")
    return record


def ranking(record: Mapping[str, Any]) -> list[int]:
    """Positions of the layers in `record["layers"]`, the most important first; the lower one where two are equal.

    Raises:
        ValueError: where the run has learned no importance.
    """
    importance = record["importance"]
    if importance is None:
        name = record["method"].get("name", "the method")
        raise ValueError(f"{name} draws layers at random and learns no importance, so that none is first; train with ist")
    if record["probes"] == record["skipped"]:
        made = f"{record['probes']} probes, {record['skipped']} of which gave no finite loss"
        raise ValueError(f"no importance was learned yet ({made}); train for longer, or with a smaller method.interval")
    return sorted(range(len(importance)), key=lambda layer: -importance[layer])


def rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per layer, in the model's order: layer, importance, rank (1: the most important), visits, share of updates.

    Importance and rank are None where none was learned.
    """
    total, importance = len(record["layers"]), record["importance"]
    learned = importance is not None and record["probes"] > record["skipped"]
    places = {layer: place for place, layer in enumerate(ranking(record), start=1)} if learned else {}
    return [
        {
            "layer": record["layers"][layer],
            "importance": None if importance is None else importance[layer],
            "rank": places.get(layer),
            "visits": record["visits"][layer],
            "share": record["visits"][layer] / max(record["updates"], 1),
        }
        for layer in range(total)
    ]


def to_csv(record: Mapping[str, Any], path: Path) -> Path:
    """Write `rows` as CSV and return the path; what is None is left empty."""
    table = rows(record)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def _thinned(items: Sequence[Any]) -> list[Any]:
    """At most `_POINTS` of some items, evenly spread, the first and the last among them."""
    if len(items) <= _POINTS:
        return list(items)
    return [items[round(i * (len(items) - 1) / (_POINTS - 1))] for i in range(_POINTS)]


def _shares(draws: Sequence[Sequence[Any]], updates: int, total: int) -> dict[str, Any]:
    """The share of its updates in which each layer trained, per period of the run."""
    at = sorted({round(updates * i / _POINTS) for i in range(_POINTS + 1)})
    starts = torch.tensor([step for step, _ in draws])
    active_DL = torch.zeros(len(draws), total, dtype=torch.float64)
    for row, (_, active) in zip(active_DL, draws, strict=True):
        row[active] = 1
    lengths = starts.diff(append=torch.tensor([updates]))
    ends_DL = (active_DL * lengths[:, None]).cumsum(0)
    bounds = torch.tensor(at)
    draw = torch.searchsorted(starts, bounds, right=True) - 1  # the one that holds at each bound
    # From the end of that draw's time back to the bound: counts of updates, exact in fp64.
    until = ends_DL[draw] - active_DL[draw] * ((starts + lengths)[draw] - bounds)[:, None]
    share = until.diff(dim=0) / bounds.diff()[:, None]
    return {"at": at, "share": [[round(value, 4) for value in row] for row in share.tolist()]}


def _problem(record: Any) -> str | None:
    """The first fault of a record; None for a sound one."""
    wrong = [key for key, kind in _KINDS.items() if key not in record or not isinstance(record[key], kind)]
    if wrong:
        return f"{wrong[0]} is missing or of the wrong kind"
    total = len(record["layers"])
    if not total or not all(isinstance(path, str) for path in record["layers"]):
        return "it names no layers"
    checks = {
        "visits": are_numbers(record["visits"], total),
        "importance": record["importance"] is None or are_numbers(record["importance"], total),
        "learned": all(_is_moment(item) and are_numbers(item[1], total) for item in record["learned"]),
        "draws": all(_is_moment(item) and set(item[1]) <= set(range(total)) for item in record["draws"]),
        "trained": _is_trained(record["trained"], total),
    }
    return next((f"{key} does not fit its {total} layers" for key, fits in checks.items() if not fits), None)


def _is_moment(item: Any) -> bool:
    """Whether it is [update, list of numbers]."""
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[1], list):
        return False
    return is_number(item[0]) and are_numbers(item[1])


def _is_trained(trained: Any, total: int) -> bool:
    at, share = trained.get("at"), trained.get("share")
    if not isinstance(at, list) or not isinstance(share, list) or not are_numbers(at, len(share) + 1):
        return False
    return sorted(set(at)) == at and all(are_numbers(row, total) for row in share)
