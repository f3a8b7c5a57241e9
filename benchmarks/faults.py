"""Training killed, ended, out of disk and with damaged checkpoints: every run that goes on must end as if nothing had been.

    python benchmarks/faults.py                     # 250 interrupted runs, fifteen minutes on one core
    python benchmarks/faults.py --rounds 1          # 54 of them
    python benchmarks/faults.py --only s2ft-float32-torn-checkpoint-0 --show

Each run is the command itself (`intaglio train run.yaml`, then with `--resume`) on a tiny model, in a process forked after the
libraries were loaded. It is interrupted by the clock, at one of its own writes or inside a file (lib/interruptions.py), some
twice, some with a file of the newest checkpoint spoilt as well; then it is resumed to its end. What it leaves is compared with an
uninterrupted run: weights and config of the adapter, logits, loss after every update, mean loss, records of what was chosen.
Results are kept as they come; a second call goes on where the first stopped (--anew: from the start).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lib import command_line, forked, results
from lib.interruptions import Interruption, damage, watch
from lib.journal import Journal
from lib.tables import table

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 8, 2  # updates, and updates between checkpoints
METHODS: dict[str, dict[str, Any]] = {
    "s2ft": {"method": {"name": "s2ft", "o": 0.25, "down": 0.1}},
    "id3": {"method": {"name": "id3", "budget": 500}},
    "lora+ist": {"method": {"name": "lora", "r": 2, "target_modules": "all-linear"}, "schedule": {"name": "ist"}},
}
DTYPES = ("float32", "bfloat16")
KINDS = {  # what is done to a run → in words
    "killed": "SIGKILL by the clock",
    "ended": "SIGTERM by the clock",
    "between-files": "SIGKILL between two writes of a checkpoint",
    "torn-checkpoint": "killed inside a file of a checkpoint",
    "ended-saving": "SIGTERM inside a checkpoint's save",
    "final-save": "SIGKILL or torn in the final save",
    "twice": "killed, resumed, and killed again",
    "full-checkpoint": "disk full while a checkpoint is saved",
    "full-final": "disk full in the final save",
    "damaged": "killed, then a file of the newest checkpoint spoilt",
}
# Of a record: what is not the run's but this process's, as seconds and, for ID3, the overlap with the first update's gradients,
# which a process that did not make that update does not have.
_OWN = ("seconds", "overlap")
INTERRUPTED = {"kill": {-signal.SIGKILL}, "tear": {-signal.SIGXFSZ}}  # exit codes; others are the command's own


@dataclass(frozen=True)
class Case:
    """One run and what is done to it."""

    method: str
    dtype: str
    kind: str
    number: int

    @property
    def key(self) -> str:
        return f"{self.method}-{self.dtype}-{self.kind}-{self.number}"


class Bench:
    """A folder with a tiny model, data and the uninterrupted runs that others are compared with."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed, self._whole = place, seed, dict[tuple[str, str], dict[str, Any]]()
        shutil.rmtree(place / "runs", ignore_errors=True)
        if not (place / "rows.jsonl").exists():
            from support import tiny

            tiny.save_folder(place / "base")
            rows = ({"prompt": f"q{i}+", "completion": f" {7 * i % 31}"} for i in range(16))
            (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(self, case: Case, folder: Path, *, resume: bool, what: Interruption | None) -> tuple[forked.Ended, Path]:
        """One process of a run; also the file in which it has listed its writes, if it came so far."""
        run_file, listed = folder.with_suffix(".yaml"), folder.with_suffix(".writes")
        settings = {"max_steps": STEPS, "save_steps": EVERY, "save_total_limit": 2, "logging_steps": 1, "learning_rate": 1e-2}
        settings |= {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, "output_dir": str(folder)}
        blocks = {"model": {"name": str(self.place / "base"), "dtype": case.dtype}, **METHODS[case.method]}
        blocks |= {"data": {"train": str(self.place / "rows.jsonl")}, "train": settings}
        folder.parent.mkdir(exist_ok=True)
        run_file.write_text(json.dumps(blocks))

        def work() -> None:
            from intaglio.__main__ import main

            sys.argv = ["intaglio", "train", str(run_file), *(["--resume"] if resume else [])]
            writes = watch(folder, what)
            try:
                main()
            finally:
                if what is None:
                    listed.write_text("\n".join(writes))

        clock = what is not None and what.at is None
        after = what.share * self.whole(case)["seconds"] if what is not None and clock else None
        sent = signal.SIGTERM if what is not None and what.act == "term" else signal.SIGKILL
        return forked.run(work, timeout=120, after=after, sent=sent), listed

    def whole(self, case: Case) -> dict[str, Any]:
        """What an uninterrupted run leaves, its seconds, and its writes."""
        key = case.method, case.dtype
        if key not in self._whole:
            folder = self.place / f"runs/whole-{case.method}-{case.dtype}"
            self._whole[key] = {"seconds": 1.0}
            ended, listed = self.train(case, folder, resume=False, what=None)
            assert ended.code == 0, ended.output
            self._whole[key] = {"seconds": ended.seconds, "left": left(folder), "writes": listed.read_text().splitlines()}
        return self._whole[key]

    def plan(self, case: Case) -> list[Interruption]:
        """The interruptions of a case, one after the other."""
        draw = random.Random(f"{self.seed} {case.key}")
        writes = self.whole(case)["writes"]
        saving = [i for i, write in enumerate(writes) if "checkpoint-" in write]
        final = list(range(saving[-1] + 1, len(writes)))
        clock = Interruption("kill", share=draw.uniform(0.02, 0.98))
        at, size = draw.choice(saving), draw.randrange(2500)
        last = Interruption(draw.choice(["kill", "tear"]), draw.choice(final), size=draw.randrange(400))
        return {
            "killed": [clock],
            "ended": [replace(clock, act="term")],
            "between-files": [Interruption("kill", at)],
            "torn-checkpoint": [Interruption("tear", at, size=size)],
            "ended-saving": [Interruption("term", at)],
            "final-save": [last],
            "twice": [Interruption("kill", at), Interruption("kill", draw.randrange(1, 25))],
            "full-checkpoint": [Interruption("full", at, size=size)],
            "full-final": [Interruption("full", draw.choice(final), size=draw.randrange(400))],
            "damaged": [Interruption("kill", draw.choice([i for i in saving if "checkpoint-2" not in writes[i]]))],
        }[case.kind]

    def run(self, case: Case, *, show: bool = False) -> dict[str, Any]:
        """Interrupt, resume, compare: what was done and everything that was wrong."""
        whole, plan, folder = self.whole(case), self.plan(case), self.place / f"runs/{case.key}"
        codes, wrong, made, said = list[int](), list[str](), 0, ""
        for number, what in enumerate(plan):
            ended, _ = self.train(case, folder, resume=number > 0, what=what)
            if show:
                print(f"--- {what}: {ended.code}\n{ended.output}")
            codes.append(ended.code)
            made = max(made, len(re.findall(r"'loss':", ended.output)))
            if answer := _answer(what, ended):
                wrong, said = wrong + answer, ended.output[-3000:]
        if case.kind == "damaged":
            self._spoil(case, folder)
        ended, _ = self.train(case, folder, resume=True, what=None)
        if show:
            print(f"--- resumed: {ended.code}\n{ended.output}")
        if ended.code != 0:
            wrong.append(f"resume ends with {ended.code}: {ended.output.strip().splitlines()[-1:]}")
            return {"plan": [asdict(what) for what in plan], "codes": codes, "wrong": wrong, "said": ended.output[-3000:]}
        now, result = left(folder), json.loads((folder / "run.json").read_text())
        wrong += [f"other {what}" for what in whole["left"] if now.get(what) != whole["left"][what]]
        hidden = sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))
        begun = int((result["training"]["resumed_from"] or "-0").rpartition("-")[2])
        shutil.rmtree(folder)
        about = {
            "plan": [asdict(what) for what in plan],
            "codes": codes,
            "again": max(0, made - begun) if len(plan) == 1 else None,
        }
        return about | {"resumed_from": begun, "hidden": hidden, "wrong": wrong, "said": said if wrong else ""}

    def _spoil(self, case: Case, folder: Path) -> None:
        """Spoil a file of the newest checkpoint."""
        draw = random.Random(f"spoil {self.seed} {case.key}")
        newest = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-1]
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        damage(draw.choice(files), draw.choice(["flip", "cut", "empty", "remove"]), draw.random())


