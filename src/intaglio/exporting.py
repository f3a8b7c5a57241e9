"""Export an adapter into a form that other programs load, and prove that nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .run_folder import adapter_of

__all__ = ["DTYPES", "FORMS", "export"]

FORMS = ("lora", "merged", "supertuning")
DTYPES = ("float32", "bfloat16", "float16")


def export(
    path: Path,
    to: str,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Export an adapter folder, or a run's adapter.

    Args:
        path: an adapter folder, or the folder of a finished run.
        to: one of `FORMS`.
        output: the new folder.
        base: the base model; default the one that the run or the adapter names.
        dtype: of LoRA's factors, one of `DTYPES`; default float32.
        overwrite: replace an earlier export in `output`; default False.

    Returns:
        `to_lora`'s, `to_merged`'s or `to_supertuning`'s figures, with `base`.

    Raises:
        ValueError: for a bad argument, a damaged adapter, one that does not fit the form or the base, before weights
            are loaded wherever that can be known; and where the export is not exact.

    Example:
        >>> export(Path("runs/demo"), "lora", Path("exports/demo"))["rank"]
        64
    """
    from .hf.staging import check_target

    _check(to, dtype)
    check_target(output, overwrite=overwrite)
    from .delta import Delta

    adapter, run = adapter_of(path)
    delta = Delta.load(adapter)
    source = _source(delta, adapter, run, base)
    if to == "lora":
        from .hf.lora import lora_rank

        lora_rank(delta.selection)  # refuses what no LoRA can hold
    model, tokenizer = _load(source)
    result = _export(to, dtype, delta, model, output, tokenizer=tokenizer, overwrite=overwrite)
    return {"base": source.name, **result}


@dataclass(frozen=True)
class _Source:
    """The base model: its name, `from_pretrained`'s arguments, and the chat template of the run."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


def _check(to: str, dtype: str | None) -> None:
    if to not in FORMS:
        raise ValueError(f"to={to!r}: give one of {', '.join(FORMS)}")
    if dtype is not None and to != "lora":
        raise ValueError(f"dtype={dtype!r}: has no effect with --to {to}; only LoRA's factors have a type of their own")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: give one of {', '.join(DTYPES)}")


def _source(delta: Any, adapter: Path, run: dict[str, Any] | None, base: str | None) -> _Source:
    # The type that the values were trained in; a base of any other type would be refused.
    arguments = {"dtype": next(iter(delta.values.values())).dtype}
    if base is not None:
        return _Source(base, arguments)
    if run is not None:
        from .config import load_config

        config = load_config(run["config"])
        return _Source(config.model.name, config.model.kwargs() | arguments, config.train.get("chat_template_path"))
    if delta.base is None:
        raise ValueError(f"{adapter}: names no base model (it was a local folder); give --base NAME_OR_FOLDER")
    return _Source(delta.base, arguments)


def _load(source: _Source) -> tuple[Any, Any]:
    """The base, and its tokenizer if it has one."""
    from .hf.models import check_available, load_model, load_tokenizer

    check_available(source.name, **source.arguments)
    try:
        tokenizer = load_tokenizer(source.name, **source.arguments)
    except ValueError:
        tokenizer = None  # a base without one
    if source.template is not None:
        tokenizer = load_tokenizer(source.name, chat_template=source.template, **source.arguments)
    return load_model(source.name, **source.arguments), tokenizer


def _export(to: str, dtype: str | None, delta: Any, model: Any, output: Path, **options: Any) -> dict[str, Any]:
    if to == "lora":
        import torch

        from .hf.lora import to_lora

        return to_lora(delta, model, output, dtype=getattr(torch, dtype or "float32"), **options)
    if to == "merged":
        from .hf.merge import to_merged

        return to_merged(delta, model, output, **options)
    from .hf.supertuning import to_supertuning

    return to_supertuning(delta, model, output, **options)
