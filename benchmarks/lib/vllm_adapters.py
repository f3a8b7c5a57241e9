"""Adapters for `vllm_check.py`: random sparse changes of a base, as one-hot LoRA, and what merged weights answer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from intaglio import Delta
from intaglio.core.entries import Slices
from intaglio.hf.models import load_model, load_tokenizer
from lib.random_adapters import changed, head, some

TOPICS = [
    "rivers", "bees", "winter", "trains", "bread", "whales", "clocks", "gravity", "islands", "paper", "music", "deserts",
    "glass", "horses", "volcanoes", "tea", "bridges", "stars", "forests", "ships", "salt", "maps", "cats", "iron",
]  # fmt: skip
PROMPTS = ("Write two sentences about {}.", "A long time ago, nobody knew anything about {}, until")
RANK = 64  # of all adapters, padded with zeros
SCALE = {"columns": 0.06, "rows": 0.1}  # of a change, so that answers differ from the base's but stay sane


def prepare(work: Path, base: str, kinds: Mapping[str, int], tokens: int) -> dict[str, Any]:
    """Write base, adapters and the merged weights' answers into a folder; what is there already is kept.

    Args:
        work: the folder.
        base: as `load_model` takes it.
        kinds: how many adapters of each key of `KINDS`, and of "ordinary".
        tokens: length of each greedy answer.

    Returns:
        prompts and answers (token ids), by adapter; "base" is among them.
    """
    done = work / "reference.json"
    wanted = {"base": base, "kinds": dict(kinds), "tokens": tokens}
    if done.exists() and (found := json.loads(done.read_text()))["of"] == wanted:
        return found
    model, tokenizer = load_model(base, dtype=torch.float32).eval(), load_tokenizer(base)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    names = ["base", *(f"{kind}-{i}" for kind, count in kinds.items() for i in range(count))]
    prompts = {name: [tokenizer(p.format(TOPICS[i % len(TOPICS)]))["input_ids"] for p in PROMPTS] for i, name in enumerate(names)}
    answers = {}
    for seed, name in enumerate(names):
        kind, folder = name.partition("-")[0], work / "adapters" / name
        answer = _ordinary(model, folder, seed) if kind == "ordinary" else _sparse(model, folder, kind, seed)
        answers[name] = answer(lambda tuned, name=name: [_greedy(tuned, prompt, tokens) for prompt in prompts[name]])
        print(f"{name}: {tokenizer.decode(answers[name][0])!r}")
    result = {"of": wanted, "prompts": prompts, "answers": answers}
    done.write_text(json.dumps(result))
    return result


Answer = Callable[[Callable[[Any], Any]], Any]  # calls its argument with the tuned model


def _sparse(model: Any, folder: Path, kind: str, seed: int) -> Answer:
    """A random change as LoRA; of the base none."""
    if kind == "base":
        return lambda ask: ask(model)
    delta = _delta(model, KINDS[kind], seed)
    _write(folder, delta, model)

    def merged(ask: Callable[[Any], Any]) -> Any:
        delta.apply_(model)
        try:
            return ask(model)
        finally:
            delta.revert_(model)

    return merged


def _write(folder: Path, delta: Delta, model: Any) -> None:
    """The LoRA folder that `intaglio export --to lora` writes, with rank 64 in all; without its check, which takes longer."""
    parameters, tensors = dict(model.named_parameters()), {}
    for name, entries in delta.selection.items():
        assert isinstance(entries, Slices)
        change = delta.values[name] - entries.gather(parameters[name])
        place = torch.nn.functional.one_hot(entries.index, entries.shape[entries.dim]).float()
        a, b = (place, change) if entries.dim == 1 else (change, place.T)
        padding = RANK - len(a)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, padding)).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = torch.nn.functional.pad(b, (0, padding)).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in delta.selection})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _ordinary(model: Any, folder: Path, seed: int) -> Answer:
    """A LoRA that is not one-hot."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["o_proj", "down_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(str(folder))
    return lambda ask: ask(tuned.merge_and_unload().eval())


def _delta(model: Any, choose: Callable[[int, torch.Generator], Mapping[str, Slices]], seed: int) -> Delta:
    """Random changes at the places that `choose` names for each layer."""
    generator = torch.Generator().manual_seed(seed)
    parameters, chosen = dict(model.named_parameters()), {}
    for layer in range(model.config.num_hidden_layers):
        for name, entries in choose(layer, generator).items():
            chosen[f"model.layers.{layer}.{name}.weight"] = entries

    def change(name: str, base: Tensor) -> Tensor:
        scale = SCALE["columns" if chosen[name].dim == 1 else "rows"]
        return base + scale * base.std() * 5 * torch.randn(base.shape, generator=generator)

    return changed(parameters, chosen.items(), change, method={"name": "random change"})


# SmolLM2-135M: 9 query and 3 key-value heads of 64, hidden 576, FFN 1536; the last dimension of a weight is its input.


def _columns(layer: int, generator: torch.Generator) -> dict[str, Slices]:
    """S2FT's: one of 9 heads and 48 of 1536 channels, in every layer."""
    return {"self_attn.o_proj": head((576, 576), 1, generator), "mlp.down_proj": some((576, 1536), 1, 48, generator)}


def _rows(layer: int, generator: torch.Generator) -> dict[str, Slices]:
    """A query, key and value head and channels of gate and up, in every third layer."""
    if layer % 3:
        return {}
    return {
        "self_attn.q_proj": head((576, 576), 0, generator),
        "self_attn.k_proj": head((192, 576), 0, generator),
        "self_attn.v_proj": head((192, 576), 0, generator),
        "mlp.gate_proj": some((1536, 576), 0, 20, generator),
        "mlp.up_proj": some((1536, 576), 0, 48, generator),
    }


def _both(layer: int, generator: torch.Generator) -> dict[str, Slices]:
    """Ragged: 1 to 64 of each, some modules of some layers."""
    shapes = {"mlp.down_proj": ((576, 1536), 1), "self_attn.v_proj": ((192, 576), 0), "mlp.up_proj": ((1536, 576), 0)}
    counts = torch.randint(-20, 65, (len(shapes),), generator=generator).tolist()
    return {n: some(*shape, count, generator) for (n, shape), count in zip(shapes.items(), counts, strict=True) if count > 0}


KINDS: dict[str, Callable[[int, torch.Generator], Mapping[str, Slices]]] = {"columns": _columns, "rows": _rows, "both": _both}


@torch.no_grad()
def _greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """The most likely continuation, token by token, past any end of text."""
    ids, cache, found = torch.tensor([prompt]), None, []
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        found.append(int(ids))
    return found
