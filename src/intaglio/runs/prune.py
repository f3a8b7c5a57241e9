"""A run's LoRA without its unimportant layers, and what each of them is worth on held-out rows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training import rotation_record
from .config import Config
from .folder import read_run
from .load import load, stored_config

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["prune"]


def prune(
    run: Path, layers: int, output: Path | None = None, *, held_out: int = 32, overwrite: bool = False, trust: bool = False
) -> dict[str, Any]:
    """Write an ordinary PEFT folder with the most important layers of a run's LoRA.

    Args:
        run: folder of a finished run whose LoRA was trained with the schedule `ist`.
        layers: how many to keep.
        output: the new folder; default `pruned-N` in the run's.
        held_out: rows on which the loss is taken, with all layers, one fewer, … and one; 0: none, and no model is loaded.
        overwrite: replace an earlier result in `output`; default False.
        trust: as `load.stored_config`.

    Returns:
        What `hf.layers.prune` returns, with `rows`, the held-out rows used.

    Raises:
        ValueError: where `run` is no finished run, its layers were not trained in turn or without learning importance, its
            adapter is no LoRA, or an argument is out of range; all before weights are loaded.

    Example:
        >>> prune(Path("runs/ist"), 8)["path"]
        'runs/ist/pruned-8'
    """
    read_run(run)
    record = rotation_record.read(run / rotation_record.FILE)
    if record is None:
        raise ValueError(
            f"{run}: has no {rotation_record.FILE}, so that nothing is known about its layers; train with a schedule that learns "
            "their importance (ist)"
        )
    if held_out < 0:
        raise ValueError(f"rows={held_out}: give a number of held-out rows, or 0 for no loss")
    target = run / f"pruned-{layers}" if output is None else output
    from ..export import pruned as engine
    from ..export.staging import check_target

    adapter = run / "adapter"
    engine.check_prunable(adapter, record, layers)
    check_target(target, overwrite=overwrite)
    config = stored_config(run, trust=trust) if held_out else None
    rows = None if config is None else _held_out(config, held_out)
    if config is None or rows is None:
        return {"rows": 0, **engine.prune(adapter, record, layers, target, overwrite=overwrite)}
    model, tokenizer = load(config, adapter)
    probe = _probe(config, model, tokenizer, rows)
    return {"rows": len(rows), **engine.prune(model, record, layers, target, probe=probe, overwrite=overwrite)}


def _held_out(config: Config, count: int) -> Dataset | None:
    """Rows that the run has not trained on; None where it held out none."""
    from .data import load_examples

    wanted = config.evaluate is not None or str(config.train.get("eval_strategy", "no")) != "no"
    found = load_examples(config.data, hold_out=wanted).held_out
    return None if found is None else found.select(range(min(count, len(found))))


def _probe(config: Config, model: Any, tokenizer: Any, rows: Dataset) -> Any:
    """The rows as training would have fed them."""
    from ..core.probe import Batches
    from ..hf.trainer import calibration_batches
    from .sft_config import sft_config

    with tempfile.TemporaryDirectory() as temporary:
        arguments = sft_config(config.train, temporary)
        arguments.chat_template_path = None  # it is in the tokenizer now
        return Batches(calibration_batches(model.get_base_model(), rows, args=arguments, processing_class=tokenizer))
