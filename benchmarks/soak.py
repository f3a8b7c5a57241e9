"""Long runs that must stay flat: 2,000 updates of every method, adapters put on and taken off, switched and reloaded.

    python benchmarks/soak.py                   # ten minutes on one core
    python benchmarks/soak.py --only s2ft id3 switch
    python benchmarks/soak.py --rounds 200      # to see that all of it runs

Each subject is a small loop in a process of its own. From time to time it is measured: resident memory after what is free was
given back, tensors that the interpreter knows, open files, threads, and processor time of a round since the last measurement. A
subject is flat where the medians of the second and of the last quarter agree: what a first quarter fills (optimizer state,
caches, pools) may stay, what grows with every round may not. Results are kept as they come (--anew: from the start).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib import command_line, forked, machine, results
from lib.journal import Journal
from lib.tables import table

ROOT = Path(__file__).parent.parent
MEASURED = 40  # times in a run
# What a round may add, by the medians of the second and the last quarter; a round may take a quarter longer, as machines are.
ALLOWED = {"memory": 1024.0, "tensors": 0.05, "files": 0.0, "threads": 0.0}
SLOWER = 1.25

Round = Callable[[int], object]


def training(method: dict[str, Any], *, lora: bool = False) -> Round:
    """Updates of a tiny model under a method, or of a LoRA on it."""
    import torch

    from intaglio import Updates, attach
    from intaglio.methods import build
    from support import tiny

    model, built = tiny.build("gqa_llama"), build(method)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    updates = None if built.chooser.chooses_before else Updates()
    tuner = attach(model, built, probe=tiny.probe("gqa_llama", built), updates=updates)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3)

    def update(number: int) -> None:
        model(**tiny.batch("gqa_llama", seed=number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def attaching(place: Path) -> Round:
    """A method attached to one model, an update made, the adapter saved, and all taken off again."""
    import torch

    from intaglio import ID3, S2FT, attach
    from support import tiny

    model = tiny.build("gqa_llama")

    def turn(number: int) -> None:
        method, permute = (S2FT(o=0.5, down=0.25), number % 4 == 0) if number % 2 == 0 else (ID3(budget=100, steps=2), False)
        tuner = attach(model, method, permute=permute)
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3)
        model(**tiny.batch("gqa_llama", seed=number)).loss.backward()
        optimizer.step()
        tuner.save(place / "adapter")
        tuner.detach()
        model.zero_grad()

    return turn


def _saved(place: Path) -> tuple[Any, list[Path]]:
    """A base, and folders of adapters of rows, columns and single entries for it."""
    import torch

    from intaglio import ID3, S2FT, attach
    from support import tiny

    folders = []
    for number, method in enumerate(
        [S2FT(o=0.5, down=0.25), S2FT(q=0.5, down=None, o=None), ID3(budget=300, steps=1), S2FT(seed=3, o=0.5)]
    ):
        model = tiny.build("gqa_llama")
        tuner = attach(model, method)
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
        model(**tiny.batch("gqa_llama")).loss.backward()
        optimizer.step()
        folders.append(tuner.save(place / f"adapter-{number}"))
    return tiny.build("gqa_llama"), folders


def switching(place: Path) -> Round:
    """An `AdapterPool` that goes from one adapter to the next, with memory for half of them."""
    from intaglio import AdapterPool

    model, folders = _saved(place)
    pool, names = AdapterPool(model), [folder.name for folder in folders]
    for folder in folders:
        pool.load(folder.name, folder)
    size = pool.nbytes // 2
    pool.close()
    pool = AdapterPool(model, capacity_bytes=size)
    for folder in folders:
        pool.load(folder.name, folder)
    return lambda number: pool.use([*names, None][number % (len(names) + 1)])


def storing(place: Path) -> Round:
    """The server's store: an adapter loaded, used and unloaded."""
    from intaglio.runtime.store import AdapterStore

    model, folders = _saved(place)
    store = AdapterStore(model)

    def turn(number: int) -> None:
        store.load("a", folders[number % 2])
        store.fetch("a")
        store.unload("a")

    return turn


def loading_with_peft(place: Path) -> Round:
    """A `PeftModel` that loads one adapter more, answers with it, and deletes it."""
    from peft import PeftModel

    import intaglio.hf  # noqa: F401 - registers our type
    from support import tiny

    model, folders = _saved(place)
    peft_model: Any = PeftModel.from_pretrained(model, str(folders[0]), adapter_name="stays")

    def turn(number: int) -> None:
        peft_model.load_adapter(str(folders[number % 3]), adapter_name="comes")
        peft_model.set_adapter("comes")
        peft_model(**tiny.batch("gqa_llama", rows=1, length=4))
        peft_model.set_adapter("stays")
        peft_model.delete_adapter("comes")

    return turn


# What chooses something in a model of two layers; other methods run on their defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "s2ft": {"o": 0.5, "down": 0.25},
    "id3": {"budget": 500, "steps": 2000},
    "gradient": {"budget": 0.02},
    "snip": {"budget": 200},
    "ist": {"layers": 1, "interval": 5, "of": {"name": "s2ft", "o": 0.5, "down": 0.25}, "state": "offload"},
    "bitfit": {"tensors": "one_dimensional"},
    "rst": {"layers": 1, "of": {"name": "bitfit", "tensors": "one_dimensional"}},
    "lisa": {"layers": 1, "redraw": 20},
}