def _answer(what: Interruption, ended: forked.Ended) -> list[str]:
    """What is wrong with how an interrupted process ended: killed, or by itself and without a traceback."""
    if ended.code in INTERRUPTED.get(what.act, set()) or ended.code == 0:  # it was over already, or nothing was too large
        return []
    wrong = ["a traceback"] if "Traceback" in ended.output else []
    if what.act == "full":
        return [*wrong, *([] if ended.code == 2 else [f"disk full ends with {ended.code}"])]
    return wrong if what.act == "term" else [*wrong, f"{what.act} ends with {ended.code}"]


def left(folder: Path) -> dict[str, str]:
    """What a run has left, as hashes: files of the adapter, logits, losses, records; no seconds."""
    files = [*sorted((folder / "adapter").glob("adapter_*")), folder / "check.safetensors"]
    found = {path.name: path.read_bytes() for path in files}
    for name in ("unmasking.json", "layers.json"):
        if (folder / name).exists():
            record = json.loads((folder / name).read_text())
            found[name] = json.dumps({key: value for key, value in record.items() if key not in _OWN}).encode()
    result = json.loads((folder / "run.json").read_text())
    history = [
        [entry[key] for key in ("step", "loss", "learning_rate")] for entry in result["training"]["history"] if "loss" in entry
    ]
    found |= {"losses": json.dumps(history).encode(), "mean loss": json.dumps(result["training"]["final_loss"]).encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def cases(rounds: int) -> Iterator[Case]:
    """All cases, round by round."""
    for number in range(rounds):
        for method in METHODS:
            yield from (Case(method, dtype, kind, number) for dtype in DTYPES for kind in KINDS)


def page(found: dict[str, dict[str, Any]], rounds: int) -> str:
    """Results as Markdown."""
    grouped = {kind: [found[case.key] for case in cases(rounds) if case.kind == kind and case.key in found] for kind in KINDS}
    rows = [[KINDS[kind], *_row(done)] for kind, done in grouped.items()]
    everything = [one for done in grouped.values() for one in done]
    wrong = [f"* `{key}`: {'; '.join(one['wrong'])}" for key, one in found.items() if one["wrong"]]
    columns = "runs | interrupted | ended as if nothing had been | a clear last word | updates made again, at most | left-overs"
    text = f"""# Training, interrupted

`{command_line.command()}`, one of two CPU cores: {len(everything)} runs of {STEPS} updates with a checkpoint every {EVERY}, of
{", ".join(METHODS)} in {" and ".join(DTYPES)}, interrupted and resumed to their end. Compared with the uninterrupted run, bit by
bit: the adapter's weights and config, the tuned model's logits, the loss of every update, the mean loss, and the records of ID3's
choices and IST's layers. Wrong: {len(wrong)}.

A run that was *not* interrupted was over before its moment came, or wrote no file that was too large. *A clear last word*:
killed at once, or ended by itself without a traceback, with 2 where the disk was full. *Left-overs*: hidden folders of saves that
were killed, which were still there after the run had ended.
"""
    return "\n".join(
        [
            text,
            *table(f"| what was done | {columns} |", [*rows, ["all", *_row(everything)]], "l"),
            "",
            *(wrong or ["Nothing was wrong."]),
            "",
        ]
    )


def _row(done: list[dict[str, Any]]) -> list[object]:
    again = [one["again"] for one in done if one.get("again") is not None]
    other = [any(what.startswith(("other", "resume")) for what in one["wrong"]) for one in done]
    unclear = [any(not what.startswith(("other", "resume")) for what in one["wrong"]) for one in done]
    hit = sum(any(one["codes"]) for one in done)
    counts = [len(done), hit, other.count(False), unclear.count(False)]
    return [*counts, max(again, default=""), sum(len(one.get("hidden", [])) for one in done)]


def main() -> None:
    """Run what is left to run, print, and fail where anything was wrong."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each method, type and kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="keys of cases, to run these again")
    parser.add_argument("--show", action="store_true", help="what the runs say")
    parser.add_argument("--work", type=Path, default=ROOT / "build/faults", help="a folder for runs and results so far")
    parser.add_argument("--anew", action="store_true", help="forget results so far")
    command_line.add_write(parser, "faults")
    arguments = parser.parse_args()
    if arguments.anew:
        shutil.rmtree(arguments.work, ignore_errors=True)
    load_libraries()
    bench = Bench(arguments.work.resolve(), arguments.seed)
    journal = Journal(arguments.work / "results.jsonl", {"seed": arguments.seed})
    for case in cases(arguments.rounds):
        if case.key in arguments.only if arguments.only else case.key not in journal.found:
            journal.add(case.key, bench.run(case, show=arguments.show))
            print(f"{case.key}: {'; '.join(journal.found[case.key]['wrong']) or 'right'}", flush=True)
    print(page(journal.found, arguments.rounds))
    if arguments.write:
        results.write(arguments.write, journal.found, page(journal.found, arguments.rounds))
    sys.exit(any(one["wrong"] for one in journal.found.values()))


def load_libraries() -> None:
    """Load what a run loads, in one thread, so that forked ones need not."""
    sys.path.append(str(ROOT / "tests"))
    import torch
    from datasets import disable_progress_bars

    import intaglio.__main__
    import intaglio.cli
    import intaglio.hf.trainer
    import intaglio.report.plots
    import intaglio.runs.train  # noqa: F401

    torch.set_num_threads(1)
    disable_progress_bars()


if __name__ == "__main__":
    main()
