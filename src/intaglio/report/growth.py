"""The picture of a growing choice: entries unmasked by kind of weight and by layer, over the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .heatmap import COLOURS
from .plots import colour_bar, save

__all__ = ["plot_growth"]

_KINDS = 9  # shown by name; the smallest others together


def plot_growth(
    at: Sequence[int], kinds: Mapping[str, Sequence[int]], layers: Mapping[int, Sequence[int]], title: str, path: Path
) -> Path:
    """Draw entries chosen so far: stacked by kind of weight, and per layer.

    Args:
        at: updates, from 1, at which was counted.
        kinds: kind → entries chosen up to each of them.
        layers: layer → likewise; may be empty.
        title: of the whole picture.
        path: of the PNG.

    Returns:
        The path.
    """
    figure = Figure(figsize=(12 if layers else 7, 4.8), layout="constrained")
    axes = figure.subplots(1, 2 if layers else 1, squeeze=False)[0]
    names = sorted(kinds, key=lambda kind: -kinds[kind][-1])
    shown = {name: list(kinds[name]) for name in names[:_KINDS]}
    if names[_KINDS:]:
        shown["others"] = [sum(column) for column in zip(*(kinds[name] for name in names[_KINDS:]), strict=True)]
    colours = [colormaps["tab20"](i) for i in range(len(shown))]
    start = [0, *at]
    axes[0].stackplot(start, *([0, *counts] for counts in shown.values()), labels=list(shown), colors=colours, step="post")
    axes[0].set(xlabel="update", ylabel="entries unmasked so far", title="by kind of weight", xlim=(0, at[-1]))
    axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles[::-1], labels[::-1], loc="upper left", fontsize=8, frameon=False)
    if layers:
        share = torch.tensor([list(layers[layer]) for layer in sorted(layers)], dtype=torch.float32)
        image = axes[1].imshow(
            share.numpy(), aspect="auto", interpolation="nearest", cmap=COLOURS, vmin=0,
            extent=(0, at[-1], len(layers) - 0.5, -0.5),
        )  # fmt: skip
        axes[1].set(xlabel="update", ylabel="layer", title="by layer")
        axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        colour_bar(figure, image, axes[1], format=StrMethodFormatter("{x:,.0f}"), label="entries unmasked so far")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return save(figure, path)