def subjects() -> dict[str, tuple[int, Callable[[Path], Round]]]:
    """Name → (rounds, what makes the loop)."""
    from intaglio.methods import METHODS

    methods = {name: {"name": name} | SETTINGS.get(name, {}) for name in METHODS}
    made: dict[str, tuple[int, Callable[[Path], Round]]] = {
        name: (2000, lambda _, method=method: training(method)) for name, method in methods.items()
    }
    made["lora+ist"] = 2000, lambda _: training({"name": "ist", "layers": 1, "interval": 5}, lora=True)
    return made | {
        "attach": (200, attaching),
        "switch": (1000, switching),
        "store": (1000, storing),
        "peft": (200, loading_with_peft),
    }


def measure(make: Callable[[Path], Round], rounds: int, place: Path) -> list[dict[str, float]]:
    """Go through the rounds and measure after every part of them."""
    import torch

    turn, every, found = make(place), max(1, rounds // MEASURED), list[dict[str, float]]()
    gc.collect()
    gc.freeze()  # libraries' objects: what is there already need not be looked at forty times
    start = time.process_time()
    for number in range(rounds):
        turn(number)
        if (number + 1) % every == 0:
            seconds = (time.process_time() - start) / every
            machine.settle()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            files, threads = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
            figures = {"round": number + 1, "seconds": seconds, "memory": machine.held(), "tensors": tensors}
            found.append(figures | {"files": files, "threads": threads})
            start = time.process_time()
    return found


def quarters(found: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Medians of the second and of the last quarter."""
    parts = [found[len(found) // 4 : len(found) // 2], found[-(len(found) // 4) :]]
    second, last = ({key: statistics.median(one[key] for one in part) for key in found[0]} for part in parts)
    return {key: (second[key], last[key]) for key in second}


def problems(found: Sequence[dict[str, float]]) -> list[str]:
    """What grows from round to round."""
    medians = quarters(found)
    rounds = medians["round"][1] - medians["round"][0]
    grown = {key: (medians[key][1] - medians[key][0]) / rounds for key in ALLOWED}
    wrong = [f"{key} grows by {grown[key]:g} a round" for key, allowed in ALLOWED.items() if grown[key] > allowed]
    second, last = medians["seconds"]
    return wrong + ([f"a round takes {last / second:.2f} times as long"] if last > SLOWER * second else [])


def page(found: dict[str, Any]) -> str:
    """Results as Markdown."""
    rows = []
    for name, measured in found.items():
        q = quarters(measured)
        pairs = [f"{a:,.0f} → {b:,.0f}" for a, b in (q[key] for key in ("tensors", "files", "threads"))]
        times, memory = (f"{a * by:.2f} → {b * by:.2f}" for (a, b), by in ((q["seconds"], 1e3), (q["memory"], 2.0**-20)))
        rows.append([f"`{name}`", f"{measured[-1]['round']:,}", times, memory, *pairs, "; ".join(problems(measured)) or "flat"])
    text = f"""# Long runs

`{command_line.command()}`, one of two CPU cores. Medians of the second and of the last quarter of each run. A round is an update
of a tiny model under that method; of `attach`: a method attached, an update, the adapter saved, all of it taken off; of `switch`:
a step of an `AdapterPool` with memory for half of its adapters; of `store`: an adapter loaded into the server's store and
unloaded; of `peft`: an adapter loaded into a `PeftModel`, used and deleted. Tensors: those made since the first round that still
live. Flat: at most 1 KB and 0.05 tensors more with every round, no file and no thread more, no round that takes a quarter longer.
"""
    head = "| subject | rounds | ms of the processor a round | memory, MB | tensors | files | threads | |"
    return "\n".join([text, *table(head, rows, "lrrrrrrl"), ""])


def main() -> None:
    """Go through what is left, print, and fail where anything grew."""
    sys.path.append(str(ROOT / "tests"))
    import torch

    torch.set_num_threads(1)
    known = subjects()
    parser = command_line.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="of every subject, instead of its own number")
    parser.add_argument("--only", nargs="+", choices=known)
    parser.add_argument("--work", type=Path, default=ROOT / "build/soak", help="a folder for results so far")
    parser.add_argument("--anew", action="store_true", help="forget results so far")
    command_line.add_write(parser, "soak")
    arguments = parser.parse_args()
    if arguments.anew:
        shutil.rmtree(arguments.work, ignore_errors=True)
    journal = Journal(arguments.work / "results.jsonl", {"rounds": arguments.rounds})
    for name in arguments.only or known:
        if name not in journal.found or arguments.only:
            rounds, make = known[name]
            journal.add(name, run(make, arguments.rounds or rounds))
            print(f"{name}: {'; '.join(problems(journal.found[name])) or 'flat'}", flush=True)
    found = {name: journal.found[name] for name in known if name in journal.found}
    print(page(found))
    if arguments.write:
        results.write(arguments.write, found, page(found))
    sys.exit(any(problems(measured) for measured in found.values()))


def run(make: Callable[[Path], Round], rounds: int) -> list[dict[str, float]]:
    """Measurements of a subject in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place, "answer.json")
        ended = forked.run(lambda: answer.write_text(json.dumps(measure(make, rounds, Path(place)))), timeout=3600)
        if ended.code != 0:
            raise SystemExit(f"a subject died with {ended.code}: {ended.output[-2000:]}")
        return json.loads(answer.read_text())


if __name__ == "__main__":
    main()
