"""The commands on an adapter: export, inspect, prune; and the list of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..export.forms import FORMS, help_of
from .app import Debug, Json, Trust, app, finish, guarded


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="adapter folder, or the folder of a finished run", metavar="ADAPTER")],
    to: Annotated[str, typer.Option("--to", help=", ".join(f"{form.name} ({form.help})" for form in FORMS.values()))],
    output: Annotated[Path, typer.Option("--output", help="the new folder")],
    base: Annotated[str | None, typer.Option(help="base model; default the one the adapter or run names")] = None,
    dtype: Annotated[str | None, typer.Option(help=help_of("dtype"))] = None,
    ragged: Annotated[bool, typer.Option("--ragged", help=help_of("ragged"))] = False,
    fill_layers: Annotated[bool, typer.Option("--fill-layers", help=help_of("fill_layers"))] = False,
    rank: Annotated[int | None, typer.Option(help=help_of("rank"))] = None,
    text: Annotated[Path | None, typer.Option(help=help_of("text"))] = None,
    max_loss: Annotated[float | None, typer.Option(help=help_of("max_loss"))] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export in the output folder")] = False,
    trust: Trust = False,
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
        from ..runs.export import export as run

        options = {"dtype": dtype, "ragged": ragged, "fill_layers": fill_layers, "rank": rank, "text": text, "max_loss": max_loss}
        return run(adapter, to, output, base=base, overwrite=overwrite, trust=trust, **options)

    result = guarded(work, debug)
    finish(result, as_json, FORMS[to].table)


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
        from ..runs.inspect import inspect as run

        return run(adapter, other=other, output=output)

    finish(guarded(work, debug), as_json, "inspect")


@app.command()
def prune(
    run: Annotated[Path, typer.Argument(help="folder of a finished run: LoRA, trained with the schedule ist", metavar="RUN")],
    layers: Annotated[int, typer.Option("--layers", help="how many of the most important layers to keep", metavar="K")],
    output: Annotated[Path | None, typer.Option("--output", help="the new folder; default RUN/pruned-K")] = None,
    rows: Annotated[
        int, typer.Option("--rows", help="held-out rows to take the loss on; 0: no loss, and no model is loaded")
    ] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier result in the output folder")] = False,
    trust: Trust = False,
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
        from ..runs.prune import prune as run_prune

        return run_prune(run, layers, output, held_out=rows, overwrite=overwrite, trust=trust)

    finish(guarded(work, debug), as_json, "prune")


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods, their fields and defaults."""
    from ..runs.methods import list_methods

    finish(list_methods(), as_json, "methods")
