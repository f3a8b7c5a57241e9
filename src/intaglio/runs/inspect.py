"""The command `inspect`: what an adapter changes, where, and what it shares with another one; no model is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from ..adapter.delta import Delta
from ..adapter.folder import CONFIG, PEFT_TYPE, WEIGHTS, read_config
from ..core.entries import Entries, Slices
from ..core.selection import Selection
from ..training import rotation_record, unmasking_record
from .folder import LAYERS, LAYERS_PICTURE, LAYERS_TABLE, SELECTION_PICTURE, UNMASKING, UNMASKING_PICTURE, adapter_of

__all__ = ["grid", "inspect"]

_LAYERS = 10_000  # more than any model has
_LAYERED = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<path>.+?)(?:\.weight)?")


@dataclass(frozen=True)
class _Place:
    """The place of a parameter: in which layer of which stack, and as which projection there."""

    layer: int
    projection: str  # the path inside the layer, e.g. "self_attn.q_proj"; with the stack where a model has several


def inspect(path: Path, *, other: Path | None = None, output: Path | None = None) -> dict[str, Any]:
    """Count what an adapter changes, draw it, and compare it with another one.

    PEFT's own adapters are known by what their run has recorded, where their layers trained in turn.

    Args:
        path: an adapter folder, or the folder of a finished run.
        other: a second one; default None.
        output: the picture (a name that ends in .png) or a folder for it; default `path`.

    Returns:
        method, base, bytes, entries, `of` and `share` of the model (None where unknown), `projections` (per projection
        its kind, entries and chosen slices per layer), `other` parameters, `picture`, with `other` the `overlap`, and for
        a run that chose while it trained `unmasking`: updates, entry updates, overlaps, entries per kind, its picture; and
        for one whose layers trained in turn `layers`: updates, probes, a row per layer, its picture and CSV file.

    Raises:
        ValueError: for a missing or damaged adapter, a picture that is no .png, adapters of different models, or an
            adapter of PEFT's that is to be compared.

    Example:
        >>> inspect(Path("runs/demo"))["projections"]["mlp.down_proj"]["least"]
        46
    """
    picture = _picture_path(path, output)
    adapter, run = adapter_of(path)
    record = None if run is None else rotation_record.read(path / LAYERS)
    if record is not None and read_config(adapter).get("peft_type") != PEFT_TYPE:
        if other is not None:
            raise ValueError(f"with={str(other)!r}: {adapter} is PEFT's own adapter, which has no chosen entries to compare")
        return _peft_summary(path, adapter, record, run) | _layers(record, picture.parent)
    delta = Delta.load(adapter)
    overlap = None if other is None else _overlap(delta, Delta.load(adapter_of(other)[0]))
    projections, rest = grid(delta.selection)
    unmasking = _unmasking(path, picture.with_name(UNMASKING_PICTURE)) if run is not None else {}
    figures = {"method": delta.method, "base": delta.base, "bytes": delta.nbytes, "parameters": len(delta.selection)}
    result = _summary(path, run, figures, delta.selection.size, of=delta.of) | {
        "projections": {name: _counts(layers) for name, layers in projections.items()},
        "other": rest,
        "picture": None,
        **unmasking,
        **({} if record is None else _layers(record, picture.parent)),
    }
    if projections:
        from ..report.heatmap import plot_selection

        title = f"{delta.method.get('name', 'adapter')}: {delta.selection.size:,} chosen weights"
        share = "" if result["share"] is None else f" = {result['share']:.2%} of the model"
        blocks = {name: figures["block"] for name, figures in result["projections"].items() if "block" in figures}
        picture.parent.mkdir(parents=True, exist_ok=True)
        result["picture"] = str(plot_selection(projections, blocks, title + share, picture))
    return result if overlap is None else result | {"with": str(other), "overlap": overlap}


def _layers(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The figures, the picture and the table of a run's record of its layers."""
    from ..report.layers import plot_layers

    folder.mkdir(parents=True, exist_ok=True)
    figures = {key: record[key] for key in ("method", "updates", "probes", "skipped", "seconds")}
    picture = plot_layers(record, folder / LAYERS_PICTURE)
    table = rotation_record.to_csv(record, folder / LAYERS_TABLE)
    return {"layers": figures | {"rows": rotation_record.rows(record), "picture": str(picture), "table": str(table)}}


