"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Rows", "show"]

Rows = Callable[[dict[str, Any]], Iterator[tuple[str, str]]]  # a result → (label, text) of each row
_TOP = 10  # layers shown of those that trained in turn


def show(kind: str | Rows, result: dict[str, Any]) -> None:
    """Print a command's result.

    Args:
        kind: one of run, score, verify, methods, inspect, prune, doctor; or a function that makes the rows.
        result: of the command.
    """
    if kind == "doctor":  # its commands are copied: no wrapping
        print("\n".join(f"{label:<12}{text}" for label, text in _doctor(result)))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, text in (_ROWS[kind] if isinstance(kind, str) else kind)(result):
        table.add_row(label, text, style="bold" if label.isupper() else None)
    # Wide enough for one row a line in a file or a log, where there is no terminal to fit.
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table)
    if kind == "inspect" and result["projections"]:
        console.print(_layers(result["projections"]))
    if kind == "inspect" and "layers" in result:
        console.print(_in_turn(result["layers"]))


def _run(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    trainable, training, adapter = result["trainable"], result["training"], result["adapter"]
    before, after = result["before"], result["after"]
    yield "trainable", f"{trainable['entries']:,} of {trainable['of']:,} weights = {trainable['share']:.2%}"
    data = result.get("data") or {}
    if data.get("rows") is not None:
        left_out = f", {data['left_out']:,} left out" if data["left_out"] else ""
        yield "rows", f"{data['rows']:,}{left_out}"
    yield "steps", f"{training['steps']} ({training['seconds_per_step'] or 0:.2f} s each, median)"
    yield "peak memory", f"{training['peak_memory_bytes'] / 1e9:.2f} GB ({training['peak_memory_kind']})"
    yield "adapter", f"{adapter['path']}, {adapter['bytes'] / 1e6:.2f} MB"
    if before is not None:
        yield "before", _score_text(before)
    if after is not None:
        yield "after", _score_text(after)
    if before is not None and after is not None:
        yield from _gain(before, after)
    pictures = "loss.png" + ("" if after is None else ", accuracy.png, answers.jsonl")
    yield "written", f"{result['output']}: run.json, adapter, {pictures}"


def _gain(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Split the gain: what the base answered right in another format, and what it could not answer."""
    total = after["total"]
    gain, form = after["correct"] - before["correct"], before["lenient"] - before["correct"]
    yield "gain", f"{100 * gain / total:+.1f} points"
    yield "  of it format", f"{100 * form / total:+.1f} points: the base has the right answer somewhere in its output"
    if before.get("cut"):
        cut = f"{before['cut']} of {total} outputs of the base were cut before they ended: raise evaluate.max_new_tokens"
        yield "  of it skill", f"not known: {cut}"
        return
    yield (
        "  of it skill",
        f"{100 * (gain - form) / total:+.1f} points: right where the base is wrong even by that lenient reading",
    )


def _score_text(score: dict[str, Any]) -> str:
    interval = f"95 % interval {score['low']:.1%} … {score['high']:.1%}"
    lenient = f"lenient {score['lenient'] / score['total']:.1%}"
    cut = f"; {score['cut']} cut at max_new_tokens" if score.get("cut") else ""
    return f"{score['correct']}/{score['total']} = {score['accuracy']:.1%} right ({interval}; {lenient}{cut})"


def _score(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", f"{result['model']}{'' if result['adapter'] is None else ' + ' + result['adapter']}"
    yield "score", _score_text(result)
    yield "exact", f"{result['exact']}/{result['total']}"


def _verify(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "adapter", f"{result['adapter']} on a fresh base"
    equal = "equal bit for bit" if result["equal"] else "DIFFERENT"
    yield "logits", f"{equal} (greatest difference {result['max_difference']:.1e} over {result['prompts']} prompts)"


def _methods(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, method in result.items():
        fields = ", ".join(f"{k}={v!r}" for k, v in method["fields"].items() if k != "name")
        yield name, f"{method['summary']}\n{fields}\n"


def _doctor(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "base", result["base"] or "not named"
    for adapter in result["adapters"]:
        rank = "" if adapter["rank"] is None else f", rank {adapter['rank']} in {adapter['modules']} modules"
        yield adapter["name"], f"{adapter['path']}: {adapter['form']}{rank}"
    for name, engine in result["engines"].items():
        yield name.upper(), "REFUSED" if engine["refused"] else "serves them rightly"
        yield from (("", reason) for reason in engine["refused"])
        yield from (("first", step) for step in engine["first"])
        if engine["command"] is not None:
            yield "then" if engine["first"] else "start", engine["command"]
        yield from (("load", request) for request in engine.get("load", ()))
        if "bytes" in engine:
            plural = "" if engine["slots"] == 1 else "s"
            each = f"{engine['slots']} slot{plural} of {engine['slot_bytes'] / 1e6:.1f} MB, rank {engine['rank']}"
            yield "memory", f"{engine['bytes'] / 1e6:.1f} MB: {each}"
        yield from (("note", caution) for caution in engine["cautions"])


def _prune(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "kept", f"{len(result['layers'])} of {result['total']} layers: {', '.join(result['layers'])}"
    yield "size", f"{result['bytes'] / 1e6:.2f} MB (the whole adapter: {result['of_bytes'] / 1e6:.2f} MB)"
    if not result["losses"]:
        yield "loss", "not taken: no held-out rows, or none wanted"
    for row in result["losses"]:
        here = " ← this adapter" if row["layers"] == len(result["layers"]) else ""
        yield f"loss, {row['layers']}", f"{row['loss']:.4f}{here}"
    if result["losses"]:
        yield "", f"mean per label over {result['rows']} held-out rows; the number is that of layers with their adapter"
    yield "written", result["path"]


def _inspect(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    fields = ", ".join(f"{k}={v!r}" for k, v in result["method"].items() if k != "name")
    yield "method", f"{result['method'].get('name', 'unknown')} ({fields})"
    yield "base", result["base"] or "not named"
    share = "" if result["share"] is None else f" of {result['of']:,} = {result['share']:.2%} of the model"
    yield "changed", f"{result['entries']:,} weights{share}, in {result['parameters']} parameters"
    yield "size", f"{result['bytes'] / 1e6:.2f} MB"
    for name, record in result["other"].items():
        yield "other", f"{name}: {record['entries']:,} entries ({record['kind']}) in {record['parameters']} parameter(s)"
    if "unmasking" in result:
        yield from _unmasking(result["unmasking"])
    if "layers" in result:
        yield from _probes(result["layers"])
    if "overlap" in result:
        yield from _overlap(result)
    if result["picture"] is not None:
        yield "picture", result["picture"]


def _unmasking(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    static = record["budget"] * record["updates"]
    yield "unmasked", f"{record['touched']:,} entries in {record['updates']:,} updates, {record['trained']:,} trained at the end"
    yield "writes", f"{record['writes']:,} single updates = {record['writes'] / static:.1%} of a static choice's {static:,}"
    for kind, entries in sorted(record["kinds"].items(), key=lambda item: -item[1]):
        yield "", f"{kind}: {entries:,}"
    for name, shared in record["overlap"].items():
        yield "in common", f"{shared['entries']:,} = {shared['share']:.1%} with the {name}"
    yield "picture", record["picture"]


def _probes(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    at_once = sum(row["visits"] for row in record["rows"]) / max(record["updates"], 1)
    yield "layers", f"{at_once:.0f} of {len(record['rows'])} trained at a time, {record['updates']:,} updates"
    if record["probes"]:
        skipped = f", {record['skipped']:,} of them without a finite loss" if record["skipped"] else ""
        yield "probes", f"{record['probes']:,} in {record['seconds']:.1f} s{skipped}"
    yield "picture", f"{record['picture']}, as a table {record['table']}"


def _in_turn(record: dict[str, Any]) -> Table:
    """The layers that matter most, or where that is not known those trained most often."""
    rows = record["rows"]
    ranked = all(row["rank"] is not None for row in rows)
    order = sorted(rows, key=lambda row: row["rank"] if ranked else -row["visits"])[:_TOP]
    more = f", the first {_TOP} of {len(rows)}" if len(rows) > _TOP else ""
    title = f"layers by {'importance' if ranked else 'updates that trained them'}{more}"
    table = Table(box=None, title=title, title_justify="left", title_style="bold", min_width=len(title))
    table.add_column("layer")
    for name in (["importance"] if ranked else []) + ["updates", "share"]:
        table.add_column(name, justify="right")
    for row in order:
        importance = [f"{row['importance']:+.3f}"] if ranked else []
        table.add_row(row["layer"], *importance, f"{row['visits']:,}", f"{row['share']:.1%}")
    return table


def _overlap(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    overlap = result["overlap"]
    yield "with", result["with"]
    shares = f"{overlap['share']:.2%} of this adapter, {overlap['share_of_other']:.2%} of the other"
    yield "overlap", "none: disjoint" if overlap["disjoint"] else f"{overlap['entries']:,} entries = {shares}"
    for name, entries in overlap["projections"].items():
        if entries:
            yield "", f"{name}: {entries:,}"


def _layers(projections: dict[str, Any]) -> Table:
    """Layers × projections: chosen heads or blocks, slices or entries."""
    table = Table(box=None, title="chosen per layer", title_justify="left", title_style="bold")
    table.add_column("layer", justify="right")
    for name, record in projections.items():
        table.add_column(f"{name}\n{_unit(record)}", justify="right")
    for layer in sorted({layer for record in projections.values() for layer in record["chosen"]}):
        counts = (record["chosen"].get(layer) for record in projections.values())
        cells = (
            "–" if n is None else f"{n // record.get('block', 1):,}"
            for n, record in zip(counts, projections.values(), strict=True)
        )
        table.add_row(str(layer), *cells)
    table.add_row("all", *(f"{record['share']:.2%}" for record in projections.values()), style="bold")
    return table


def _unit(record: dict[str, Any]) -> str:
    if "along" not in record:
        return "entries" if record["kind"] != "slices" else "slices"
    what = record["along"]
    if record["block"] > 1:
        return f"blocks of {record['block']} {what}, of {record['width'] // record['block']}"
    return f"{what} of {record['width']}"


_ROWS: dict[str, Rows] = {
    "run": _run,
    "score": _score,
    "verify": _verify,
    "methods": _methods,
    "inspect": _inspect,
    "prune": _prune,
    "doctor": _doctor,
}
