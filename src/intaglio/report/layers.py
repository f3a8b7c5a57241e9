"""Pictures of layers in turn: what was learned about each, when it trained, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter
from torch import Tensor

from .heatmap import COLOURS
from .plots import colour_bar, save

__all__ = ["plot_layers"]

# Blue is what the other pictures show much of; importance has a sign, and none at the start is near white.
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#8c3b16", "#dd9a6d", "#f4f4f2", "#6fadcb", "#06405e"])
_LABELS = 40  # layers beyond this are labelled at intervals, and have no number beside them


def plot_layers(record: Mapping[str, Any], path: Path) -> Path:
    """Draw importance per layer over the updates (where the method learns any), the active layers, and visits.

    Args:
        record: as `RotationRecord.save` gives it.
        path: of the PNG.

    Returns:
        The path.
    """
    total, learned = len(record["layers"]), record["importance"] is not None
    widths = [5.2, 4.8, 3.0] if learned else [6.2, 3.4]
    height = min(12.0, 2.0 + max(2.6, 0.2 * total))
    figure = Figure(figsize=(sum(widths) + 0.4, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr]
    panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    if learned:
        _draw_importance(figure, panels[0], record)
    _draw_trained(figure, panels[-2], record)
    _draw_visits(panels[-1], record)
    for axes in panels:
        _name_layers(axes, record["layers"], first=axes is panels[0])
    figure.suptitle(_title(record), fontsize=13, fontweight="bold")
    return save(figure, path, dpi=130)


def _title(record: Mapping[str, Any]) -> str:
    name = str(record["method"].get("name", "layers in turn")).upper()
    at_once = sum(record["visits"]) / max(record["updates"], 1)
    probes = f", {record['probes']:,} probes" if record["importance"] is not None else ""
    return f"{name}: {at_once:.0f} of {len(record['layers'])} layers at a time, {record['updates']:,} updates{probes}"


def _draw_importance(figure: Figure, axes: Any, record: Mapping[str, Any]) -> None:
    """Importance after each probe, over the updates before it; at the end it stays as it is."""
    steps = [step for step, _ in record["learned"]]
    bounds, values = [0, *steps], [importance for _, importance in record["learned"]]
    if not steps or steps[-1] < record["updates"]:
        bounds, values = [*bounds, max(record["updates"], 1)], [*values, record["importance"]]
    most = max(1e-9, *(abs(value) for row in values for value in row))
    _draw_map(figure, axes, bounds, torch.tensor(values), _SIGNED, (-most, most), "importance")
    axes.set_title("importance learned, higher = more important", fontsize=11)
    if len(record["layers"]) <= _LABELS:
        axes.text(1.015, 1.0, "end", transform=axes.transAxes, fontsize=8, va="bottom", color="#555555")
        for layer, value in enumerate(record["importance"]):
            axes.text(
                1.015, layer, f"{value:+.2f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8,
                fontfamily="monospace", clip_on=False,
            )  # fmt: skip


def _draw_trained(figure: Figure, axes: Any, record: Mapping[str, Any]) -> None:
    bounds, share = record["trained"]["at"], torch.tensor(record["trained"]["share"])
    if not len(share):
        bounds, share = [0, 1], torch.zeros(1, len(record["layers"]))
    binary = bool(((share == 0) | (share == 1)).all())
    _draw_map(figure, axes, bounds, share, COLOURS, (0, 1), None if binary else "share of updates")
    axes.set_title("layers that train, dark = training" if binary else "layers that train", fontsize=11)


def _draw_map(
    figure: Figure, axes: Any, bounds: list[int], values_TL: Tensor, colours: Any, limits: tuple[float, float], label: str | None
) -> None:
    """Layers down, updates across, each column as wide as its period."""
    edges = [layer - 0.5 for layer in range(values_TL.shape[1] + 1)]
    mesh = axes.pcolormesh(bounds, edges, values_TL.T.numpy(), cmap=colours, vmin=limits[0], vmax=limits[1], rasterized=True)
    axes.hlines(edges[1:-1], bounds[0], bounds[-1], color="white", linewidth=0.8)
    axes.set(xlabel="update", xlim=(bounds[0], bounds[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if label is not None:
        percent = PercentFormatter(1.0, decimals=0, symbol=" %") if "share" in label else None
        # Below the map, so that the final values stand right beside their rows.
        options = {"location": "bottom", "fraction": 0.045, "pad": 0.01, "aspect": 40}
        colour_bar(figure, mesh, axes, label=label, format=percent, **options)


def _draw_visits(axes: Any, record: Mapping[str, Any]) -> None:
    visits = record["visits"]
    equal = sum(visits) / len(visits)
    axes.barh(range(len(visits)), visits, height=0.8, color="#3b8db5")
    axes.axvline(equal, color="#c0562f", linewidth=1.5, linestyle="--")
    most = max(*visits, equal, 1)
    share = f"equal share: {equal:,.0f}" if equal >= 10 else f"equal share: {equal:,.1f}"
    axes.set_title(f"updates that trained it\n(– – {share})", fontsize=11)
    axes.set(xlabel="updates", xlim=(0, 1.18 * most))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    if len(visits) <= _LABELS:
        for layer, count in enumerate(visits):
            axes.text(
                count + 0.02 * most, layer, f"{count:,}", va="center", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip


def _name_layers(axes: Any, layers: list[str], *, first: bool) -> None:
    """Layer 0 on top; by number, or by path where the model has several stacks."""
    stacks = {layer.rpartition(".")[0] for layer in layers}
    names = [layer.rpartition(".")[2] if len(stacks) == 1 else layer for layer in layers]
    every = max(1, -(-len(layers) // _LABELS))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.yaxis.set_major_locator(FixedLocator(list(range(0, len(layers), every))))
    axes.set_yticks(range(0, len(layers), every), names[::every] if first or len(stacks) == 1 else [])
    axes.tick_params(axis="y", length=0, labelsize=8)
    if first:
        axes.set_ylabel("layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
