"""The command itself: its options in common, and how every command ends."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.interrupt import Interrupted

__all__ = ["Debug", "Json", "Overrides", "RunFile", "Trust", "app", "finish", "guarded"]


app = typer.Typer(
    name="intaglio",
    help="Fine-tune language models sparsely: change few weights, ship a small adapter.",
    epilog="Start: intaglio train recipes/demo.yaml · then: intaglio verify runs/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RunFile = Annotated[
    Path, typer.Argument(help="run file (YAML) with the blocks model, method, data, train, evaluate", metavar="RUN.yaml")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="settings on top, e.g. train.learning_rate=1e-3 method.seed=1", metavar="[BLOCK.KEY=VALUE]…"),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="run code that the folder names: only of people you trust"),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


def guarded(work: Callable[[], dict[str, Any]], debug: bool) -> dict[str, Any]:
    """Run a command; whatever goes wrong ends in one message and exit code 2, without a traceback unless that is asked for."""
    try:
        with contextlib.redirect_stdout(sys.stderr), _plain_warnings():  # standard output is for the result
            return work()
    except KeyboardInterrupt:
        typer.secho("interrupted", err=True)
        raise typer.Exit(130) from None
    except Interrupted as stopped:
        typer.secho(str(stopped), err=True)
        raise typer.Exit(128 + stopped.number) from None
    except Exception as error:
        if debug:
            raise
        typer.secho(f"error: {_in_words(error)}", fg="red", err=True)
        raise typer.Exit(2) from error


def _in_words(error: Exception) -> str:
    """A mistake's own words; for what a library raised, its kind and first line."""
    if isinstance(error, (ValueError, ModuleNotFoundError)):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return f"the disk is full, or the file too large: {first}; make room, then go on with --resume"
    if isinstance(error, OSError):
        return first
    return f"{type(error).__name__}: {first}; --debug shows where"


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, for people, not for programmers."""

    def show(message: Warning | str, category: type[Warning], *args: Any) -> None:
        if issubclass(category, UserWarning):
            typer.secho(f"warning: {message}", fg="yellow", err=True)
        else:
            usual(message, category, *args)

    usual, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = usual


def finish(result: dict[str, Any], as_json: bool, kind: str | Callable[[dict[str, Any]], Iterator[tuple[str, str]]]) -> None:
    """Print a command's result: a table of its kind, or of the rows that a function makes of it, or JSON."""
    if sys.stdout is None:  # closed before we began
        return
    try:
        if as_json:
            print(json.dumps(result, indent=1, default=str), flush=True)
        else:
            from ..report import tables

            tables.show(kind, result)
            sys.stdout.flush()
    except OSError as error:  # full, or closed: by a pager that had enough, say
        sys.stdout = None  # type: ignore[assignment]  # else Python tries once more on its way out
        if isinstance(error, BrokenPipeError):
            raise typer.Exit from None
        typer.secho(f"error: the result could not be printed ({error})", fg="red", err=True)
        raise typer.Exit(2) from error
