"""The command `evaluate`: a run file's model, or a finished run's, scored on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import EvaluateBlock, load_config
from .folder import ADAPTER
from .load import load, stored_config

__all__ = ["score"]


def score(run: Path, overrides: Sequence[str] = (), adapter: Path | None = None, *, trust: bool = False) -> dict[str, Any]:
    """Score a run file's model, or a finished run's, on held-out examples.

    Args:
        run: a run file, or the folder of a finished run.
        overrides: `block.key=value` on top of its config.
        adapter: folder to apply; default the run folder's own, none for a run file.
        trust: as `load.stored_config`.

    Returns:
        `Score.to_dict()` with `adapter` and `model`.

    Raises:
        ValueError: for a bad run file, missing data, a missing or foreign adapter.
    """
    if run.is_dir():
        config, adapter = stored_config(run, overrides, trust=trust), adapter or run / ADAPTER
    else:
        config = load_config(run, overrides, build=False)
    from .answers import evaluate
    from .data import load_examples

    examples = load_examples(config.data)
    model, tokenizer = load(config, adapter)
    block = config.evaluate or EvaluateBlock.model_validate({})
    result, _ = evaluate(model, tokenizer, examples.test, block, examples.verify)
    return {"model": config.model.name, "adapter": None if adapter is None else str(adapter), **result.to_dict()}
