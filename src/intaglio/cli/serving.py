"""The commands of serving: serve, doctor."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..doctor.engines import ENGINES
from ..serve.run import Options
from .app import Debug, Json, app, finish, guarded


@app.command()
def doctor(
    adapters: Annotated[
        list[str] | None, typer.Argument(help="adapter folders, or NAME=FOLDER; runs and exports too", metavar="ADAPTER…")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="what it does in any case; may be left out")] = False,
    engine: Annotated[str | None, typer.Option(help=f"one of {', '.join(ENGINES)}; default all of them")] = None,
    base: Annotated[str | None, typer.Option(help="base model; default the one the adapters name")] = None,
    slots: Annotated[int | None, typer.Option(help="adapters in one batch; default all, at most 8")] = None,
    command: Annotated[str | None, typer.Option(help="command line of a server that runs already, to check against")] = None,
    version: Annotated[str | None, typer.Option("--engine-version", help="default the installed one")] = None,
    device: Annotated[str | None, typer.Option(help="gpu or cpu; default what the installed engine is built for")] = None,
    reload: Annotated[bool, typer.Option("--reload", help="the adapters' weights changed since the server loaded them")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the exact command line with which an engine serves adapters, or why it would serve them wrongly.

    Nothing is started and no weights of the base are read. Exit code 1 where the engine (without --engine: every one) is
    refused.

    Examples:

        intaglio doctor exports/demo-lora --engine vllm
        intaglio doctor runs/demo exports/other-lora
        intaglio doctor new-lora --engine vllm --command "vllm serve base --enable-lora --max-lora-rank 64"
    """

    def work() -> dict[str, Any]:
        from ..doctor.examine import examine

        against = {"command": command, "version": version, "device": device}
        return examine(adapters or [], engine, base=base, slots=slots, reload=reload, **against)

    result = guarded(work, debug)
    finish(result, as_json, "doctor")
    if result["refused"]:
        raise typer.Exit(1)


def _taking(options: Callable[..., Any]) -> Callable[[Callable[[Any, bool], None]], Callable[..., None]]:
    """Give a command the options that a dataclass declares, one for each field, and --debug."""
    signature = inspect.signature(options, eval_str=True)
    own = inspect.Parameter("debug", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=Debug)
    parameters = [*signature.parameters.values(), own]

    def decorate(command: Callable[[Any, bool], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*, debug: bool, **given: Any) -> None:
            command(options(**given), debug)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


@app.command()
@_taking(Options)
def serve(options: Options, debug: bool) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's API: model = an adapter's name. A page to try it is at /.

    Examples:

        intaglio serve smollm2-135m --adapter demo=runs/demo
        intaglio serve smollm2-135m --adapter-root adapters --max-batch 16
        intaglio serve smollm2-135m --adapter demo=runs/demo --engine vllm --dry-run
    """

    def work() -> dict[str, Any]:
        try:
            from ..serve import limits as limits
            from ..serve import process as process
            from ..serve.run import serve as run
        except ModuleNotFoundError as error:
            raise ValueError(f"serving needs {error.name!r}: pip install 'intaglio[serve]'") from error
        if not options.api_key and os.environ.get("INTAGLIO_API_KEY") is not None:
            raise ValueError("INTAGLIO_API_KEY is set but empty; unset it to serve without keys")
        return {"command": run(options)}

    command = guarded(work, debug)["command"]
    if command is not None:
        typer.echo(command)
