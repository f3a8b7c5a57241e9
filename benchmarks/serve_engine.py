"""Cost of many adapters in the engine: tokens per second with none, 1, 16, 64 and 1,000 of them, memory, and loading.

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

import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lib import command_line, pictures
from lib import results as files
from lib.machine import device, held, settle
from lib.tables import table as markdown

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


def adapter(model: Any, size: str, seed: int) -> Any:
    """An adapter of a size, its columns changed by a third of a weight's spread."""
    from lib.random_adapters import changed, head, some

    generator = torch.Generator().manual_seed(seed)
    channels, heads = SIZES[size]
    parameters, layers = dict(model.named_parameters()), model.config.num_hidden_layers

    def places() -> Iterator[tuple[str, Any]]:
        with_head = torch.randperm(layers, generator=generator)[:heads].tolist()
        for layer in range(layers):
            down, o = (f"model.layers.{layer}.{part}.weight" for part in ("mlp.down_proj", "self_attn.o_proj"))
            chosen = {down: some(tuple(parameters[down].shape), 1, channels, generator)}
            if layer in with_head:
                chosen[o] = head(tuple(parameters[o].shape), 1, generator)
            yield from chosen.items()

    def change(name: str, base: torch.Tensor) -> torch.Tensor:
        return base + torch.randn(base.shape, generator=generator) * 0.3 * parameters[name].std().item()

    return changed(parameters, places(), change, method={"name": "drawn"}, base=MODEL)


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
    floor, rows = min(results["base"]["seconds"]), []
    for result in results.values():
        loads = sorted(result["load"])
        many = len(loads) > 10
        rows.append(
            [
                result["label"],
                f"{1 / statistics.median(result['seconds']):.0f}",
                f"{1 / min(result['seconds']):.0f}",
                f"{floor / min(result['seconds']):.2f}",
                f"{result['memory'] / 1e9:.2f}",
                f"{result['adapters'] / 1e9:.2f}",
                f"{1e3 * statistics.median(loads):.1f}" if many else "",
                f"{1e3 * loads[int(0.95 * len(loads))]:.1f}" if many else "",
            ]
        )
    head = "| | tokens/s | fastest turn | ÷ base only | memory of the process GB | of it adapters GB | hot load ms | p95 |"
    title = f"### Adapters of {channels} of 1,536 channels in each layer and {heads} of 270 heads\n"
    return "\n".join([title, *markdown(head, rows)]) + "\n"


def picture(measured: dict[str, Any], path: Path) -> None:
    """Bars of throughput and of memory."""
    height = 0.6 + 2.2 * len(measured)
    with pictures.panels(path, len(measured), 2, figsize=(10, height), squeeze=False) as (_, panels):
        for (left, right), (size, results) in zip(panels, measured.items(), strict=True):
            rows = list(results.values())[::-1]
            labels = [row["label"].split(",")[0] if row["label"][0] != "1" else row["label"].split(", all")[0] for row in rows]
            pictures.bars(left, labels, [1 / statistics.median(row["seconds"]) for row in rows], ".0f")
            pictures.bars(right, labels, [row["memory"] / 1e9 for row in rows], ".2f", colour=pictures.RED)
            left.set_xlabel("tokens per second (median turn)")
            right.set_xlabel("memory of the process, GB")
            right.set_yticks([])
            each = next(row["adapters"] / COUNTS[name] for name, row in results.items() if COUNTS[name])
            left.set_title(f"adapters of {each / 1e6:.1f} MB ({size})", fontsize=10, loc="left")


def main() -> None:
    """Measure, print and write."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="ffn")
    parser.add_argument("--only", nargs="+", choices=LABELS, help="contestants; default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare tokens with merged weights instead")
    parser.add_argument("--folder", type=Path, help="where adapters are written and looked for; default: a temporary one")
    command_line.add_output(parser, "serve-engine")
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
            adapter(model, size, i).save(folder / str(i))


def write(results: dict[str, Any], size: str, output: Path) -> None:
    """Add these results to the files of both sizes."""
    stored = files.read(output).get("sizes", {}) | {size: results}
    measured = {name: stored[name] for name in SIZES if name in stored}
    head = (
        f"# Many adapters in one batch, end to end\n\n`python benchmarks/serve.py --part engine [--size demo]` on {device()}: "
        f"{MODEL}, fp32, batches of {BATCH}, prompts of 16 to 32 tokens, answers of 24 to 40, room for {CACHE:,} cached tokens. "
        "Ratios compare the fastest turns, to which other work on the machine has added least.\n\n"
    )
    text = head + "\n".join(table(found, name) for name, found in measured.items())
    files.write(output, {"device": device(), "sizes": measured}, text, lambda path: picture(measured, path), indent=None)


if __name__ == "__main__":
    main()
