"""The commands of a run: train, evaluate, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Debug, Json, Overrides, RunFile, Trust, app, finish, guarded


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest complete checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in the output folder")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="a package of yours whose methods the run file may name, as method.name=package.module:Class; its code runs",
            metavar="PACKAGE",
        ),
    ] = None,
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
        from ..runs.train import train as run

        return run(run_file, overrides or (), resume=resume, overwrite=overwrite, allow=allow or ())

    finish(guarded(work, debug), as_json, "run")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run file, or the folder of a finished run", metavar="RUN")],
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None, typer.Option(help="adapter folder to apply; default the run folder's own, none for a run file")
    ] = None,
    trust: Trust = False,
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
        from ..runs.score import score

        return score(run, overrides or (), adapter, trust=trust)

    finish(guarded(work, debug), as_json, "score")


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Reload a run's adapter onto a fresh base and compare its logits with the trained model's, bit for bit."""

    def work() -> dict[str, Any]:
        from ..runs.verify import verify as check

        return check(run, trust=trust)

    result = guarded(work, debug)
    finish(result, as_json, "verify")
    if not result["equal"]:
        raise typer.Exit(1)
