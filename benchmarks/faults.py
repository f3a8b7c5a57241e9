"""Training killed at any moment, resumed, and compared bit for bit with the run that was never disturbed.

    python benchmarks/faults.py --write
    python benchmarks/faults.py --kills 2 --only s2ft-float32

S2FT, ID3, and LoRA whose layers train in turn (IST), each in fp32 and bf16, on a tiny model through `intaglio.train`. Some
kills come at a moment drawn from the whole run, some just before a file is put in place or written by torch; the others are
SIGTERM, a checkpoint with a flipped bit or a file removed, and a full disk (files may not grow beyond a bound). Then
`resume=True`. Right is: the same bytes of the adapter and the same losses. What was tried stays in the JSON file that is
written, and is not tried again.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lib import command_line, results
from lib.machine import device

METHODS: dict[str, dict[str, Any]] = {
    "s2ft": {"method": {"name": "s2ft", "o": 0.25, "down": 0.2}},
    "id3": {"method": {"name": "id3", "budget": 300, "until": 0.5}},
    "lora-ist": {
        "method": {"name": "lora", "r": 4},
        "schedule": {"name": "ist", "layers": 1, "interval": 2},
    },
}
KINDS = ("moment", "write", "moment", "write", "terminate", "flip", "remove", "full disk")


def blocks(place: Path, output: Path, case: str) -> dict[str, Any]:
    """The run file of a case."""
    method, _, dtype = case.rpartition("-")
    train = {"max_steps": 8, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    train |= {"use_cpu": True, "disable_tqdm": True, "output_dir": str(output)}
    model = {"name": str(place / f"model-{dtype}"), "dtype": dtype}
    return METHODS[method] | {"model": model, "data": {"train": str(place / "rows.jsonl")}, "train": train}


def outcome(run: Path) -> tuple[bytes, list[float]]:
    """The bytes of a run's adapter, and its losses."""
    history = json.loads((run / "run.json").read_text())["training"]["history"]
    return (run / "adapter/adapter_model.safetensors").read_bytes(), [row["loss"] for row in history if "loss" in row]


def disturbed(kind: str, place: Path, output: Path, case: str, seconds: float, dice: random.Random) -> str:
    """Disturb a run in one way; what was done, in words."""
    from intaglio import train
    from lib import forked

    log = place / "log"

    def work() -> None:
        train(blocks(place, output, case))

    if kind == "moment":
        after = dice.uniform(0.3 * seconds, seconds)
        status = forked.run(work, log, kill_after=after)
        return f"SIGKILL after {after:.2f} s (status {status})"
    if kind == "write":
        count = dice.randint(1, 40)

        def dying() -> None:
            forked.killed_at_write(count)
            work()

        return f"SIGKILL at write {count} (status {forked.run(dying, log)})"
    if kind == "terminate":
        after = dice.uniform(0.5 * seconds, seconds)
        return f"SIGTERM after {after:.2f} s (status {forked.run(work, log, kill_after=after, number=signal.SIGTERM)})"
    if kind == "full disk":
        bound = dice.randint(2_000, 60_000)

        def bounded() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bound, bound))
            work()

        return f"files of at most {bound:,} bytes (status {forked.run(bounded, log)})"
    forked.run(work, log)
    for name in ("run.json", "adapter"):  # killed in the final save, and damaged since
        target = output / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    files = sorted(path for path in (output / "checkpoint-8").rglob("*") if path.is_file() and path.name != "complete.json")
    victim = dice.choice(files)
    content = bytearray(victim.read_bytes())
    victim.unlink()
    if kind == "flip" and content:
        place_of_bit = dice.randrange(8 * len(content))
        content[place_of_bit // 8] ^= 1 << place_of_bit % 8
        victim.write_bytes(content)
    return f"{victim.name}: {'a bit flipped' if kind == 'flip' else 'removed'}"


def attempt(number: int, case: str, place: Path, whole: Path, seconds: float) -> dict[str, Any]:
    """Disturb a run, resume it, and compare; what was found."""
    from intaglio import train
    from lib import forked

    dice, kind = random.Random(f"{case}{number}"), KINDS[number % len(KINDS)]
    output = place / f"{case}-{number}"
    said = disturbed(kind, place, output, case, seconds, dice)
    saved = sorted(path.parent.name for path in output.glob("checkpoint-*/complete.json"))
    status = forked.run(lambda: train(blocks(place, output, case), resume=True), place / "log")
    right = status == 0 and outcome(output) == outcome(whole)
    left = [str(path.relative_to(output)) for path in output.rglob(".*.????????")] if output.exists() else []
    shutil.rmtree(output, ignore_errors=True)
    return {
        "case": case, "number": number, "kind": kind, "what": said, "checkpoints": len(saved), "right": right, "left": left,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by case and kind, as Markdown."""
    lines = [
        "| run | disturbed by | times | had a checkpoint | ended bit-identical | files left over |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        for kind in dict.fromkeys(KINDS):
            own = [row for row in rows if (row["case"], row["kind"]) == (case, kind)]
            if own:
                figures = (len(own), sum(row["checkpoints"] > 0 for row in own), sum(row["right"] for row in own))
                left = sum(len(row["left"]) for row in own)
                lines.append(f"| {case} | {kind} | {figures[0]} | {figures[1]} | {figures[2]} | {left} |")
    return "\n".join(lines)


def main() -> None:
    """Try what was not tried yet."""
    parser = command_line.parser(__doc__)
    cases = [f"{method}-{dtype}" for method in METHODS for dtype in ("float32", "bfloat16")]
    parser.add_argument("--kills", type=int, default=12, help="of each run")
    parser.add_argument("--only", nargs="+", choices=cases, default=cases)
    command_line.add_write(parser, "faults")
    arguments = parser.parse_args()
    import torch

    from intaglio import train
    from lib import forked, tiny_folder

    stored = arguments.write and arguments.write.with_suffix(".json")
    rows = json.loads(stored.read_text())["rows"] if stored and stored.is_file() else []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tiny_folder.rows(place / "rows.jsonl")
        for dtype in (torch.float32, torch.bfloat16):
            tiny_folder.model(place / f"model-{str(dtype).removeprefix('torch.')}", dtype)
        forked.run(lambda: train(blocks(place, place / "warm", arguments.only[0])), place / "log")  # files are in memory then
        for case in arguments.only:
            whole, begin = place / f"{case}-whole", time.monotonic()
            assert forked.run(lambda case=case, whole=whole: train(blocks(place, whole, case)), place / "log") == 0, (
                place / "log"
            ).read_text()[-2000:]
            seconds, known = time.monotonic() - begin, {row["number"] for row in rows if row["case"] == case}
            for number in range(arguments.kills):
                if number not in known:
                    rows.append(attempt(number, case, place, whole, seconds))
                    print(json.dumps(rows[-1]), flush=True)
            if arguments.write:
                text = f"# Training disturbed\n\n`{command_line.command()}`, {device()}.\n\n{table(rows)}\n"
                results.write(arguments.write, {"device": device(), "rows": rows}, text)
    print(table(rows))
    if not all(row["right"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