def _peft_summary(path: Path, adapter: Path, record: Mapping[str, Any], run: Mapping[str, Any] | None) -> dict[str, Any]:
    """The figures of an adapter that PEFT wrote: all of its tensors are trained."""
    try:
        with safetensors.safe_open(adapter / WEIGHTS, "pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118  # no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{adapter / WEIGHTS}: missing, damaged or truncated ({error})") from error
    figures = {
        "method": record["method"],
        "base": read_config(adapter).get("base_model_name_or_path"),
        "bytes": sum((adapter / name).stat().st_size for name in (CONFIG, WEIGHTS)),
        "parameters": len(sizes),
    }
    return _summary(path, run, figures, sum(sizes)) | {"projections": {}, "other": {}, "picture": None}


def _unmasking(path: Path, picture: Path) -> dict[str, Any]:
    """The figures and the picture of a run's record of unmasking; none where the method chose before training."""
    record = unmasking_record.read(path / UNMASKING)
    if record is None or not record["chosen"]:
        return {}
    from ..report.growth import plot_growth

    places = places_of({name: len(shape) for name, shape in record["shapes"].items()})
    kinds: dict[str, list[int]] = {}
    layers: dict[int, list[int]] = {}
    for name, counts in record["chosen"].items():
        kind = places[name].projection if name in places else re.sub(r"\.\d+\.", ".*.", name)
        _add(kinds, kind, counts)
        if match := re.search(r"\.(\d+)\.", name):
            _add(layers, int(match[1]), counts)
    title = f"{record['touched']:,} entries unmasked in {record['updates']:,} updates"
    picture.parent.mkdir(parents=True, exist_ok=True)
    shown = str(plot_growth(record["at"], kinds, layers, title, picture))
    figures = {key: record[key] for key in ("updates", "budget", "trained", "touched", "writes", "overlap")}
    return {"unmasking": figures | {"kinds": {kind: counts[-1] for kind, counts in kinds.items()}, "picture": shown}}


def _add(totals: dict[Any, list[int]], key: Any, counts: list[int]) -> None:
    totals[key] = [a + b for a, b in zip(totals[key], counts, strict=True)] if key in totals else list(counts)


def grid(selection: Selection) -> tuple[dict[str, dict[int, list[Entries]]], dict[str, dict[str, Any]]]:
    """Sort parameters into layers × projections.

    Returns:
        (projection → layer → entries, everything else: name with layers as `*` → kind, parameters, entries).
        A cell holds several entries where a layer has several such weights (experts).
    """
    places = places_of({name: len(entries.shape) for name, entries in selection.items()})
    projections: dict[str, dict[int, list[Entries]]] = {}
    rest: dict[str, dict[str, Any]] = {}
    for name, entries in selection.items():
        if name in places:
            place = places[name]
            projections.setdefault(place.projection, {}).setdefault(place.layer, []).append(entries)
            continue
        record = rest.setdefault(re.sub(r"\.\d+\.", ".*.", name), {"kind": entries.kind, "parameters": 0, "entries": 0})
        record["parameters"] += 1
        record["entries"] += entries.count
    return {name: projections[name] for name in sorted(projections, key=_order(places).__getitem__)}, rest


def _order(places: Mapping[str, _Place]) -> dict[str, int]:
    """Projection → its place inside a layer, as the model lists them; layers may lack some."""
    order: dict[str, int] = {}
    seen: dict[tuple[int, str], None] = dict.fromkeys((place.layer, place.projection) for place in places.values())
    ranks: dict[int, int] = {}
    for layer, projection in seen:
        order[projection] = max(order.get(projection, 0), ranks.get(layer, 0))
        ranks[layer] = ranks.get(layer, 0) + 1
    return order


