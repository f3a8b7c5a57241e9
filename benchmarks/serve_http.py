"""Latency and tokens per second of `intaglio serve` on SmolLM2-135M, asked over HTTP by a second process.

    python benchmarks/serve_http.py                     # eight minutes on two cores
    python benchmarks/serve_http.py --adapters 16 --callers 8 --requests 32

Adapters are random: 48 of 1,536 FFN channels and one of nine heads in each of the 30 layers, as S2FT chooses them. Callers ask
one after the other, each time another adapter, streamed and greedy; the number of requests is fixed. "base" asks the same
server for the base only. All traffic stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from intaglio.core.entries import Slices
from intaglio.hf.models import load_model
from lib import command_line, results
from lib.machine import device
from lib.random_adapters import changed, head, some
from lib.server_process import Server
from lib.tables import table as markdown

BASE, KEY = "smollm2-135m", "benchmark"
CHANNELS = 48
TEXT = "Write one sentence about number {i}, the sea, and what a lighthouse keeper does in the evening when the fog comes in."


def main() -> None:
    """Run and print."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=128, help="per row, but at most 8 per caller")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--write", type=Path, help="also write files of this name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = measure(Path(place), arguments)
    print(table(result))
    if arguments.write:
        how = f"`{command_line.command()}` on {device()}: {BASE} in fp32, answers of {arguments.tokens} tokens, greedy, streamed."
        results.write(arguments.write, result, f"# `intaglio serve` over HTTP\n\n{how}\n\n{table(result)}\n")


def measure(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve as many adapters as asked for, and time what callers see."""
    folders = make_adapters(place, max(arguments.adapters))
    rows, loads = [], []
    with Server(place, BASE, "--adapter-root", place, "--max-batch", 64, "--max-context", 256, key=KEY) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=60) as http:
            ask_all(server.url, [BASE] * 4, 4, 8)  # first steps take longer
            for callers in arguments.callers:
                rows.append({"models": "base", "callers": callers, **load(server.url, [BASE], callers, arguments)})
            for count in arguments.adapters:
                for folder in folders[len(loads) : count]:
                    start = time.perf_counter()
                    body = {"lora_name": folder.name, "lora_path": folder.name}
                    http.post("/v1/load_lora_adapter", json=body).raise_for_status()
                    loads.append(time.perf_counter() - start)
                names = [folder.name for folder in folders[:count]]
                for callers in arguments.callers:
                    rows.append(
                        {"models": f"{count} adapters", "callers": callers, **load(server.url, names, callers, arguments)}
                    )
        memory = server.rss()
    hot = {"p50_ms": 1e3 * statistics.median(loads), "p95_ms": 1e3 * quantile(loads, 0.95), "adapters": len(loads)}
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    return {"rows": rows, "hot_load": hot, "adapter_bytes": size, "server_rss_mb": memory, "torch": torch.__version__}


def make_adapters(place: Path, count: int) -> list[Path]:
    """Random adapters in fp32, the type of the base."""
    parameters = dict(load_model(BASE).named_parameters())
    return [make_adapter(parameters, place / f"a{i}", i) for i in range(count)]


def make_adapter(parameters: dict[str, torch.nn.Parameter], folder: Path, seed: int) -> Path:
    """One adapter; see above."""
    generator = torch.Generator().manual_seed(seed)

    def places() -> Iterator[tuple[str, Slices]]:
        for name, parameter in parameters.items():
            if name.endswith("down_proj.weight"):
                yield name, some(tuple(parameter.shape), 1, CHANNELS, generator)
            elif name.endswith("o_proj.weight"):
                yield name, head(tuple(parameter.shape), 1, generator)

    def change(name: str, base: torch.Tensor) -> torch.Tensor:
        return base + 0.02 * torch.randn(base.shape, generator=generator)

    return changed(parameters, places(), change, method={"name": "random"}, base=BASE).save(folder)


def load(url: str, models: list[str], callers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: a fixed number of requests from so many callers."""
    count = min(arguments.requests, 8 * callers)
    start = time.perf_counter()
    answers = ask_all(url, [models[i % len(models)] for i in range(count)], callers, arguments.tokens)
    seconds = time.perf_counter() - start
    row = {"requests": count, "seconds": seconds, "tokens_per_second": sum(n for _, _, n in answers) / seconds}
    for name, column in (("first_token", 0), ("latency", 1)):
        times = [answer[column] for answer in answers]
        row |= {f"{name}_p50": quantile(times, 0.5), f"{name}_p95": quantile(times, 0.95)}
    print(json.dumps({"models": len(models), "callers": callers, **row}), flush=True)
    return row


def ask_all(url: str, models: list[str], callers: int, tokens: int) -> list[tuple[float, float, int]]:
    """(seconds to the first token, to the last, tokens) of each request."""

    async def all_of_them() -> list[tuple[float, float, int]]:
        waiting, answers = iter(enumerate(models)), []
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=callers)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits, trust_env=False) as http:

            async def caller() -> None:
                for i, model in waiting:
                    answers.append(await ask(http, model, i, tokens))

            await asyncio.gather(*(caller() for _ in range(callers)))
        return answers

    return asyncio.run(all_of_them())


async def ask(http: httpx.AsyncClient, model: str, i: int, tokens: int) -> tuple[float, float, int]:
    """One streamed request."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": TEXT.format(i=i)}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, count = time.perf_counter(), 0.0, 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - start
            count = (chunk["usage"] or {}).get("completion_tokens", count)
    return first, time.perf_counter() - start, count


def quantile(values: list[float], q: float) -> float:
    """Nearest-rank quantile."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    base = {row["callers"]: row["tokens_per_second"] for row in result["rows"] if row["models"] == "base"}
    rows = []
    for row in result["rows"]:
        times = (f"{row[f'{name}_{q}']:.2f}" for name in ("first_token", "latency") for q in ("p50", "p95"))
        speed = row["tokens_per_second"]
        rows.append(
            [row["models"], row["callers"], row["requests"], f"{speed:.0f}", f"{speed / base[row['callers']]:.2f}", *times]
        )
    hot = result["hot_load"]
    size, memory = result["adapter_bytes"] / 1e6, result["server_rss_mb"]
    lines = markdown(
        "| models | callers | requests | tokens/s | ÷ base | first token p50 s | p95 s | whole answer p50 s | p95 s |", rows
    )
    lines += ["", f"Hot load over HTTP, {hot['adapters']} adapters of {size:.1f} MB: median {hot['p50_ms']:.0f} ms,"]
    return "\n".join([*lines, f"p95 {hot['p95_ms']:.0f} ms. Memory of the server at the end: {memory:,.0f} MB."])


if __name__ == "__main__":
    main()
