"""A hundred thousand damaged adapters through everything that reads one: the right weights, or one clear refusal.

    python benchmarks/fuzz.py                      # 100,000 of them, half an hour on one core
    python benchmarks/fuzz.py --count 2000
    python benchmarks/fuzz.py --only 4711 --show   # again: what was done to it, and what each reader said

Adapters of rows, columns, single entries and whole tensors, in fp32 and bf16, stock LoRAs, exported ones and folders of runs are
damaged at one to three places (lib/mutations.py) by a generator whose seed is --seed and the number of the adapter, and given to
every reader (lib/fuzz_readers.py). A reader has to give what the folder says, held against a plain one without a check
(lib/plain_reading.py), or raise ValueError or OSError. Whatever it does: the base stays as it was, bit for bit; nothing is
written outside its own folder; no process is started, nothing unpickled, no address asked; memory and time stay small. Results
are kept after every thousand; a second call goes on where the first stopped (--anew: from the start).
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lib import command_line, forked, results
from lib.guard import Guard
from lib.journal import Journal
from lib.tables import table

ROOT = Path(__file__).parent.parent
BATCH = 1000  # adapters of a process
ROOM, SECONDS, HANGING = 512 << 20, 2.0, 10  # of a reader: bytes, seconds of the processor, seconds until it is killed
MARK = "answers "  # what a line of them begins with
DRAWN = 40  # in one of so many, what takes long is done too: pictures, exports


class Fuzzer:
    """Bases, adapters to be damaged, and a folder to damage them in.

    Args:
        place: an empty folder, in memory if possible.
        seed: of all damage.
    """

    def __init__(self, place: Path, seed: int) -> None:
        from lib import fuzz_adapters
        from lib.fuzz_readers import Bench

        self.place, self.seed, self.trace, self._guard = place, seed, "", Guard(place)
        (place / "made").mkdir()
        self.benches = {name: Bench(base, place / "made") for name, base in fuzz_adapters.bases().items()}
        self.adapters = fuzz_adapters.adapters({name: bench.base for name, bench in self.benches.items()}, place / "seeds")

    def undamaged(self) -> dict[str, list[str]]:
        """What takes each adapter as it is: a fuzzer whose adapters are refused from the start finds nothing."""
        said = {name: self.read(*adapter) for name, adapter in self.adapters.items()}
        return {name: [reader for reader, (answer, _) in answers.items() if answer == "taken"] for name, answers in said.items()}

    def case(self, number: int) -> tuple[str, list[str], dict[str, tuple[str, str]]]:
        """An adapter, what is done to it, and what every reader makes of it: ("taken", "refused", "passed" or "wrong", why)."""
        from lib.mutations import mutate

        draw = random.Random(f"{self.seed} {number}")
        name = draw.choice(sorted(self.adapters))
        dtype, files = self.adapters[name]
        files = dict(files)
        done = mutate(files, draw)
        return name, done, self.read(dtype, files, drawn=number % DRAWN == 0)

    def read(self, dtype: str, files: dict[str, Any], *, drawn: bool = True) -> dict[str, tuple[str, str]]:
        """What every reader makes of a folder."""
        from lib.fuzz_readers import READERS
        from lib.mutations import write

        bench, folder = self.benches[dtype], self.place / "case"
        bench.drawn = drawn
        shutil.rmtree(folder, ignore_errors=True)
        write(files, folder)
        answers = {}
        for name, reader in READERS.items():
            start = time.process_time()
            with self._guard:
                answer = self._answer(reader, bench, folder)
            seconds = time.process_time() - start
            try:
                bench.check({}, "afterwards")
            except AssertionError as error:
                answer = "wrong", str(error)
                bench.renew()
            if self._guard.heard:
                answer = "wrong", f"does what no reader may: {'; '.join(self._guard.heard)}"
            elif seconds > SECONDS and not drawn:
                answer = "wrong", f"takes {seconds:.1f} s"
            answers[name] = answer
        return answers

    def _answer(self, reader: Callable[[Any, Path], bool], bench: Any, folder: Path) -> tuple[str, str]:
        try:
            return ("taken", "") if reader(bench, folder) else ("passed", "")
        except (ValueError, OSError) as error:
            return "refused", str(error)
        except Exception as error:
            self.trace = traceback.format_exc()
            return "wrong", f"{type(error).__name__}: {error}"

    def batch(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Cases in a process of its own, with little memory to grow into; one at which it dies counts, and the rest goes on."""
        left, counts, wrong, grown = list(numbers), Counter[str](), list[dict[str, Any]](), 0
        while left:
            ended = forked.run(partial(self._cases, left), timeout=HANGING * (len(left) + 1))
            told = [json.loads(line.removeprefix(MARK)) for line in ended.output.splitlines() if line.startswith(MARK)]
            for answer in told:
                counts.update(answer["counts"])
                wrong += answer["wrong"]
                grown = max(grown, answer["grown"])
            left = left[len(told) :]
            if ended.code != 0 and left:
                said = " ".join(ended.output.strip().splitlines()[-1:])
                wrong.append({"case": left.pop(0), "reader": "?", "what": f"the process ends with {ended.code}: {said:.200}"})
                counts["cases"] += 1
        return {"counts": dict(counts), "wrong": wrong, "grown": grown}

    def _cases(self, numbers: Iterable[int]) -> None:
        """Say what comes of each case, a line for each."""
        from lib import machine

        start = machine.held()
        room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        for number in numbers:
            signal.alarm(HANGING)
            name, done, answers = self.case(number)
            counts = {"cases": 1} | {f"{reader}: {answer}": 1 for reader, (answer, _) in answers.items()}
            about = {"case": number, "adapter": name, "done": done}
            wrong = [
                about | {"reader": reader, "what": why[:300]} for reader, (answer, why) in answers.items() if answer == "wrong"
            ]
            print(MARK + json.dumps({"counts": counts, "wrong": wrong, "grown": machine.peak() - start}), flush=True)