def places_of(dims: Mapping[str, int]) -> dict[str, _Place]:
    """The matrices of a stack of layers, by parameter name and number of dimensions; norms, biases, embeddings are none."""
    found = {n: m for n, dim in dims.items() if dim > 1 and (m := _LAYERED.fullmatch(n))}
    stacks = {match["stack"] for match in found.values()}
    places = {}
    for name, match in found.items():
        path = re.sub(r"\.\d+(?=\.|$)", ".*", match["path"])  # experts of one layer together
        if int(match["layer"]) >= _LAYERS:
            raise ValueError(f"{name}: layer {int(match['layer']):,}: no model has so many; the adapter is damaged")
        places[name] = _Place(int(match["layer"]), path if len(stacks) == 1 else f"{match['stack']}: {path}")
    return places


def _summary(
    path: Path, run: Mapping[str, Any] | None, figures: Mapping[str, Any], entries: int, of: int | None = None
) -> dict[str, Any]:
    of = of or (run or {}).get("trainable", {}).get("of")
    return {"path": str(path), **figures, "entries": entries, "of": of, "share": entries / of if of else None}


def _counts(layers: Mapping[int, list[Entries]]) -> dict[str, Any]:
    """One projection's figures; `chosen` counts slices, or entries where it is not made of slices."""
    every = [entries for cell in layers.values() for entries in cell]
    sliced = [entries for entries in every if isinstance(entries, Slices)]
    by_slice = len(sliced) == len(every)
    chosen = {layer: sum(_size(entries, by_slice) for entries in cell) for layer, cell in sorted(layers.items())}
    figures: dict[str, Any] = {"kind": every[0].kind if len({e.kind for e in every}) == 1 else "mixed"}
    if by_slice and len({(entries.dim, entries.shape) for entries in sliced}) == 1:
        dim, shape = sliced[0].dim, sliced[0].shape
        along = "columns" if dim == len(shape) - 1 else "rows"
        figures |= {"along": along, "width": shape[dim], "block": _block_width(sliced)}
    figures |= {"entries": sum(e.count for e in every), "share": sum(e.count for e in every) / sum(e.numel for e in every)}
    return figures | {"least": min(chosen.values()), "most": max(chosen.values()), "chosen": chosen}


def _size(entries: Entries, by_slice: bool) -> int:
    return entries.index.numel() if by_slice and isinstance(entries, Slices) else entries.count


def _block_width(sliced: Iterable[Slices]) -> int:
    """The greatest width w such that all chosen slices form aligned blocks of w, e.g. head_dim; 1 for single ones."""
    width = 0
    for entries in sliced:
        index = entries.index.tolist()
        starts = [i for i, before in zip(index, [-2, *index], strict=False) if i != before + 1]
        ends = [i + 1 for i, after in zip(index, [*index[1:], -2], strict=True) if after != i + 1]
        width = math.gcd(width, entries.shape[entries.dim], *starts, *ends)
    return width


def _overlap(one: Delta, two: Delta) -> dict[str, Any]:
    """Entries that both adapters change, in all and per projection."""
    both: dict[str, int] = {}
    for name in one.selection.keys() & two.selection.keys():
        if one.selection[name].shape != two.selection[name].shape:
            shapes = f"{list(one.selection[name].shape)} and {list(two.selection[name].shape)}"
            raise ValueError(f"{name}: shapes {shapes}: these are adapters of different models")
        both[name] = Selection({name: one.selection[name]}).overlap({name: two.selection[name]})
    places = places_of({name: len(entries.shape) for name, entries in one.selection.items()})
    projections: dict[str, int] = {}
    for name, count in both.items():
        key = places[name].projection if name in places else "other"
        projections[key] = projections.get(key, 0) + count
    entries = sum(both.values())
    shares = {"share": entries / one.selection.size, "share_of_other": entries / two.selection.size}
    return {"entries": entries, **shares, "disjoint": entries == 0, "projections": dict(sorted(projections.items()))}


def _picture_path(path: Path, output: Path | None) -> Path:
    if output is None:
        return path / SELECTION_PICTURE
    if output.suffix == ".png":
        return output
    if output.suffix and not output.is_dir():
        raise ValueError(f"output {str(output)!r}: pictures are PNG; give a name that ends in .png, or a folder")
    return output / SELECTION_PICTURE
