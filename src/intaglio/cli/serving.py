"""The commands of serving: serve, doctor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Debug, Json, app, finish, guarded


@app.command()
def doctor(
    adapters: Annotated[
        list[str] | None, typer.Argument(help="adapter folders, or NAME=FOLDER; runs and exports too", metavar="ADAPTER…")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="say how engines serve the adapters rightly, or why not")] = False,
    engine: Annotated[str | None, typer.Option(help="vllm, sglang, llama.cpp or lorax; default all of them")] = None,
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

        intaglio doctor --serve exports/demo-lora --engine vllm
        intaglio doctor --serve runs/demo exports/other-lora
        intaglio doctor --serve new-lora --engine vllm --command "vllm serve base --enable-lora --max-lora-rank 64"
    """

    def work() -> dict[str, Any]:
        if not serve:
            raise ValueError("doctor: say what to look at: intaglio doctor --serve ADAPTER…")
        from ..doctor.examine import examine

        against = {"command": command, "version": version, "device": device}
        return examine(adapters or [], engine, base=base, slots=slots, reload=reload, **against)

    result = guarded(work, debug)
    finish(result, as_json, "doctor")
    if result["refused"]:
        raise typer.Exit(1)


@app.command()
def serve(
    base: Annotated[str, typer.Argument(help="base model: a folder, a hub name, or smollm2-135m", metavar="BASE")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="an adapter folder or finished run; may be repeated", metavar="NAME=PATH")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0: a free one", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="the base's name for callers; default its own")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the base: float32, bfloat16, float16; default as its files have it")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="a key that callers must send; may be repeated", metavar="KEY", envvar="INTAGLIO_API_KEY"),
    ] = None,
    adapter_root: Annotated[
        Path | None, typer.Option(help="folder that callers may load adapters from; without it they may load and unload none")
    ] = None,
    adapter_memory: Annotated[
        float, typer.Option(help="GiB of adapters in memory; others are read again when asked for", min=0)
    ] = 4.0,
    max_batch: Annotated[int, typer.Option(help="requests that run at once", min=1)] = 64,
    max_queue: Annotated[int, typer.Option(help="requests that wait beyond those; more get 429", min=0)] = 64,
    max_context: Annotated[int | None, typer.Option(help="tokens of prompt and answer; default the model's", min=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="longest answer; default what the context leaves", min=1)] = None,
    max_body: Annotated[int, typer.Option(help="bytes of a request", min=1)] = 1 << 20,
    shutdown_timeout: Annotated[float, typer.Option(help="seconds for requests at work after SIGTERM", min=0)] = 30.0,
    engine: Annotated[
        str, typer.Option(help="intaglio, or vllm: export the adapters to LoRA and run vLLM's server")
    ] = "intaglio",
    export_dir: Annotated[Path, typer.Option(help="for --engine vllm: folder of the exported LoRAs")] = Path("exports/vllm"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="for --engine vllm: print the command only")] = False,
    debug: Debug = False,
) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's API: model = an adapter's name. A page to try it is at /.

    Examples:

        intaglio serve smollm2-135m --adapter demo=runs/demo
        intaglio serve smollm2-135m --adapter-root adapters --max-batch 16
        intaglio serve smollm2-135m --adapter demo=runs/demo --engine vllm --dry-run
    """

    def work() -> dict[str, Any]:
        try:
            from ..serve.limits import Limits
            from ..serve.run import Options, parse_adapters
            from ..serve.run import serve as run
        except ModuleNotFoundError as error:
            raise ValueError(f"serving needs {error.name!r}: pip install 'intaglio[serve]'") from error
        if not api_key and os.environ.get("INTAGLIO_API_KEY") is not None:
            raise ValueError("INTAGLIO_API_KEY is set but empty; unset it to serve without keys")
        return {
            "command": run(
                Options(
                    base,
                    parse_adapters(adapter or ()),
                    name=name,
                    host=host,
                    port=port,
                    dtype=dtype,
                    keys=api_key or (),
                    adapter_root=adapter_root,
                    memory=int(adapter_memory * 2**30),
                    max_context=max_context,
                    limits=Limits(max_tokens=max_tokens, max_running=max_batch, max_queue=max_queue, max_body=max_body),
                    shutdown_timeout=shutdown_timeout,
                    engine=engine,
                    export_dir=export_dir,
                    dry_run=dry_run,
                )
            )
        }

    command = guarded(work, debug)["command"]
    if command is not None:
        typer.echo(command)
