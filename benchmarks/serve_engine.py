"""What many adapters cost the engine: tokens per second with none, 1, 16, 64 and 1,000 of them, memory, and loading.

Requests of 16 to 32 prompt tokens and 24 to 40 answer tokens (48 on average) keep a batch of 64 full. With 64 and 1,000
adapters every request of a batch has another one; with 1,000, most of them were not in the batch before. Each contestant lives
in a process of its own, so that its memory is its own, and the processes take turns (`turns.py`): compare the ratios.

    python benchmarks/serve.py --part engine                     # adapters of the FFN alone, 2 % of its channels
    python benchmarks/serve.py --part engine --size demo         # as recipes/demo.yaml trains them
    python benchmarks/serve.py --part engine --check             # tokens against merged weights, 24 adapters and the base

The model is SmolLM2-135M in fp32; adapters are drawn at random, which costs what trained ones would.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from held import held, settle
from turns import child, device, measure

MODEL, BATCH, REQUESTS = "smollm2-135m", 64, 128
# name → channels of each down projection, and layers in which a head of the output projection is trained
SIZES = {"ffn": (31, 0), "demo": (46, 16)}
COUNTS = {"base": 0, "one": 1, "sixteen": 16, "batch": 64, "thousand": 1000}
LABELS = {
    "base": "base only",
    "one": "1 adapter",
    "sixteen": "16 adapters",
    "batch": "64 adapters, all of a batch different",
    "thousand": "1,000 adapters, all of a batch different",
}


def draw(model: Any, size: str, seed: int) -> Any:
    """An adapter of a size, its columns changed by a third of a weight's spread."""
    from intaglio import Delta, Selection
    from intaglio.selection import Slices
    from intaglio.slots import fingerprint

    generator = torch.Generator().manual_seed(seed)
    channels, heads = SIZES[size]
    parameters, config = dict(model.named_parameters()), model.config
    entries, values, prints = {}, {}, {}
    with_head = torch.randperm(config.num_hidden_layers, generator=generator)[:heads].tolist()
    for layer in range(config.num_hidden_layers):
        chosen = {"mlp.down_proj": torch.randperm(config.intermediate_size, generator=generator)[:channels].sort().values}
        if layer in with_head:
            head = int(torch.randint(config.num_attention_heads, (1,), generator=generator))
            chosen["self_attn.o_proj"] = head * 64 + torch.arange(64)
        for part, index in chosen.items():
            name = f"model.layers.{layer}.{part}.weight"
            entries[name] = Slices(tuple(parameters[name].shape), 1, index)
            base = entries[name].gather(parameters[name])
            values[name] = base + torch.randn(base.shape, generator=generator) * 0.3 * parameters[name].std().item()
            prints[name] = fingerprint(base)
    return Delta(Selection(entries), values, prints, {"name": "drawn"}, MODEL)


