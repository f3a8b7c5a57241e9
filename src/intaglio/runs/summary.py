"""The record of a finished run: run.json, and the pictures beside it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import write_whole
from ..model.peft_layers import model_size
from . import folder

if TYPE_CHECKING:
    from .train import Run

__all__ = ["report", "summary"]


def summary(
    run: Run,
    data: dict[str, Any],
    training: dict[str, Any],
    adapter: Path,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
) -> dict[str, Any]:
    """What run.json holds; the answers are written beside it."""
    if run.answers:
        lines = (json.dumps(record, default=str) for record in run.answers)
        (run.output / folder.ANSWERS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    total, trained = model_size(run.model), sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    entries = trained if run.tuner is None else run.tuner.selection.size
    return {
        "output": str(run.output),
        "config": run.config.model_dump(mode="json"),
        "versions": _versions(),
        "machine": {"processor": platform.machine(), "system": platform.system(), "device": str(run.model.device)},
        "trainable": {"entries": entries, "of": total, "share": entries / total},
        "adapter": {"path": str(adapter), "bytes": sum(f.stat().st_size for f in adapter.iterdir())},
        "data": data,
        "training": training,
        "before": before,
        "after": after,
    }


def report(output: Path, result: dict[str, Any]) -> None:
    """Write run.json, and the pictures."""
    from ..report.plots import plot_accuracy, plot_loss

    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / folder.RESULT, (json.dumps(result, indent=1, default=str) + "\n").encode())
    plot_loss(result["training"]["history"], output / folder.LOSS)
    if result["after"] is not None:
        plot_accuracy(result["before"], result["after"], output / folder.ACCURACY)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("intaglio", "torch", "transformers", "peft", "trl", "accelerate", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
