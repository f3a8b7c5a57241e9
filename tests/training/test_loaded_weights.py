"""Slots and weights agree, whoever writes them: what is loaded into an attached model is followed, or refused with the cure."""

import copy
import warnings

import pytest
import torch

from intaglio import ID3, S2FT, BitFit, Delta, Random, attach
from support import tiny

NAME = "gqa_llama"
METHODS = {
    "slices": S2FT(o=0.5, down=0.25),
    "elements": Random(budget=0.05),
    "growing": ID3(budget=300, steps=8),
    "whole": BitFit(tensors="one_dimensional"),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def start(method, dtype=torch.float32):
    tuner = attach(tiny.build(NAME, dtype=dtype), method)
    return tuner, tuner.optimizer(torch.optim.AdamW, lr=1e-2)


def update(tuner, optimizer, *seeds):
    for seed in seeds:
        tuner.model(**tiny.batch(NAME, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "intaglio_slots" not in name}


def same(model, expected):
    return all(torch.equal(p, expected[name]) for name, p in weights(model).items())


def applied(tuner, dtype):
    fresh = tiny.build(NAME, dtype=dtype)
    Delta(**vars(tuner.delta()._contents())).apply_(fresh)
    return fresh


@each_type
@each_method
def test_the_best_weights_put_back_are_what_is_saved_and_left(method, dtype):
    """`load_best_model_at_end`: the weights of update 3, loaded after update 5."""
    tuner, optimizer = start(method, dtype)
    update(tuner, optimizer, 0, 1, 2)
    best = copy.deepcopy(tuner.model.state_dict())
    update(tuner, optimizer, 3, 4)
    tuner.model.load_state_dict(best)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(applied(tuner, dtype), best)
        assert same(tuner.detach(), best)


@each_type
@each_method
def test_training_goes_on_from_what_was_loaded(method, dtype):
    """An update after loading is that of a run which never made the updates in between; `.data` and in place alike."""
    tuner, optimizer = start(method, dtype)
    update(tuner, optimizer, 0, 1)
    here, moments = weights(tuner.model), copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(here)
    update(tuner, optimizer, 2)
    with torch.no_grad():
        for name, parameter in tuner.model.named_parameters():
            if name in here:
                parameter.copy_(here[name])
    assert moments is not None
    tuner.model(**tiny.batch(NAME, seed=9)).loss.backward()
    optimizer.step()
    moved = weights(tuner.model)
    changed = sum(int((moved[name] != twin[name]).sum()) for name in twin)
    step = max(float((moved[name] - twin[name]).abs().max()) for name in twin)
    assert changed
    assert step < 3e-2, "an update away from what was loaded, not from what had been trained"


@each_method
def test_exact_values_stay_where_what_is_loaded_is_their_rounding(method):
    tuner, optimizer = start(method, torch.bfloat16)
    update(tuner, optimizer, 0, 1)
    before = [slot.values.detach().clone() for slot in tuner.slots]
    tuner.model.load_state_dict(copy.deepcopy(tuner.model.state_dict()))
    tuner.delta()
    assert all(torch.equal(slot.values, values) for slot, values in zip(tuner.slots, before, strict=True))


@each_method
def test_weights_written_behind_the_counters_are_followed_too(method):
    """An EMA that swaps by `.data`."""
    tuner, optimizer = start(method)
    update(tuner, optimizer, 0, 1)
    average = {name: p + 0.25 for name, p in weights(tuner.model).items()}
    for name, entries in tuner.selection.items():
        parameter = tuner.model.get_parameter(name)
        entries.scatter_(parameter.data, entries.gather(average[name]))
    swapped = weights(tuner.model)
    assert same(applied(tuner, torch.float32), swapped)


@pytest.mark.parametrize("method", [METHODS["slices"], METHODS["growing"]], ids=["slices", "growing"])
def test_another_base_is_refused(method):
    """Also by a run that begins: a checkpoint of a whole model, tuned in entries that this run has not chosen."""
    other = tiny.build(NAME, seed=5).state_dict()
    tuner, optimizer = start(method)
    tuner.model.load_state_dict(other)
    tuner.model(**tiny.batch(NAME)).loss.backward()
    with pytest.raises(ValueError, match="differ from its base in entries that are not trained, which no adapter would hold"):
        optimizer.step()


def test_both_moved_is_refused():
    tuner = attach(tiny.build(NAME), METHODS["slices"])
    saved = copy.deepcopy(tuner.model.state_dict())
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)  # nobody follows it
    tuner.model(**tiny.batch(NAME)).loss.backward()
    optimizer.step()
    tuner.model.load_state_dict({name: tensor + 0.5 if name in tuner.selection else tensor for name, tensor in saved.items()})
    with pytest.raises(ValueError, match=r"differ from its base|so that either would be lost"):
        tuner.delta()
