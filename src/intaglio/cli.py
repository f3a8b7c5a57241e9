"""The `intaglio` command. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

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


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest complete checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in the output folder")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train as a run file says: score, train, save the adapter, score again, draw.

    Writes run.json, adapter/, answers.jsonl, loss.png and accuracy.png into train.output_dir (default runs/NAME).

    Examples:

        intaglio train recipes/demo.yaml
        intaglio train recipes/demo.yaml "method={name: lora, r: 8}" train.output_dir=runs/lora
        intaglio train recipes/demo.yaml --resume
    """

    def work() -> dict[str, Any]:
        from .runs.train import train as run

        return run(run_file, overrides or (), resume=resume, overwrite=overwrite)

    _finish(_guarded(work, debug), as_json, "run")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run file, or the folder of a finished run", metavar="RUN")],
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None, typer.Option(help="adapter folder to apply; default the run folder's own, none for a run file")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a model on held-out examples by batched greedy generation, with a 95 % interval.

    Examples:

        intaglio evaluate runs/demo
        intaglio evaluate recipes/demo.yaml evaluate.limit=100
        intaglio evaluate recipes/demo.yaml --adapter runs/demo/adapter data.seed=7
    """

    def work() -> dict[str, Any]:
        from .runs.score import score

        return score(run, overrides or (), adapter)

    _finish(_guarded(work, debug), as_json, "score")


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")], as_json: Json = False, debug: Debug = False
) -> None:
    """Reload a run's adapter onto a fresh base and compare its logits with the trained model's, bit for bit."""

    def work() -> dict[str, Any]:
        from .runs.score import verify as check

        return check(run)

    result = _guarded(work, debug)
    _finish(result, as_json, "verify")
    if not result["equal"]:
        raise typer.Exit(1)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="adapter folder, or the folder of a finished run", metavar="ADAPTER")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="lora (PEFT, vLLM …), gguf (llama.cpp), merged (a plain model), supertuning (PEFT's sparse), "
            "approximate-lora (any adapter, with a measured loss), or delta (a LoRA folder back into an adapter)",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="the new folder")],
    base: Annotated[str | None, typer.Option(help="base model; default the one the adapter or run names")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="of LoRA's factors: float32 (default), bfloat16 or float16; with delta, the base's (default its own)"),
    ] = None,
    ragged: Annotated[bool, typer.Option("--ragged", help="lora: each module its own rank, for PEFT and vLLM")] = False,
    fill_layers: Annotated[
        bool, typer.Option("--fill-layers", help="lora: zeros for every layer of each projection, for LoRAX and TGI")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="approximate-lora: rank of every module")] = None,
    text: Annotated[
        Path | None, typer.Option(help="approximate-lora: file with a text per line, on which the loss is measured")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="approximate-lora: share of the adapter's effect that may be lost (default 0.01)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export in the output folder")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export an adapter so that other programs load it, checked against the tuned model before it appears.

    Examples:

        intaglio export runs/demo --to lora --output exports/demo-lora
        intaglio export adapter --to merged --output exports/demo --base smollm2-135m
        intaglio export adapter --to approximate-lora --rank 16 --text prompts.txt --output exports/small
        intaglio export exports/demo-lora --to delta --output adapter
    """

    def work() -> dict[str, Any]:
        from .runs.export import export as run

        options = {"dtype": dtype, "ragged": ragged, "fill_layers": fill_layers, "rank": rank, "text": text, "max_loss": max_loss}
        return run(adapter, to, output, base=base, overwrite=overwrite, **options)

    _finish(_guarded(work, debug), as_json, "export")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="adapter folder, or the folder of a finished run", metavar="ADAPTER")],
    other: Annotated[Path | None, typer.Option("--with", help="another adapter or run, to count what both train")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="the picture (.png), or a folder for it; default the inspected folder")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what an adapter changes: counts per layer and projection, its share of the model, a heat map.

    Of a run whose layers trained in turn (ist, rst, lisa) it shows each layer's importance and how often it trained, and
    writes layers.png and layers.csv beside. No model is loaded.

    Examples:

        intaglio inspect runs/demo
        intaglio inspect adapter --with other-adapter --output selection.png
    """

    def work() -> dict[str, Any]:
        from .runs.inspect import inspect as run

        return run(adapter, other=other, output=output)

    _finish(_guarded(work, debug), as_json, "inspect")


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
        from .doctor.examine import examine

        against = {"command": command, "version": version, "device": device}
        return examine(adapters or [], engine, base=base, slots=slots, reload=reload, **against)

    result = _guarded(work, debug)
    _finish(result, as_json, "doctor")
    if result["refused"]:
        raise typer.Exit(1)


@app.command()
def prune(
    run: Annotated[Path, typer.Argument(help="folder of a finished run: LoRA, trained with the schedule ist", metavar="RUN")],
    layers: Annotated[int, typer.Option("--layers", help="how many of the most important layers to keep", metavar="K")],
    output: Annotated[Path | None, typer.Option("--output", help="the new folder; default RUN/pruned-K")] = None,
    rows: Annotated[
        int, typer.Option("--rows", help="held-out rows to take the loss on; 0: no loss, and no model is loaded")
    ] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier result in the output folder")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Keep a LoRA's most important layers only, as an ordinary PEFT adapter.

    IST has learned how much each layer of the run matters (layers.json; `intaglio inspect RUN` shows it). The adapter of all
    but the K most important layers is left out: a smaller file that PEFT loads as any other, equal bit for bit to the whole
    one with those layers switched off. What the layers are worth stands in pruning.csv beside it: the loss on held-out rows
    with all layers, one fewer, … and one. Look where it begins to rise, and choose K there.

    Examples:

        intaglio prune runs/ist --layers 10
        intaglio prune runs/ist --layers 4 --output adapters/small --rows 100
    """

    def work() -> dict[str, Any]:
        from .runs.prune import prune as run_prune

        return run_prune(run, layers, output, held_out=rows, overwrite=overwrite)

    _finish(_guarded(work, debug), as_json, "prune")


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
            from .serve.limits import Limits
            from .serve.run import Options, parse_adapters
            from .serve.run import serve as run
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

    command = _guarded(work, debug)["command"]
    if command is not None:
        typer.echo(command)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods, their fields and defaults."""
    from .methods import METHODS

    listed = {name: {"summary": cls.summary, "fields": cls().to_dict()} for name, cls in METHODS.items()}
    _finish(listed, as_json, "methods")


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


def _guarded(work: Callable[[], dict[str, Any]], debug: bool) -> dict[str, Any]:
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


def _finish(result: dict[str, Any], as_json: bool, kind: str) -> None:
    if as_json:
        json.dump(result, sys.stdout, indent=1, default=str)
        sys.stdout.write("\n")
        return
    from .report import tables

    tables.show(kind, result)
