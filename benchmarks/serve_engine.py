"""What many adapters cost the engine: tokens per second with none, 1, 16, 64 and 1,000 of them, memory, and loading.

Requests of 16 to 32 prompt tokens and 24 to 40 answer tokens keep a batch of 64 full until the last of them. With 64 and 1,000
adapters every request of a batch has another one; with 1,000, most of them were not in the batch before. One engine serves all
contestants in turns, so that a noisy machine is equally unkind to all: compare the ratios. Its memory is read after the first
turn of each, before the adapters of the next are loaded.

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
from pathlib import Path
from typing import Any

import torch

from held import held, settle
from turns import device

MODEL, BATCH, REQUESTS = "smollm2-135m", 64, 96
CONTEXT, CACHE = 512, 56 * BATCH  # tokens of a request at most, and of all that run together
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
    from intaglio.core.entries import Slices
    from intaglio.core.fingerprint import fingerprint

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


def measure(folder: Path, only: list[str], rounds: int, save: Any) -> None:
    """Turns of the contestants; `save` gets the results after each round."""
    from intaglio.hf.models import load_model
    from intaglio.runtime.engine import Engine
    from intaglio.runtime.store import AdapterStore

    model = load_model(MODEL, dtype=torch.float32)
    store = AdapterStore(model, base=MODEL)
    engine = Engine(model, store, eos=[], max_batch=BATCH, max_context=CONTEXT, max_cache_tokens=CACHE)
    engine.start()
    run(engine, [None], 4, 0)  # warm up
    results: dict[str, dict[str, Any]] = {name: {"label": LABELS[name], "seconds": []} for name in only}
    for turn in range(rounds):
        for name in only:
            loads = load(store, folder, COUNTS[name])
            names = [str(i) for i in range(COUNTS[name])] or [None]
            results[name]["seconds"].append(run(engine, names, REQUESTS, turn * REQUESTS))
            if turn == 0:
                settle()
                results[name] |= {"memory": held(), "adapters": store.resident_bytes, "load": loads}
            print(f"round {turn + 1} of {rounds}: {name}, {1 / results[name]['seconds'][-1]:.0f} tokens/s", file=sys.stderr)
        save(results)
    engine.stop()


def load(store: Any, folder: Path, count: int) -> list[float]:
    """Load what is missing of the first `count` adapters; seconds of each."""
    seconds = []
    for i in range(len(store.infos()), count):
        began = time.perf_counter()
        store.load(str(i), folder / str(i))
        seconds.append(time.perf_counter() - began)
    return seconds


def run(engine: Any, names: list[Any], count: int, first: int) -> float:
    """Seconds per token of some requests, all asked at once."""
    from intaglio.runtime.engine import Sampling

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
    return (time.perf_counter() - began) / tokens


def check(adapters: int, folder: Path, size: str) -> None:
    """Greedy tokens of mixed requests against those of merged weights."""
    from intaglio import Delta
    from intaglio.hf.models import load_model, load_tokenizer
    from intaglio.runtime.engine import Engine, Sampling
    from intaglio.runtime.store import AdapterStore

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
    channels, heads = SIZES[size]
    lines = [
        f"### Adapters of {channels} of 1,536 channels in each layer and {heads} of 270 heads\n",
        "| | tokens/s | fastest turn | ÷ base only | memory of the process GB | of it adapters GB | hot load ms | p95 |",
        "|---" + "|---:" * 7 + "|",
    ]
    floor = min(results["base"]["seconds"])
    for result in results.values():
        loads = sorted(result["load"])
        cells = [
            result["label"],
            f"{1 / statistics.median(result['seconds']):.0f}",
            f"{1 / min(result['seconds']):.0f}",
            f"{floor / min(result['seconds']):.2f}",
            f"{result['memory'] / 1e9:.2f}",
            f"{result['adapters'] / 1e9:.2f}",
            f"{1e3 * statistics.median(loads):.1f}" if len(loads) > 10 else "",
            f"{1e3 * loads[int(0.95 * len(loads))]:.1f}" if len(loads) > 10 else "",
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
            (left, [1 / statistics.median(row["seconds"]) for row in rows], "tokens per second (median turn)"),
            (right, [row["memory"] / 1e9 for row in rows], "memory of the process, GB"),
        ):
            axes.barh(labels, values, color="#4477aa" if axes is left else "#ee6677")
            for label, value in zip(labels, values, strict=True):
                axes.text(value, label, f" {value:.0f}" if axes is left else f" {value:.2f}", va="center", fontsize=8)
            axes.set_xlim(0, max(values) * 1.12)
            axes.set_xlabel(unit)
            axes.spines[["top", "right"]].set_visible(False)
        right.set_yticks([])
        each = next(row["adapters"] / COUNTS[name] for name, row in results.items() if COUNTS[name])
        left.set_title(f"adapters of {each / 1e6:.1f} MB ({size})", fontsize=10, loc="left")
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.size
        names = arguments.only or list(LABELS)
        prepare(folder, arguments.size, 24 if arguments.check else max(COUNTS[name] for name in names))
        if arguments.check:
            check(24, folder, arguments.size)
            return
        measure(folder, names, arguments.rounds, lambda results: write(results, arguments.size, arguments.output))
    print(arguments.output.with_suffix(".md").read_text())


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
    head = (
        f"# Many adapters in one batch, end to end\n\n`python benchmarks/serve.py --part engine [--size demo]` on {device()}: "
        f"{MODEL}, fp32, batches of {BATCH}, prompts of 16 to 32 tokens, answers of 24 to 40, room for {CACHE:,} cached tokens. "
        "Ratios compare the fastest turns, to which other work on the machine has added least.\n\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps({"device": device(), "sizes": measured}) + "\n")
    output.with_suffix(".md").write_text(head + "\n".join(table(results, name) for name, results in measured.items()))
    figure(measured, output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
