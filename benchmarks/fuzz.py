"""Adapter folders damaged at random, put before every reader: each is refused by a ValueError, or read.

    python benchmarks/fuzz.py --write
    python benchmarks/fuzz.py --count 500 --seed 3

A folder of a tiny model (slices, entries, whole tensors, or a stock LoRA) gets one to three damages: values, types and keys of
its config, bits and lengths of its weights, tensors of other types, shapes, orders and numbers, with and without a hash that
fits. It is read by `Delta.load` and applied, by the server's store and by a pool, now and then by `inspect`, by PEFT and by
doctor. Wrong is: any other exception, a base that is not bit for bit what it was after a refusal or a revert, more than 256 MB
or 5 seconds, and a file outside the folder. The damage follows from the seed and a number, which are printed for whatever is
wrong.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lib import command_line, results
from lib.machine import device

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
JUNK: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "x" * 300, "\ud800", [], {}, [[]] * 9]
JUNK += ["float8_e4m3fn", "int8", "bfloat16", "../../etc", "lm_head.weight", [1, 2**40], [0], {"a": {"b": {}}}, "slices", "whole"]


def originals(place: Path, model: Any) -> list[Path]:
    """The folders that are damaged."""
    import torch
    from peft import LoraConfig, get_peft_model

    from intaglio import S2FT, BitFit, Random, attach

    folders, base = [], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    methods = {"slices": S2FT(o=0.5, down=0.25), "entries": Random(budget=0.02), "whole": BitFit(tensors="one_dimensional")}
    for name, method in methods.items():
        tuner = attach(model, method)
        with torch.no_grad():
            for slot in tuner.slots:
                slot.values.add_(0.25)
        folders.append(tuner.save(place / name))
        tuner.detach()
        model.load_state_dict(base)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    lora.save_pretrained(place / "lora")
    lora.unload()
    return [*folders, place / "lora"]


def in_config(config: Any, dice: random.Random) -> Any:
    """A config with one value, key or type changed somewhere."""
    if not isinstance(config, dict | list) or not config or dice.random() < 0.15:
        return dice.choice(JUNK)
    changed: Any = dict(config) if isinstance(config, dict) else list(config)
    key = dice.choice(list(changed) if isinstance(changed, dict) else range(len(changed)))
    kind = dice.random()
    if kind < 0.1:
        del changed[key]
    elif kind < 0.15 and isinstance(changed, dict):
        changed[dice.choice(["x", "", "model.norm.weight", "__class__"])] = changed.pop(key)
    else:
        changed[key] = in_config(changed[key], dice)
    return changed


def in_bytes(content: bytes, dice: random.Random) -> bytes:
    """Bytes with some of them changed, cut off, doubled or added."""
    data = bytearray(content)
    kind = dice.randrange(5)
    if kind == 0 and data:
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del data[dice.randrange(len(data) + 1) :]
    elif kind == 2:
        data += bytes(dice.randrange(256) for _ in range(dice.randint(1, 40)))
    elif kind == 3 and data:
        at = dice.randrange(min(len(data), 400))  # the header, and its length before it
        data[at] = dice.randrange(256)
    else:
        data[:8] = dice.choice([0, 1, 2**20, 2**62]).to_bytes(8, "little")
    return bytes(data)


def in_tensors(content: bytes, dice: random.Random) -> bytes:
    """A weights file with one tensor of another type, shape, order or content."""
    import safetensors.torch
    import torch

    tensors = safetensors.torch.load(content)
    key = dice.choice(sorted(tensors))
    tensor = tensors[key]
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.flip(0),
        lambda: tensor[:-1].clone(),
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor.to(dice.choice([torch.int64, torch.int16, torch.float16, torch.float64, torch.uint8, torch.bool])),
        lambda: torch.full_like(tensor, dice.choice([-1, 0, 7, 32767])),
        lambda: tensor * 0 + float("nan") if tensor.is_floating_point() else tensor * 0,
        lambda: tensor * 1e38 if tensor.is_floating_point() else tensor + 1_000,
        lambda: tensor.reshape(1, -1),
        lambda: tensor.new_empty(0),
    ]
    if dice.random() < 0.1:
        tensors[dice.choice(["x", key + ".x", "../x"])] = tensors.pop(key)
    else:
        tensors[key] = dice.choice(changes)().contiguous()
    return safetensors.torch.save(tensors)


def damage(source: Path, target: Path, dice: random.Random) -> str:
    """A damaged copy of a folder; what was done, in words."""
    config, weights, done = (source / CONFIG).read_bytes(), (source / WEIGHTS).read_bytes(), []
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        kind = dice.choice(["config", "config", "config bytes", "weights", "tensors", "tensors", "nesting"])
        done.append(kind)
        try:
            if kind == "config":
                config = json.dumps(in_config(json.loads(config), dice)).encode("utf-8", "surrogatepass")
            elif kind == "config bytes":
                config = in_bytes(config, dice)
            elif kind == "nesting":
                config = dice.choice([b"[", b'{"a":']) * dice.choice([100, 100_000])
            elif kind == "weights":
                weights = in_bytes(weights, dice)
            else:
                weights = in_tensors(weights, dice)
        except (ValueError, RuntimeError, IndexError, OSError):  # damaged already beyond that
            continue
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
    if dice.random() < 0.7:  # with a hash that fits, so that it is not all that is ever looked at
        try:
            fields = json.loads(config)
            if isinstance(fields, dict) and "sha256" in fields:
                config = json.dumps(fields | {"sha256": hashlib.sha256(weights).hexdigest()}).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            pass
    target.mkdir(exist_ok=True)
    (target / CONFIG).write_bytes(config)
    (target / WEIGHTS).write_bytes(weights)
    return "+".join(done)


def main() -> None:
    """Damage and read, until the count is reached."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="damaged folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    command_line.add_write(parser, "fuzz")
    arguments = parser.parse_args()
    import torch
    import transformers as tf

    from intaglio import AdapterPool, Delta
    from intaglio.doctor.examine import examine
    from intaglio.hf import DeltaConfig
    from intaglio.runs.inspect import inspect
    from intaglio.runtime.store import AdapterStore
    from lib.tiny_folder import SIZES

    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=96, **SIZES)).eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pool, store = AdapterPool(model), AdapterStore(model)

    def apply(path: Path) -> None:
        delta = Delta.load(path)
        delta.apply_(model)
        delta.revert_(model)

    def pooled(path: Path) -> None:
        pool.load("a", Delta.load(path))
        pool.use("a")
        pool.use(None)
        pool.unload("a")

    def served(path: Path) -> None:
        store.load("a", path)
        store.unload("a")

    readers: dict[str, tuple[Callable[[Path], object], int]] = {  # each how often
        "Delta.load, apply_, revert_": (apply, 1),
        "AdapterStore": (served, 2),
        "AdapterPool": (pooled, 4),
        "inspect": (inspect, 400),
        "PEFT's config": (lambda path: DeltaConfig.from_pretrained(str(path)), 50),
        "doctor": (lambda path: examine([f"a={path}"], "vllm"), 400),
    }
    tried: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sources = originals(place, model)
        around = sorted(path.name for path in place.iterdir())
        for number in range(arguments.start, arguments.start + arguments.count):
            dice = random.Random(f"{arguments.seed}/{number}")
            target = place / "damaged"
            what = damage(dice.choice(sources), target, dice)
            for reader, (read, every) in readers.items():
                if number % every:
                    continue
                tried[reader] += 1
                start = time.monotonic()
                try:
                    read(target)
                except (ValueError, OSError):
                    refused[reader] += 1
                except Exception as error:
                    wrong.append(
                        f"seed {arguments.seed} number {number} ({what}): {reader}: {type(error).__name__}: {error}"[:300]
                    )
                if time.monotonic() - start > 5:
                    wrong.append(
                        f"seed {arguments.seed} number {number} ({what}): {reader}: took {time.monotonic() - start:.0f} s"
                    )
            if number % 20 == 0 or len(wrong) > len(tried):
                changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base[name])]
                if changed:
                    wrong.append(f"seed {arguments.seed} up to number {number}: {changed[0]} of the base has changed")
                    model.load_state_dict(base)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if now - memory > 256_000:
                wrong.append(f"seed {arguments.seed} number {number} ({what}): {(now - memory) / 1000:.0f} MB more")
                memory = now
            if sorted(path.name for path in place.iterdir() if path != target) != around:
                wrong.append(f"seed {arguments.seed} number {number}: files outside the folder")
            shutil.rmtree(target)
            if number % 5_000 == 4_999:
                print(f"{number + 1:,} after {time.monotonic() - begin:.0f} s, {len(wrong)} wrong", flush=True)
    rows = [f"| {reader} | {tried[reader]:,} | {refused[reader]:,} | {tried[reader] - refused[reader]:,} |" for reader in readers]
    head = ["| reader | damaged folders | refused | read, or another exception |", "|---|--:|--:|--:|"]
    text = "\n".join([*head, *rows, "", f"Wrong: {len(wrong)}", *(f"* {line}" for line in wrong[:50])])
    print(text)
    if arguments.write:
        figures = {"count": arguments.count, "seed": arguments.seed, "tried": tried, "refused": refused, "wrong": wrong}
        lead = f"# Damaged adapters\n\n`{command_line.command()}`, {device()}, {time.monotonic() - begin:.0f} s.\n\n"
        results.write(arguments.write, {"device": device(), **figures}, lead + text + "\n")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