def page(found: dict[str, Any], seed: int) -> str:
    """Results as Markdown."""
    counts = Counter[str]()
    for one in found.values():
        counts.update(one["counts"])
    wrong = [one for batch in found.values() for one in batch["wrong"]]
    readers = sorted({key.partition(": ")[0] for key in counts if ": " in key})
    rows = [
        [f"`{name}`", *(f"{counts[f'{name}: {answer}']:,}" for answer in ("taken", "refused", "wrong", "passed"))]
        for name in readers
    ]
    grown = max((batch["grown"] for batch in found.values()), default=0) / 2**20
    shown = (
        f"{one['case']} ({one.get('adapter')}: {'; '.join(one.get('done', []))}), {one['reader']}: {one['what']}" for one in wrong
    )
    text = f"""# Damaged adapters

`{command_line.command()}`, one of two CPU cores: {counts["cases"]:,} adapters, damaged with seed {seed}, through every reader.
Wrong: {len(wrong)}. *Taken*: what the reader made of it is, bit for bit, what the folder says (a LoRA's product: to rounding);
damage that changes no value, or values and the hash with them, is taken rightly. *Refused*: `ValueError` or `OSError`. *Passed*:
not for this reader (LoRAs are PEFT's own to read, only runs have a run.json). The base was compared bit for bit after every
reader; writes elsewhere, processes, pickles and sockets were watched for by the interpreter's audit events. No process grew by
more than {grown:.0f} MB (a thousand adapters each); each had room for {ROOM >> 20}.
"""
    return "\n".join(
        [text, *table("| reader | taken | refused | wrong | passed |", rows), "", *(f"* {line}" for line in list(shown)[:50])]
    )


def load_libraries() -> None:
    """Load what readers load and warm up what writes on its first use, in one thread."""
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from matplotlib import font_manager

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    font_manager.findfont("DejaVu Sans")


def main() -> None:
    """Go through what is left, print, and fail where anything was wrong."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of adapters, to see these again")
    parser.add_argument("--show", action="store_true", help="with --only: what every reader said, and tracebacks")
    parser.add_argument("--work", type=Path, default=ROOT / "build/fuzz", help="a folder for results so far")
    parser.add_argument("--anew", action="store_true", help="forget results so far")
    command_line.add_write(parser, "fuzz")
    arguments = parser.parse_args()
    load_libraries()
    memory = Path("/dev/shm")  # noqa: S108  # a folder of ours in it
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as place:
        fuzzer = Fuzzer(Path(place).resolve(), arguments.seed)
        if arguments.only:
            show(fuzzer, arguments.only, traces=arguments.show)
            return
        if arguments.anew:
            shutil.rmtree(arguments.work, ignore_errors=True)
        journal = Journal(arguments.work / "results.jsonl", {"seed": arguments.seed, "batch": BATCH})
        for start in range(0, arguments.count, BATCH):
            if str(start) not in journal.found:
                journal.add(str(start), fuzzer.batch(range(start, min(start + BATCH, arguments.count))))
                print(f"{start + BATCH:,}: {len(journal.found[str(start)]['wrong'])} wrong", flush=True)
    print(page(journal.found, arguments.seed))
    if arguments.write:
        results.write(arguments.write, journal.found, page(journal.found, arguments.seed))
    sys.exit(any(one["wrong"] for one in journal.found.values()))


def show(fuzzer: Fuzzer, numbers: list[int], *, traces: bool) -> None:
    """Say what was done to some adapters and what came of it."""
    for number in numbers:
        name, done, answers = fuzzer.case(number)
        print(f"{number}: {name}: {'; '.join(done)}")
        for reader, (answer, why) in answers.items():
            print(f"  {reader}: {answer} {why}")
        if traces:
            print(fuzzer.trace)


if __name__ == "__main__":
    main()
