"""Random traffic, 10,000 requests, from a second process: right answers only, proper statuses only, flat memory.

    python benchmarks/serve_soak.py                  # three minutes on two cores
    python benchmarks/serve_soak.py --requests 500

The server is `intaglio serve` on a tiny random model, with memory for half of its adapters. Each adapter changes the model so
much that its answers are its own, and every answer is compared with what the adapter merged into the base says. Callers load
and unload adapters, reuse their names for others, leave in the middle of an answer, and send bodies that must be refused
(tests/support/traffic.py). All traffic stays on 127.0.0.1.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from lib import command_line, results
from lib.server_process import Server
from lib.tables import table

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

from support import serving  # noqa: E402 - found by the line above
from support.traffic import Traffic, right_answers  # noqa: E402

PROMPTS = ["Common beginning of every prompt, long enough for a shared page. " + end for end in ("One", "Two", "Three", "Four")]
ADAPTERS, NAMES, CALLERS, KEY = 12, 16, 24, "soak"


def main() -> None:
    """Run, print, and fail where anything was wrong."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="also write files of this name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = soak(Path(place), arguments.requests, arguments.seed)
    print(page(result))
    if arguments.write:
        results.write(arguments.write, result, page(result))
    assert not result["faults"], "not every answer was right"
    assert result["exit_code"] == 0


def soak(place: Path, requests: int, seed: int) -> dict:
    """Serve, send, and say what happened."""
    twin = serving.Twin(serving.folder(place / "base"))
    folders = {f"f{i}": serving.make_adapter(twin.model, place / f"root/f{i}", i) for i in range(ADAPTERS)}
    shutil.copytree(folders["f0"], place / "root/damaged")
    (place / "root/damaged/adapter_model.safetensors").write_bytes(b"damaged")
    texts = right_answers(twin, folders, PROMPTS)
    gib = ADAPTERS / 2 * (folders["f0"] / "adapter_model.safetensors").stat().st_size / 2**30
    options = ("--adapter-root", "root", "--adapter-memory", gib, "--max-batch", 16, "--max-queue", 6)
    with Server(place, "base", *options, key=KEY) as server:
        traffic = Traffic(server.url, texts, PROMPTS, [f"n{i}" for i in range(NAMES)], key=KEY, seed=seed)
        memory = [(0, server.rss())]

        def every(done: int) -> None:
            memory.append((done, server.rss()))
            print(f"{done:6} requests, server's memory {memory[-1][1]:.1f} MB", flush=True)

        start = time.perf_counter()
        report = traffic.run(requests, CALLERS, every)
        seconds, metrics = time.perf_counter() - start, server.metrics()
    statuses: dict[str, dict[int, int]] = {}
    for (kind, status), count in sorted(report.statuses.items()):
        statuses.setdefault(kind, {})[status] = count
    return {
        "requests": sum(report.kinds.values()),
        "seconds": round(seconds, 1),
        "answers_checked_right": report.right,
        "faults": report.faults[:20],
        "statuses": statuses,
        "rss_mb": memory,
        "metrics": metrics,
        "exit_code": server.code,
    }


def page(result: dict) -> str:
    """The result as Markdown."""
    kinds = ((kind, ", ".join(f"{s}: {n}" for s, n in found.items())) for kind, found in result["statuses"].items())
    lines = [
        "# Random traffic against `intaglio serve`",
        "",
        f"{result['requests']:,} requests in {result['seconds']} s from {CALLERS} callers in another process; {ADAPTERS}",
        f"adapters under {NAMES} names that change, memory for half of them. {result['answers_checked_right']:,} answers were",
        f"compared with merged weights; faults: {len(result['faults'])}. Exit code after SIGTERM: {result['exit_code']}.",
        "",
        *table("| kind of request | status → how many |", kinds, "ll"),
        "",
        "`leave` with 499: the caller had left before there was an answer. 429: the queue of six was full.",
        "",
        *table("| requests done | server's memory (RSS), MB |", ((f"{n:,}", f"{mb:.1f}") for n, mb in result["rss_mb"]), "r"),
        "",
        *table("| gauge or counter at the end | |", ((f"`{name}`", f"{value:g}") for name, value in result["metrics"].items())),
        "",
    ]
    return "\n".join([*lines, *(f"* {fault}" for fault in result["faults"])])


if __name__ == "__main__":
    main()
