"""The forms that an adapter is exported in, one row each: all that `intaglio export` knows of them.

A form is a file in this folder and a row in `FORMS`. Nothing heavy is imported before a form is used, so that the help of the
command comes from here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..method_kinds.fields import choice, refuse
from .figures import exact

__all__ = ["DTYPES", "FORMS", "Form", "Options", "form_of", "help_of"]

DTYPES = ("float32", "bfloat16", "float16")
_HELP = {
    "dtype": "of LoRA's factors: float32 (default), bfloat16 or float16; with delta, the base's (default its own)",
    "ragged": "each module its own rank, for PEFT and vLLM",
    "fill_layers": "zeros for every layer of each projection, for LoRAX and TGI",
    "rank": "rank of every module",
    "text": "file with a text per line, on which the loss is measured",
    "max_loss": "share of the adapter's effect that may be lost (default 0.01)",
}


@dataclass(frozen=True)
class Options:
    """Settings that some of the forms take, as the command gives them.

    Args:
        dtype: one of `DTYPES`.
        ragged, fill_layers: layouts of a LoRA.
        rank: of every module of an approximate LoRA.
        text: file with a text per line.
        max_loss: the greatest loss that is accepted.
    """

    dtype: str | None = None
    ragged: bool = False
    fill_layers: bool = False
    rank: int | None = None
    text: Path | None = None
    max_loss: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that are not at their default."""
        return {name: value for name, value in vars(self).items() if value != getattr(type(self), name)}


def _late(place: str) -> Callable[..., Any]:
    """A function of this folder, "module:function", which is imported when it is called."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        module, _, name = place.partition(":")
        return getattr(import_module(f".{module}", __package__), name)(*arguments, **keywords)

    return call


def _adapter(folder: Path) -> Any:
    """The Delta in a folder, which has something to export."""
    from ..adapter.delta import Delta

    delta = Delta.load(folder)
    if not delta.selection:
        raise ValueError("the adapter holds no parameters: there is nothing to export")
    return delta


def _no_arguments(source: Any, options: Options) -> dict[str, Any]:
    return {}


def _trained_in(delta: Any, options: Options) -> Any:
    """The type of a Delta's values, as a base of any other is refused."""
    return next(iter(delta.values.values())).dtype


@dataclass(frozen=True)
class Form:
    """A kind of folder that an adapter is written as.

    Attributes:
        name: what `--to` takes.
        help: what loads it, in a few words.
        write: (source, model, output folder, `tokenizer=`, `overwrite=`, what `prepare` gives) → figures. It proves what it
            writes before the folder appears.
        options: fields of `Options` that have an effect; any other is refused.
        read: folder → source; default the Delta in it. A source has a `base`, the name of its base model or None.
        prepare: (source, options) → keyword arguments of `write`. It refuses what can be refused before weights are loaded;
            default nothing.
        base_dtype: (source, options) → type to load the base in, None for the base's own; default that of the Delta's values.
        lines: figures → (label, text) of what the command shows; default size and exactness.
    """

    name: str
    help: str
    write: Callable[..., dict[str, Any]]
    options: tuple[str, ...] = ()
    read: Callable[[Path], Any] = _adapter
    prepare: Callable[[Any, Options], dict[str, Any]] = _no_arguments
    base_dtype: Callable[[Any, Options], Any] = _trained_in
    lines: Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]] = exact

    def table(self, figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(label, text) of the whole result of the command."""
        yield "base", figures["base"]
        yield from self.lines(figures)
        yield "written", figures["path"]


_ROWS = (
    Form(
        "lora",
        "PEFT, vLLM …",
        _late("lora:to_lora"),
        options=("dtype", "ragged", "fill_layers"),
        prepare=_late("lora:prepare"),
        lines=_late("lora:lines"),
    ),
    Form(
        "gguf",
        "llama.cpp",
        _late("gguf:to_gguf"),
        options=("dtype",),
        prepare=_late("gguf:prepare"),
        lines=_late("gguf:lines"),
    ),
    Form("merged", "a plain model", _late("merged:to_merged")),
    Form("supertuning", "PEFT's sparse", _late("supertuning:to_supertuning"), lines=_late("supertuning:lines")),
    Form(
        "approximate-lora",
        "any adapter, with a measured loss",
        _late("approximate_lora:to_approximate_lora"),
        options=("rank", "text", "max_loss"),
        prepare=_late("approximate_lora:prepare"),
        lines=_late("approximate_lora:lines"),
    ),
    Form(
        "delta",
        "a LoRA folder back into an adapter",
        _late("from_lora:to_delta"),
        options=("dtype",),
        read=_late("from_lora:read_lora"),
        prepare=_late("from_lora:prepare"),
        base_dtype=_late("from_lora:base_dtype"),
        lines=_late("from_lora:lines"),
    ),
)
FORMS = {form.name: form for form in _ROWS}


def form_of(to: str, options: Options) -> Form:
    """The form of a name, where the options fit it.

    Raises:
        ValueError: for an unknown name; naming every option that has no effect, or a value that no form knows.
    """
    refuse("export", choice("to", to, FORMS))
    idle = {name: value for name, value in options.given.items() if name not in FORMS[to].options}
    problems = [f"{n}={str(v)!r}: has no effect with --to {to}; only with {', '.join(_takers(n))}" for n, v in idle.items()]
    problems += [] if options.dtype is None else choice("dtype", options.dtype, DTYPES)
    refuse("export", problems)
    return FORMS[to]


def help_of(option: str) -> str:
    """The help of an option: the forms that take it, and what it does."""
    return f"{', '.join(_takers(option))}: {_HELP[option]}"


def _takers(option: str) -> list[str]:
    return [form.name for form in FORMS.values() if option in form.options]
