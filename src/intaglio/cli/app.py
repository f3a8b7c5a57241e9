"""The command itself: its options in common, and how every command ends."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["Debug", "Json", "Overrides", "RunFile", "app", "finish", "guarded"]


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
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


def guarded(work: Callable[[], dict[str, Any]], debug: bool) -> dict[str, Any]:
    """Run a command; a user's mistake ends in one clear message and exit code 2, without a traceback."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the libraries' logs; standard output is for the result
            return work()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if debug:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.secho("interrupted; `--resume` continues from the newest checkpoint", err=True)
        raise typer.Exit(130) from None


def finish(result: dict[str, Any], as_json: bool, kind: str | Callable[[dict[str, Any]], Iterator[tuple[str, str]]]) -> None:
    """Print a command's result: a table of its kind, or of the rows that a function makes of it, or JSON."""
    if as_json:
        json.dump(result, sys.stdout, indent=1, default=str)
        sys.stdout.write("\n")
        return
    from ..report import tables

    tables.show(kind, result)
