"""Score or verify a run after the fact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Config, EvaluateBlock, load_config
from .folder import ADAPTER, CHECK, read_run

__all__ = ["load", "score", "verify"]


def score(run: Path, overrides: Sequence[str] = (), adapter: Path | None = None) -> dict[str, Any]:
    """Score a run file's model, or a finished run's, on held-out examples.

    Args:
        run: a run file, or the folder of a finished run.
        overrides: `block.key=value` on top of its config.
        adapter: folder to apply; default the run folder's own, none for a run file.

    Returns:
        `Score.to_dict()` with `adapter` and `model`.

    Raises:
        ValueError: for a bad run file, missing data, a missing or foreign adapter.
    """
    source, own = (read_run(run)["config"], run / ADAPTER) if run.is_dir() else (run, None)
    config, adapter = load_config(source, overrides), adapter or own
    from .answers import evaluate
    from .data import load_examples

    examples = load_examples(config.data)
    model, tokenizer = load(config, adapter)
    block = config.evaluate or EvaluateBlock.model_validate({})
    result, _ = evaluate(model, tokenizer, examples.test, block, examples.verify)
    return {"model": config.model.name, "adapter": None if adapter is None else str(adapter), **result.to_dict()}


def verify(run: Path) -> dict[str, Any]:
    """Reload a finished run's adapter onto a fresh base and compare logits with the trained model's.

    Raises:
        ValueError: where `run` is no finished run, or its adapter is damaged or does not fit the base.
    """
    from .verify import compare_check

    config = load_config(read_run(run)["config"])
    model, _ = load(config, run / ADAPTER)
    return {"run": str(run), "adapter": str(run / ADAPTER), **compare_check(model, run / CHECK)}


def load(config: Config, adapter: Path | None) -> tuple[Any, Any]:
    """The model of a run file, with an adapter on it, and its tokenizer."""
    import torch

    from ..adapter.folder import read_config
    from ..hf.models import check_available, load_model, load_tokenizer
    from .verify import apply_adapter

    check_available(config.model.name, **config.model.kwargs())
    if adapter is not None:
        read_config(adapter)  # before any weights are read
    template = config.train.get("chat_template_path")
    tokenizer = load_tokenizer(config.model.name, chat_template=template, **config.model.kwargs())
    device = "cuda" if torch.cuda.is_available() and not config.train.get("use_cpu") else "cpu"
    model = load_model(config.model.name, device=device, **config.model.kwargs())
    return (model if adapter is None else apply_adapter(model, adapter)), tokenizer
