"""What every method must hold on every architecture. A new method or model joins by being in METHODS or MODELS.

A method of another package joins by `INTAGLIO_CONTRACT=package.module:Class` in the environment.
"""

import copy
import dataclasses
import functools
import os

import pytest
import torch

from intaglio import AdapterPool, Delta, Selection, Updates, attach
from intaglio.methods import METHODS
from intaglio.methods import build as build_method
from support import tiny

# Settings that select something in a model of two layers with four heads; a method without a row runs on its defaults.
SETTINGS = {
    "s2ft": [
        {"o": 0.25, "down": 0.25},
        {"q": 0.25, "k": 0.5, "v": 0.5, "o": 0.5, "up": 6, "down": 10, "seed": 3},
        {"o": 0.5, "down": None, "select": "weight", "largest": True},
    ],
    "id3": [
        {"budget": 0.02, "steps": 20},
        {"budget": 301, "steps": 7, "exponent": 2, "eps": 0.1, "schedule": "cubic"},
    ],
    "gradient": [{"budget": 0.02}],
    "snip": [{"budget": 111}],
    "random": [{"budget": 0.05}, {"budget": 37, "seed": 1}],
    "pafi": [{"budget": 0.02}],
    "shira": [{"budget": 0.05}, {"budget": 111, "mask": "snip", "exclude": ("*.0.*",)}],
    "fishmask": [{"budget": 0.02}],
    "bitfit": [{"tensors": "one_dimensional"}],
    "ist": [
        {"layers": 1, "interval": 3, "of": {"name": "s2ft", "o": 0.5, "down": 0.25}, "state": "offload"},
        {"layers": 1, "interval": 2, "of": {"name": "id3", "budget": 0.02, "steps": 20}},
    ],
    "rst": [{"layers": 1, "of": {"name": "bitfit", "tensors": "one_dimensional"}, "policy": "contiguous"}],
    "lisa": [{"layers": 1, "redraw": 2}],
}
OWN = [name for name in [os.environ.get("INTAGLIO_CONTRACT")] if name]
CASES = [{"name": name} | fields for name in [*METHODS, *OWN] for fields in SETTINGS.get(name, [{}])]
build = functools.partial(build_method, allowed=[name.partition(".")[0].partition(":")[0] for name in OWN])
each_case = pytest.mark.parametrize("config", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
each_model = pytest.mark.parametrize("name", tiny.MODELS)


def attached(model, name, config, **kwargs):
    method = build(config)
    if not method.chooser.chooses_before:
        kwargs["updates"] = Updates(accumulation="exact")
    return attach(model, method, probe=tiny.probe(name, method), **kwargs)


def train(model, tuner, name, *, steps, accumulation=2, **kwargs):
    optimizer = tuner.optimizer(torch.optim.AdamW, **({"lr": 1e-2, "weight_decay": 0.1} | kwargs))
    for step in range(steps):
        for micro in range(accumulation):
            (model(**tiny.batch(name, seed=100 * step + micro)).loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@each_model
@each_case
def test_only_the_selection_moves_and_all_of_it(name, config):
    """S2FT checklist 8, 9 and 11: 20 AdamW steps with weight decay 0.1, clipping, accumulation 2: frozen entries keep
    every bit.
    """
    model = tiny.build(name)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    tuner = attached(model, name, config)
    optimizer = train(model, tuner, name, steps=20)
    moved = 0
    for key, before in start.items():
        after = dict(model.named_parameters())[key].detach()
        frozen = torch.ones(before.numel(), dtype=torch.bool)
        if key in tuner.selection:
            frozen[tuner.selection[key].flat()] = False
        assert torch.equal(after.flatten()[frozen], before.flatten()[frozen])
        moved += int((after != before).sum())
    assert moved == tuner.selection.size
    assert sum(p.numel() for p in tuner.parameters()) == tuner.selection.size
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    assert sum(t.numel() for t in moments) == 2 * tuner.selection.size


@each_model
@each_case
def test_adapter_round_trip_is_exact(name, config, tmp_path):
    """S2FT checklist 16: save → load → apply on a fresh base equals the trained model; revert equals the base."""
    model = tiny.build(name, dtype=torch.bfloat16)
    tuner = attached(model, name, config)
    train(model, tuner, name, steps=2)
    tuner.save(tmp_path / "adapter")
    tuned = tuner.detach().state_dict()
    fresh = tiny.build(name, dtype=torch.bfloat16)
    base = {key: t.clone() for key, t in fresh.state_dict().items()}
    delta = Delta.load(tmp_path / "adapter")
    assert delta.selection == tuner.selection
    assert delta.method == build(config).to_dict()
    delta.apply_(fresh)
    assert all(torch.equal(t, tuned[key]) for key, t in fresh.state_dict().items())
    delta.revert_(fresh)
    assert all(torch.equal(t, base[key]) for key, t in fresh.state_dict().items())
    pool = AdapterPool(fresh, storage="rows")
    pool.load("adapter", tmp_path / "adapter")
    for use, expected in (("adapter", tuned), (None, base)):
        pool.use(use)
        assert all(torch.equal(t, expected[key]) for key, t in fresh.state_dict().items())


@each_model
@each_case
def test_selection_is_reproducible_and_leaves_no_trace(name, config):
    """S2FT checklist 12: whatever the global random state."""
    model = tiny.build(name)
    random_state = torch.random.get_rng_state()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    required = {key: p.requires_grad for key, p in model.named_parameters()}
    keys = list(dict(model.named_modules()))
    tuner = attached(model, name, config)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert set(tuner.selection) <= tuner.method.selectable(model)
    assert list(model.state_dict()) == list(before)
    torch.manual_seed(99)
    assert attached(tiny.build(name, seed=0), name, config).selection == tuner.selection
    tuner.detach()
    assert list(dict(model.named_modules())) == keys
    assert {key: p.requires_grad for key, p in model.named_parameters()} == required
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks is not None)
    assert all("forward" not in module.__dict__ and "partial" not in module.__dict__ for module in model.modules())


@each_case
def test_excluded_entries_are_never_chosen(config):
    """S2FT checklist 15: a second choice with `exclude=` shares nothing with the first."""
    name = "gqa_llama"

    def chosen(**kwargs):
        model = tiny.build(name)
        tuner = attached(model, name, config, **kwargs)
        train(model, tuner, name, steps=2)
        return tuner.selection

    first = chosen()
    if build(config).chooser.name in ("full", "bitfit"):  # they choose all they may
        first = Selection(dict(list(first.items())[:1]))
    second = chosen(exclude=first)
    assert second.overlap(first) == 0
    assert second.size > 0


@each_case
def test_state_survives_bit_for_bit(config):
    """S2FT checklist 20: 10 updates = 5 + state_dict + a fresh model and optimizer + 5."""
    name = "gqa_llama"
    batches = [tiny.batch(name, seed=i) for i in range(10)]

    def go(tuner, optimizer, steps):
        for batch in steps:
            tuner.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    tuner = attached(tiny.build(name, dtype=torch.bfloat16), name, config)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3)
    go(tuner, optimizer, batches[:5])
    state, optimizer_state = tuner.state_dict(), copy.deepcopy(optimizer.state_dict())
    resumed = attached(tiny.build(name, dtype=torch.bfloat16), name, config)
    again = resumed.optimizer(torch.optim.AdamW, lr=1e-3)
    resumed.load_state_dict(state)
    again.load_state_dict(optimizer_state)
    go(resumed, again, batches[5:])
    go(tuner, optimizer, batches[5:])
    assert resumed.step == tuner.step == 10
    for left, right in zip(tuner.slots, resumed.slots, strict=True):
        assert torch.equal(left.values, right.values)
        assert torch.equal(left.target, right.target)


@pytest.mark.parametrize("cls", [type(build({"name": name})) for name in [*METHODS, *OWN]], ids=[*METHODS, *OWN])
def test_every_method_is_described(cls):
    assert dataclasses.is_dataclass(cls)
    assert cls().__hash__ is not None
    assert cls.summary
    assert cls.name not in METHODS or build(cls().to_dict()) == cls()
    for section in ("Args:", "Raises:", "Example:", "Differences"):
        assert section in (cls.__doc__ or ""), f"{cls.__name__}: docstring lacks {section}"
