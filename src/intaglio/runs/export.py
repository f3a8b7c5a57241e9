"""Export an adapter into a form that other programs load, and prove that nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .folder import adapter_of

__all__ = ["DTYPES", "FORMS", "Options", "export"]

# form → the options that have an effect with it
FORMS = {
    "lora": ("dtype", "ragged", "fill_layers"),
    "gguf": ("dtype",),
    "merged": (),
    "supertuning": (),
    "approximate-lora": ("rank", "text", "max_loss"),
    "delta": ("dtype",),
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """What some of the forms take.

    Args:
        dtype: of LoRA's factors, one of `DTYPES`, default float32; for `delta` the base's type, default its own.
        ragged: each module its own rank, for PEFT and vLLM.
        fill_layers: zeros for every layer of each projection, for LoRAX and TGI.
        rank: of an approximate LoRA.
        text: file with a text per line, on which an approximate LoRA's loss is measured.
        max_loss: the greatest loss of an approximate LoRA that is accepted; default 0.01.
    """

    dtype: str | None = None
    ragged: bool = False
    fill_layers: bool = False
    rank: int | None = None
    text: Path | None = None
    max_loss: float | None = None


def export(
    path: Path,
    to: str,
    output: Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export an adapter folder, or a run's adapter; or turn a LoRA folder back into one.

    Args:
        path: an adapter folder, or the folder of a finished run; for `delta`, a LoRA folder.
        to: one of `FORMS`.
        output: the new folder.
        base: the base model; default the one that the run or the adapter names.
        overwrite: replace an earlier export in `output`; default False.
        options: fields of `Options`.

    Returns:
        The figures of the form's function (`to_lora`, `to_gguf`, `to_merged`, …), with `base`.

    Raises:
        ValueError: for a bad argument, a damaged adapter, one that does not fit the form or the base, before weights
            are loaded wherever that can be known; and where the export is not exact.

    Example:
        >>> export(Path("runs/demo"), "lora", Path("exports/demo"))["rank"]
        64
    """
    from ..export.staging import check_target

    given = Options(**options)
    _check(to, given)
    check_target(output, overwrite=overwrite)
    adapter, run = adapter_of(path)
    read, write = _reader(to), _WRITERS[to]
    source, texts = read(adapter), _texts(given.text)
    _precheck(to, source, given)
    place = _source(source, adapter, run, base, _base_dtype(to, source, given))
    model, tokenizer = _load(place)
    result = write(source, model, output, given, texts, tokenizer=tokenizer, overwrite=overwrite)
    return {"base": place.name, **result}


@dataclass(frozen=True)
class _Source:
    """The base model: its name, `from_pretrained`'s arguments, and the chat template of the run."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


def _check(to: str, options: Options) -> None:
    if to not in FORMS:
        raise ValueError(f"to={to!r}: give one of {', '.join(FORMS)}")
    for name, default in vars(Options()).items():
        value = getattr(options, name)
        if value != default and name not in FORMS[to]:
            others = ", ".join(form for form, taken in FORMS.items() if name in taken)
            raise ValueError(f"{name}={str(value)!r}: has no effect with --to {to}; only with {others}")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ValueError(f"dtype={options.dtype!r}: give one of {', '.join(DTYPES)}")
    if to == "approximate-lora" and (options.rank is None or options.text is None):
        raise ValueError(
            "--to approximate-lora: give --rank, and --text with a file of the kind of text the adapter is for, a text per line: "
            "what is lost is measured on it"
        )
    if options.max_loss is not None and not options.max_loss > 0:
        raise ValueError(f"max_loss={options.max_loss}: give a share above 0 of what the adapter does, e.g. 0.01")


def _reader(to: str) -> Callable[[Path], Any]:
    if to == "delta":
        from ..export.from_lora import read_lora

        return read_lora
    from ..adapter.delta import Delta

    return Delta.load


def _texts(path: Path | None) -> list[str]:
    """The lines of a text file that are not empty."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text={str(path)!r}: cannot be read as UTF-8 text ({error})") from error
    if not any(lines):
        raise ValueError(f"text={str(path)!r}: holds no text; give a text per line")
    return [line for line in lines if line]


