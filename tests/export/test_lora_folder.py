"""What is no LoRA folder is refused by name, by the reader that turns one into a Delta and by the one that serves it."""

import json
import os

import pytest
import safetensors.torch
import torch

from intaglio.core.entries import Slices
from intaglio.core.selection import Selection
from intaglio.export.from_lora import read_lora
from intaglio.export.lora import to_lora
from intaglio.runtime.changes import LinearLayers
from intaglio.runtime.reading import read_adapter
from support import tiny
from support.exports import handmade, rewrite

PATH = "model.layers.1.mlp.down_proj"
A, B = (f"base_model.model.{PATH}.lora_{letter}.weight" for letter in "AB")


@pytest.fixture(scope="module")
def base():
    return tiny.build("gqa_llama")


@pytest.fixture
def folder(base, tmp_path):
    index = Slices(tuple(base.get_parameter(f"{PATH}.weight").shape), 1, torch.tensor([1, 5]))
    to_lora(handmade(base, Selection({f"{PATH}.weight": index})), base, tmp_path / "lora")
    return tmp_path / "lora"


def readers(base):
    return {"to delta": read_lora, "to serve": lambda folder: read_adapter(folder, LinearLayers(base))}


CONFIGS = {
    "alpha is a bool": ({"lora_alpha": True}, "lora_alpha=True: give a finite number"),
    "alpha is text": ({"lora_alpha": "8"}, "lora_alpha='8': give a finite number"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, "lora_alpha=nan: give a finite number"),
    "alpha is infinite": ({"lora_alpha": float("inf")}, "lora_alpha=inf: give a finite number"),
    "alpha is no float": ({"lora_alpha": 10**400}, "lora_alpha=1000"),
    "patterns are a list": ({"alpha_pattern": ["down_proj"]}, "alpha_pattern=.* must map names of modules to numbers"),
    "patterns are a number": ({"rank_pattern": 3}, "rank_pattern=3: must map names of modules to numbers"),
    "a pattern's alpha": ({"alpha_pattern": {"down_proj": "8"}}, r"alpha_pattern\['down_proj'\]='8': give a finite number"),
    "a pattern's rank": ({"rank_pattern": {"down_proj": 1.5}}, r"rank_pattern\['down_proj'\]=1.5: give a whole number"),
    "no expression": ({"alpha_pattern": {"(": 8}}, r"alpha_pattern: '\(' is no regular expression"),
    "too long": ({"alpha_pattern": {"a{99999999999}": 8}}, "is no regular expression"),
    "could take forever": ({"rank_pattern": {"([\\w.]+)+!": 8}}, "repeats a group, or is too long; give names of modules"),
    "many repeats": ({"alpha_pattern": {".*.*.*.*.*x": 8}}, "repeats a group, or is too long"),
    "flags": ({"alpha_pattern": {"(?i)Q_PROJ": 8}}, "is no regular expression"),
    "rank": ({"r": 0}, "r=0: give a whole number of at least 1"),
    "base": ({"base_model_name_or_path": 5}, "base_model_name_or_path=5: give a name"),
    "two at once": ({"r": None, "lora_alpha": None}, "r=None: .*; lora_alpha=None: "),
}


@pytest.mark.parametrize("reader", ["to delta", "to serve"])
@pytest.mark.parametrize("wrong", CONFIGS)
def test_damaged_configs(base, folder, wrong, reader):
    fields, message = CONFIGS[wrong]
    with pytest.raises(ValueError, match=f"lora: damaged config: .*{message}"):
        readers(base)[reader](rewrite(folder, **fields))


@pytest.mark.parametrize("reader", ["to delta", "to serve"])
@pytest.mark.parametrize("config", [[], "LORA", None, 3])
def test_configs_that_are_no_mapping(base, folder, config, reader):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lora/adapter_config\.json: damaged, not a mapping"):
        readers(base)[reader](folder)


PAIR = rf"{PATH}: LoRA factors A \[r, in\] and B \[out, r\] expected, found "
WEIGHTS = {
    "no partner": (lambda t: t.pop(A), rf"{PAIR}{{'B': \[32, 8\]}}"),
    "one dimension": (lambda t: t.update({A: torch.ones(48)}), rf"{PAIR}{{'A': \[48\], 'B': \[32, 8\]}}"),
    "three dimensions": (lambda t: t.update({B: torch.ones(2, 32, 8)}), PAIR),
    "a number": (lambda t: t.update({A: torch.tensor(1.0)}), PAIR),
    "two ranks": (lambda t: t.update({A: torch.ones(4, 48)}), PAIR),
    "no outputs": (lambda t: t.update({B: torch.ones(0, 8)}), PAIR),
    "no rank": (lambda t: t.update({A: torch.ones(0, 48), B: torch.ones(32, 0)}), PAIR),
    "integers": (lambda t: t.update({A: t[A].int()}), r"lora_A\.weight is of torch\.int32; factors are floating-point"),
    "truths": (lambda t: t.update({B: t[B].bool()}), r"lora_B\.weight is of torch\.bool"),
    "another tensor": (lambda t: t.update({"lm_head.weight": torch.ones(2)}), r"holds 'lm_head\.weight', which is no factor"),
    "nothing": (lambda t: t.clear(), "holds no LoRA factors"),
}


@pytest.mark.parametrize("reader", ["to delta", "to serve"])
@pytest.mark.parametrize("wrong", WEIGHTS)
def test_damaged_factors(base, folder, wrong, reader):
    spoil, message = WEIGHTS[wrong]
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    spoil(tensors)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"lora/adapter_model\.safetensors: .*{message}"):
        readers(base)[reader](folder)


@pytest.mark.parametrize("reader", ["to delta", "to serve"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: (file.unlink(), os.mkfifo(file)),
        lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    ],
    ids=["missing", "cut", "a pipe", "a device"],
)
def test_damaged_files(base, folder, spoil, reader):
    spoil(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora/adapter_model\.safetensors: missing, damaged or truncated"):
        readers(base)[reader](folder)


def test_both_read_what_is_whole(base, folder):
    """With a pattern's alpha, which both scale by."""
    rewrite(folder, alpha_pattern={"down_proj": 16})
    lora = read_lora(folder)
    adapter, kind, _ = read_adapter(folder, LinearLayers(base))
    change = adapter.changes[PATH]
    assert (kind, lora.scale(PATH)) == ("lora", 2.0)
    assert torch.equal(change.write.T, lora.modules[PATH][1][:, :2] * 2.0)