def start(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Load the model and the contestant's adapters; a turn serves requests."""
    from intaglio.hf.models import load_model
    from intaglio.serve.engine import Engine
    from intaglio.serve.store import AdapterStore

    model = load_model(MODEL, dtype=torch.float32)
    store = AdapterStore(model, base=MODEL)
    names = [None] if not COUNTS[task["contestant"]] else [str(i) for i in range(COUNTS[task["contestant"]])]
    settle()
    before, loads = held(), []
    for name in filter(None, names):
        began = time.perf_counter()
        store.load(name, Path(task["folder"]) / name)
        loads.append(time.perf_counter() - began)
    settle()
    figures = {"adapters_bytes": store.resident_bytes, "adapters_held": held() - before, "load": loads}
    engine = Engine(model, store, eos=[], max_batch=BATCH, max_context=512)
    engine.start()
    asked = 0

    def turn() -> dict[str, Any]:
        nonlocal asked
        run(engine, names, BATCH // 4, asked)  # warm the caches that the others have taken
        asked += BATCH // 4
        seconds, tokens = run(engine, names, REQUESTS, asked)
        asked += REQUESTS
        return {"times": [{"total": seconds / tokens}], "memory": held()}

    return figures, turn


def run(engine: Any, names: list[str | None], count: int, first: int) -> tuple[float, int]:
    """Seconds and tokens of some requests, all asked at once."""
    from intaglio.serve.engine import Sampling

    generator, over = torch.Generator().manual_seed(first), queue.Queue()
    tokens, began = 0, time.perf_counter()
    for i in range(first, first + count):
        prompt, answer = int(torch.randint(16, 33, (1,), generator=generator)), 24 + i * 7 % 17
        ids = torch.randint(100, 40000, (prompt,), generator=generator).tolist()
        name = names[i % len(names)]
        engine.submit(ids, Sampling(answer, temperature=0), lambda e: over.put(e) if e.finish else None, name)
        tokens += answer
    for _ in range(count):
        event = over.get(timeout=300)
        assert event.finish == "length", event
    return time.perf_counter() - began, tokens


def check(adapters: int, folder: Path, size: str) -> None:
    """Greedy tokens of mixed requests against those of merged weights."""
    from intaglio import Delta
    from intaglio.hf.models import load_model, load_tokenizer
    from intaglio.serve.engine import Engine, Sampling
    from intaglio.serve.store import AdapterStore

    model, tokenizer = load_model(MODEL, dtype=torch.float32), load_tokenizer(MODEL)
    prompt = tokenizer("The three largest cities of Europe, by the number of people, are")["input_ids"]
    deltas: dict[str | None, Any] = {None: None} | {str(i): Delta.load(folder / str(i)) for i in range(adapters)}
    store, answers, over = AdapterStore(model), {name: [] for name in deltas}, queue.Queue()
    for name in filter(None, deltas):
        store.load(name, folder / name)
    engine = Engine(model, store, eos=[], max_context=512)
    engine.start()

    def ask(name: str | None) -> None:
        def deliver(event: Any) -> None:
            answers[name].extend(event.tokens)
            if event.finish:
                over.put(event)

        engine.submit(prompt, Sampling(48, temperature=0), deliver, name)

    for name in deltas:
        ask(name)
    for _ in deltas:
        over.get(timeout=300)
    engine.stop()
    ids, same, seen = torch.tensor([prompt]), 0, set()
    for name, delta in deltas.items():
        if delta is not None:
            delta.apply_(model)
        settings = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        if delta is not None:
            delta.revert_(model)
        same += expected == answers[name]
        seen.add(tuple(expected))
    print(f"{same} of {len(deltas)} requests ({adapters} adapters and the base) gave the 48 greedy tokens of merged weights;")
    print(f"{len(seen)} different answers to one prompt")
    if same != len(deltas):
        raise SystemExit("not the same")


def table(results: dict[str, Any], size: str) -> str:
    """Markdown: throughput, its ratio to the base, memory and loading."""
    lines = [
        f"### Adapters of {SIZES[size][0]} of 1,536 channels and {SIZES[size][1]} of 270 heads\n",
        "| | tokens/s | fastest turn | ÷ base only | memory of the process GB | adapters GB | an adapter MB | load ms | p95 |",
        "|---" + "|---:" * 8 + "|",
    ]
    floor = results["base"]["fastest"]
    for name, result in results.items():
        count, loads = COUNTS[name], sorted(result["load"])
        of_one = f"{result['adapters_bytes'] / count / 1e6:.2f}" if count else ""
        median = f"{1e3 * statistics.median(loads):.1f}" if count > 1 else ""
        slowest = f"{1e3 * loads[int(0.95 * len(loads))]:.1f}" if count > 1 else ""
        cells = [
            result["label"],
            f"{1 / result['seconds']['total']:.0f}",
            f"{1 / result['fastest']:.0f}",
            f"{floor / result['fastest']:.2f}",
            f"{result['memory'] / 1e9:.2f}",
            f"{result['adapters_held'] / 1e9:.2f}" if count else "",
            of_one,
            median,
            slowest,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(measured: dict[str, Any], path: Path) -> None:
    """Bars of throughput and of memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(len(measured), 2, figsize=(10, 0.6 + 2.2 * len(measured)), layout="constrained", squeeze=False)
    for (left, right), (size, results) in zip(panels, measured.items(), strict=True):
        rows = list(results.values())[::-1]
        labels = [row["label"].split(",")[0] if row["label"][0] != "1" else row["label"].split(", all")[0] for row in rows]
        for axes, values, unit in (
            (left, [1 / row["seconds"]["total"] for row in rows], "tokens per second"),
            (right, [row["memory"] / 1e9 for row in rows], "memory of the process, GB"),
        ):
            axes.barh(labels, values, color="#4477aa" if axes is left else "#ee6677")
            for label, value in zip(labels, values, strict=True):
                axes.text(value, label, f" {value:.0f}" if axes is left else f" {value:.2f}", va="center", fontsize=8)
            axes.set_xlim(0, max(values) * 1.12)
            axes.set_xlabel(unit)
            axes.spines[["top", "right"]].set_visible(False)
        right.set_yticks([])
        left.set_title(f"adapters of {rows[0]['adapters_bytes'] / 1000 / 1e6:.1f} MB ({size})", fontsize=10, loc="left")
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="ffn")
    parser.add_argument("--only", nargs="+", choices=LABELS, help="contestants; default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare tokens with merged weights instead")
    parser.add_argument("--folder", type=Path, help="where adapters are written and looked for; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serve-engine"), help="name without suffix")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(start, json.loads(arguments.child))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.size
        names = arguments.only or list(LABELS)
        prepare(folder, arguments.size, 24 if arguments.check else max(COUNTS[name] for name in names))
        if arguments.check:
            check(24, folder, arguments.size)
            return
        labels = {name: LABELS[name] for name in names}
        results = measure(labels, {"folder": str(folder)}, arguments.rounds, one_by_one=False)
    print(table(results, arguments.size))
    write(results, arguments.size, arguments.output)


def prepare(folder: Path, size: str, count: int) -> None:
    """Write adapters that are not there yet."""
    from intaglio.hf.models import load_model

    model = load_model(MODEL, dtype=torch.float32)
    for i in range(count):
        if not (folder / str(i)).exists():
            draw(model, size, i).save(folder / str(i))


def write(results: dict[str, Any], size: str, output: Path) -> None:
    """Add these results to the files of both sizes."""
    stored = json.loads(output.with_suffix(".json").read_text())["sizes"] if output.with_suffix(".json").exists() else {}
    measured = {name: results if name == size else stored[name] for name in SIZES if name == size or name in stored}
    for result in results.values():
        result["load"] = [round(seconds, 5) for seconds in result["load"][:100]]
    head = (
        f"# Many adapters in one batch, end to end\n\n`python benchmarks/serve.py --part engine [--size demo]` on {device()}: "
        f"{MODEL}, fp32, batches of {BATCH}, prompts of 16 to 32 tokens, answers of 24 to 40. Ratios compare the fastest turns, "
        "to which other work on the machine has added least.\n\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps({"device": device(), "sizes": measured}, indent=1) + "\n")
    output.with_suffix(".md").write_text(head + "\n".join(table(results, name) for name, results in measured.items()))
    figure(measured, output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