def _precheck(to: str, source: Any, options: Options) -> None:
    """Refuse what can be refused before weights are loaded."""
    from ..export import lora

    if to != "delta" and not source.selection:
        raise ValueError("the adapter holds no parameters: there is nothing to export")

    if to == "lora":
        lora.lora_rank(source.selection)
        lora.refuse_both(options.ragged, options.fill_layers)
    if to == "gguf":
        lora.refuse_unsliced(source.selection)
    if to == "approximate-lora":
        from ..export.approximate_lora import check_rank

        assert options.rank is not None  # _check has seen it
        check_rank(source, options.rank)
    if to == "delta":
        from ..export.from_lora import picks

        for module in source.modules:
            picks(source, module)


def _base_dtype(to: str, source: Any, options: Options) -> Any:
    """The type to load the base in: the one that the values were trained in, as any other is refused; None for its own."""
    import torch

    if to != "delta":
        return next(iter(source.values.values())).dtype
    name = options.dtype or source.exported.get("base_dtype")
    return getattr(torch, name) if name in DTYPES else None


def _source(source: Any, adapter: Path, run: dict[str, Any] | None, base: str | None, dtype: Any) -> _Source:
    arguments = {} if dtype is None else {"dtype": dtype}
    if base is not None:
        return _Source(base, arguments)
    if run is not None:
        from .config import load_config

        config = load_config(run["config"], build=False)
        return _Source(config.model.name, config.model.kwargs() | arguments, config.train.get("chat_template_path"))
    if source.base is None:
        raise ValueError(f"{adapter}: names no base model (it was a local folder); give --base NAME_OR_FOLDER")
    return _Source(source.base, arguments)


def _load(source: _Source) -> tuple[Any, Any]:
    """The base, and its tokenizer if it has one."""
    from ..hf.models import check_available, load_model, load_tokenizer

    check_available(source.name, **source.arguments)
    try:
        tokenizer = load_tokenizer(source.name, **source.arguments)
    except ValueError:
        tokenizer = None  # a base without one
    if source.template is not None:
        tokenizer = load_tokenizer(source.name, chat_template=source.template, **source.arguments)
    return load_model(source.name, **source.arguments), tokenizer


def _lora(delta: Any, model: Any, output: Path, options: Options, texts: list[str], **common: Any) -> dict[str, Any]:
    from ..export.lora import to_lora

    layout = {"ragged": options.ragged, "fill_layers": options.fill_layers}
    return to_lora(delta, model, output, dtype=_dtype(options), **layout, **common)


def _gguf(delta: Any, model: Any, output: Path, options: Options, texts: list[str], **common: Any) -> dict[str, Any]:
    from ..export.gguf import to_gguf

    return to_gguf(delta, model, output, dtype=_dtype(options), **common)


def _merged(delta: Any, model: Any, output: Path, options: Options, texts: list[str], **common: Any) -> dict[str, Any]:
    from ..export.merged import to_merged

    return to_merged(delta, model, output, **common)


def _supertuning(delta: Any, model: Any, output: Path, options: Options, texts: list[str], **common: Any) -> dict[str, Any]:
    from ..export.supertuning import to_supertuning

    return to_supertuning(delta, model, output, **common)


def _approximate(delta: Any, model: Any, output: Path, options: Options, texts: list[str], **common: Any) -> dict[str, Any]:
    from ..export.approximate_lora import LIMIT, to_approximate_lora

    assert options.rank is not None  # _check has seen it
    limit = LIMIT if options.max_loss is None else options.max_loss
    return to_approximate_lora(delta, model, output, rank=options.rank, texts=texts, max_loss=limit, **common)


def _delta(lora: Any, model: Any, output: Path, options: Options, texts: list[str], **common: Any) -> dict[str, Any]:
    from ..export.from_lora import to_delta

    return to_delta(lora, model, output, **common)


def _dtype(options: Options) -> Any:
    import torch

    return getattr(torch, options.dtype or "float32")


_WRITERS: dict[str, Callable[..., dict[str, Any]]] = {
    "lora": _lora,
    "gguf": _gguf,
    "merged": _merged,
    "supertuning": _supertuning,
    "approximate-lora": _approximate,
    "delta": _delta,
}
