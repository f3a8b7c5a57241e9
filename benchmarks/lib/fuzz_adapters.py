"""Two bases and a dozen adapters of every kind, tiny, that are damaged to see what readers make of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

from intaglio import Batches, Delta, attach
from intaglio.core.entries import Elements, Entries, Whole
from intaglio.export.lora import to_lora
from intaglio.hf import DeltaConfig
from intaglio.methods import build
from intaglio.runs.config import load_config
from lib.random_adapters import changed, some

Bases = Mapping[str, transformers.LlamaForCausalLM]


def bases() -> Bases:
    """A random model by type."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return {name: copy.deepcopy(model).to(getattr(torch, name)) for name in ("float32", "bfloat16")}


def adapters(models: Bases, place: Path) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Name → (type of the base, the folder's files): all kinds of entries, saved by us and by PEFT, stock LoRAs and exports."""
    found = {}
    for dtype, base in models.items():
        here = place / dtype
        for kind, places in _places().items():
            parameters: dict[str, Tensor] = dict(base.named_parameters())
            changed(parameters, places, lambda _, values: values * 1.5, method={"name": "random", "seed": 0}).save(here / kind)
        sparse = DeltaConfig(method={"name": "s2ft", "o": 0.5, "down": 0.2}, init_weights=False)
        peft.get_peft_model(copy.deepcopy(base), sparse).save_pretrained(str(here / "by-peft"))
        stock = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft.get_peft_model(copy.deepcopy(base), stock).save_pretrained(str(here / "lora"))
        to_lora(Delta.load(here / "columns"), base, here / "exported")
        _run(base, here / "run")
        for folder in sorted(here.iterdir()):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            found[f"{folder.name}, {dtype}"] = dtype, {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return found


def _run(base: transformers.LlamaForCausalLM, folder: Path) -> None:
    """The folder of a finished run, with the records of a method that unmasks and of one whose layers train in turn."""
    folder.mkdir()
    of = {"name": "id3", "budget": 20, "steps": 3}
    tuner = attach(copy.deepcopy(base), build({"name": "ist", "layers": 1, "interval": 1, "of": of}), probe=Batches([_batch(9)]))
    records = [regime.recorder() for regime in tuner.regimes]
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for number in range(3):
        tuner.model(**_batch(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for record in records:
        if record is not None:
            record.save(folder)
    tuner.save(folder / "adapter")
    blocks = {
        "model": {"name": "base"},
        "method": of,
        "data": {"train": "rows.jsonl"},
        "train": {"max_steps": 3, "output_dir": "run"},
    }
    config = load_config(blocks).model_dump(mode="json")
    result = {
        "output": "run",
        "config": config,
        "trainable": {"entries": 20, "of": 5456},
        "training": {"steps": 3, "history": []},
    }
    (folder / "run.json").write_text(json.dumps(result))


def _batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def _places() -> dict[str, list[tuple[str, Entries]]]:
    """The places of our adapters, by kind."""
    generator = torch.Generator().manual_seed(0)
    columns, rows, entries = list[tuple[str, Entries]](), list[tuple[str, Entries]](), list[tuple[str, Entries]]()
    for path in ("model.layers.0", "model.layers.1"):
        columns.append((f"{path}.self_attn.o_proj.weight", some((16, 16), 1, 4, generator)))
        columns.append((f"{path}.mlp.down_proj.weight", some((16, 24), 1, 4, generator)))
        rows.append((f"{path}.self_attn.q_proj.weight", some((16, 16), 0, 5, generator)))
        packed = torch.randperm(384, generator=generator)[:20].sort().values
        entries.append((f"{path}.mlp.up_proj.weight", Elements((24, 16), packed)))
    entries.append(("model.embed_tokens.weight", Elements((32, 16), torch.tensor([5, 77]))))
    whole: list[tuple[str, Entries]] = [
        ("model.norm.weight", Whole((16,))),
        ("model.layers.0.input_layernorm.weight", Whole((16,))),
    ]
    return {"columns": columns, "rows": rows, "entries": entries, "whole": [*whole, rows[0]]}
