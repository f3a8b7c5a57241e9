"""Adapters that Intaglio 0.1.0 saved still load, apply, revert and save again to the last bit. This test never changes."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel

import intaglio.hf  # noqa: F401  # teaches PEFT our type
from intaglio import AdapterPool, Delta
from support import tiny

DATA = Path(__file__).parents[1] / "data/adapters-0.1"
SAVED = {  # folder -> method, kind of every parameter, parameters, entries, type
    "slices": ("s2ft", "slices", 8, 1920, torch.bfloat16),
    "elements": ("id3", "elements", 6, 1083, torch.float32),
    "whole": ("bitfit", "whole", 5, 160, torch.float32),
}


def tensors(name, which):
    """The "base" or "tuned" tensors of the parameters that an adapter changes."""
    found = safetensors.torch.load_file(DATA / f"{name}.safetensors")
    return {key.removeprefix(f"{which}/"): tensor for key, tensor in found.items() if key.startswith(f"{which}/")}


def tree(values):
    """A module that holds tensors under the names of parameters."""
    root = torch.nn.Module()
    for name, value in values.items():
        module = root
        *path, key = name.split(".")
        for step in path:
            if step not in module._modules:
                module.add_module(step, torch.nn.Module())
            module = module._modules[step]
        module.register_parameter(key, torch.nn.Parameter(value.clone()))
    return root


def holds(model, expected):
    parameters = dict(model.named_parameters())
    return all(torch.equal(parameters[name], tensor) for name, tensor in expected.items())


@pytest.fixture(params=SAVED)
def name(request):
    return request.param


def test_what_was_saved_is_read(name):
    method, kind, parameters, entries, dtype = SAVED[name]
    delta = Delta.load(DATA / name)
    assert delta.method["name"] == method
    assert {e.kind for e in delta.selection.values()} == {kind}
    assert (len(delta.selection), delta.selection.size, delta.of) == (parameters, entries, 21664)
    assert {values.dtype for values in delta.values.values()} == {dtype}
    assert delta.base == "org/tiny-llama"


def test_it_applies_and_reverts_bit_for_bit(name):
    base, tuned = tensors(name, "base"), tensors(name, "tuned")
    model, delta = tree(base), Delta.load(DATA / name)
    assert not holds(model, tuned)
    for _ in range(2):
        delta.apply_(model)
        assert holds(model, tuned)
        delta.revert_(model)
        assert holds(model, base)


def test_the_pool_puts_it_on_and_takes_it_off_bit_for_bit(name):
    base, tuned = tensors(name, "base"), tensors(name, "tuned")
    pool = AdapterPool(tree(base))
    pool.load("saved", DATA / name)
    pool.use("saved")
    assert holds(pool.model, tuned)
    pool.use(None)
    assert holds(pool.model, base)


def test_saving_again_gives_the_same_weights(name, tmp_path):
    folder = Delta.load(DATA / name).save(tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (DATA / name / weights).read_bytes()


def test_peft_merges_it_bit_for_bit(name):
    base, tuned = tensors(name, "base"), tensors(name, "tuned")
    model = tiny.build("gqa_llama", dtype=SAVED[name][-1])
    model.load_state_dict(base, strict=False)
    assert holds(PeftModel.from_pretrained(model, str(DATA / name)).merge_and_unload(), tuned)
