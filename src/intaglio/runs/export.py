"""Export an adapter into a form that other programs load, and prove that nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..export.forms import Options, form_of
from ..export.staging import check_target
from .config import Config
from .folder import adapter_of
from .load import stored_config

__all__ = ["export"]


def export(
    path: Path,
    to: str,
    output: Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    trust: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export an adapter folder, or a run's adapter; or turn a LoRA folder back into one.

    Args:
        path: an adapter folder, or the folder of a finished run; for `delta`, a LoRA folder.
        to: name of one of `export.forms.FORMS`.
        output: the new folder.
        base: the base model; default the one that the run or the adapter names.
        overwrite: replace an earlier export in `output`; default False.
        trust: as `load.stored_config`.
        options: fields of `export.forms.Options`.

    Returns:
        The figures of the form's function (`to_lora`, `to_gguf`, `to_merged`, …), with `base`, the base's name.

    Raises:
        ValueError: for a bad argument, a damaged adapter, one that does not fit the form or the base, before weights
            are loaded wherever that can be known; and where the export is not exact.

    Example:
        >>> export(Path("runs/demo"), "lora", Path("exports/demo"))["rank"]
        64
    """
    given = Options(**options)
    form = form_of(to, given)
    check_target(output, overwrite=overwrite)
    adapter, run = adapter_of(path)
    source = form.read(adapter)
    arguments = form.prepare(source, given)
    config = None if run is None or base is not None else stored_config(path, trust=trust)
    found = _base(base, config, source.base, adapter, form.base_dtype(source, given))
    model, tokenizer = found.load()
    return {"base": found.name, **form.write(source, model, output, tokenizer=tokenizer, overwrite=overwrite, **arguments)}


@dataclass(frozen=True)
class _Base:
    """The base model: its name, `from_pretrained`'s arguments, and the chat template of the run."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    template: str | None = None

    def load(self) -> tuple[Any, Any]:
        """The model, and its tokenizer if it has one."""
        from ..hf.models import check_available, load_model, load_tokenizer

        check_available(self.name, **self.arguments)
        try:
            tokenizer = load_tokenizer(self.name, **self.arguments)
        except ValueError:
            tokenizer = None  # a base without one
        if self.template is not None:
            tokenizer = load_tokenizer(self.name, chat_template=self.template, **self.arguments)
        return load_model(self.name, **self.arguments), tokenizer


def _base(given: str | None, config: Config | None, named: str | None, adapter: Path, dtype: Any) -> _Base:
    """The base that the user gives, else that of the run, else the one that the adapter names."""
    arguments = {} if dtype is None else {"dtype": dtype}
    if given is not None:
        return _Base(given, arguments)
    if config is not None:
        return _Base(config.model.name, config.model.kwargs() | arguments, config.train.get("chat_template_path"))
    if named is None:
        raise ValueError(f"{adapter}: names no base model (it was a local folder); give --base NAME_OR_FOLDER")
    return _Base(named, arguments)
