"""Heat maps of an adapter: one panel per projection, layers down, heads or channels across."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from ..core.entries import Entries, Slices
from .plots import colour_bar, save

__all__ = ["COLOURS", "Panel", "density_panel", "plot_selection", "position_panel"]

_BINS = 128
_COLUMNS = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3}  # number of panels → side by side; 4 beyond
# One hue from light to dark: the order is readable in grey and to every kind of colour vision.
COLOURS = LinearSegmentedColormap.from_list("chosen", ["#eef2f5", "#a9cbdd", "#3b8db5", "#0b5f86", "#06304a"])

Layers = Mapping[int, Sequence[Entries]]


@dataclass(frozen=True)
class Panel:
    """One picture: the share chosen, fp32 `[layers, positions]`, and what the positions are.

    Attributes:
        title: name of the projection.
        share: chosen of all, per layer and position.
        axis: label of the positions.
        span: how many heads, blocks or channels the positions cover.
        names: labels of the positions, where they have names.
    """

    title: str
    share: Tensor
    axis: str
    span: int
    names: tuple[str, ...] = ()

    @property
    def is_binary(self) -> bool:
        """Whether every position is chosen or not, with nothing between."""
        return bool(((self.share == 0) | (self.share == 1)).all())


def plot_selection(projections: Mapping[str, Layers], blocks: Mapping[str, int], title: str, path: Path) -> Path:
    """Draw the chosen heads, blocks or channels per layer; scattered entries as their share per layer and projection.

    Args:
        projections: projection → layer → chosen entries, in the order of the panels.
        blocks: projection → width of the blocks that its slices form (1 for single ones), for those made of slices
            along one dimension; the others are drawn by their share.
        title: of the whole picture.
        path: of the PNG.

    Returns:
        The path.
    """
    depth = 1 + max(layer for layers in projections.values() for layer in layers)
    panels = [position_panel(name, projections[name], depth, blocks[name]) for name in projections if name in blocks]
    rest = {name: layers for name, layers in projections.items() if name not in blocks}
    if rest:
        panels.append(density_panel(rest, depth))
    columns = _COLUMNS.get(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    height = min(7.0, 1.5 + 0.11 * max(depth, 8))
    figure = Figure(figsize=(max(7.0, 4.6 * columns), rows * height + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr]
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, place in zip(panels, axes, strict=False):
        _draw(figure, place, panel)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return save(figure, path, dpi=130)


def position_panel(name: str, layers: Layers, depth: int, block: int) -> Panel:
    """Share chosen along the selected dimension: per head or block, or per channel in at most 128 bins.

    Args:
        name: of the projection.
        layers: layer → slices, all along one dimension of one width.
        depth: number of layers.
        block: width of the blocks that the slices form; 1 for single channels.
    """
    first = next(iter(layers.values()))[0]
    assert isinstance(first, Slices)
    width = first.shape[first.dim]
    units = width // block
    bins = min(_BINS, units)
    share = torch.zeros(depth, bins)
    sizes = (-(-torch.arange(bins + 1) * units // bins)).diff() * block  # positions in each bin
    for layer, cell in layers.items():
        for entries in cell:
            assert isinstance(entries, Slices)
            share[layer] += torch.bincount(entries.index.cpu() // block * bins // units, minlength=bins) / sizes / len(cell)
    if block > 1:
        what = f"{'head' if 'att' in name else 'block'} ({block} wide)"
    else:
        together = f" ({round(units / bins)} per cell)" if units > bins else ""
        what = f"{'column' if first.dim == len(first.shape) - 1 else 'row'} of the weight{together}"
    return Panel(name, share, what, units)


def density_panel(projections: Mapping[str, Layers], depth: int) -> Panel:
    """Share chosen of every weight: layers × projections."""
    share = torch.zeros(depth, len(projections))
    for column, layers in enumerate(projections.values()):
        for layer, cell in layers.items():
            share[layer, column] = sum(e.count for e in cell) / sum(e.numel for e in cell)
    return Panel("share of each weight", share, "", len(projections), tuple(projections))


def _draw(figure: Figure, axes: Any, panel: Panel) -> None:
    depth, bins = panel.share.shape
    named = bool(panel.names)
    # Blocks and names are counted from 0 at the middle of a cell, binned channels from the edge.
    left, right = (-0.5, bins - 0.5) if bins == panel.span else (0, panel.span)
    top = 1.0 if panel.is_binary else max(panel.share.max().item(), 1e-9)
    image = axes.imshow(
        panel.share.numpy(), aspect="auto", interpolation="nearest", cmap=COLOURS, vmin=0, vmax=top,
        extent=(left, right, depth - 0.5, -0.5),
    )  # fmt: skip
    axes.set_title(panel.title, fontsize=11)
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel(panel.axis + (", dark = chosen" if panel.is_binary and not named else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if named:
        axes.set_xticks(range(bins), panel.names, rotation=30, ha="right", rotation_mode="anchor")
    if bins <= 64:  # a fine grid keeps single heads apart
        axes.set_xticks([i + 0.5 for i in range(bins - 1)] if bins > 1 else [], minor=True)
        axes.tick_params(which="minor", length=0)
        axes.set_yticks([i + 0.5 for i in range(depth - 1)] if 1 < depth <= 100 else [], minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if not panel.is_binary or named:
        percent = PercentFormatter(1.0, decimals=0 if top >= 0.1 else 1 if top >= 0.01 else None, symbol=" %")
        colour_bar(figure, image, axes, fraction=0.05, pad=0.02, format=percent, label="share chosen")
