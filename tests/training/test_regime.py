"""A third regime is a file: one that is defined here trains through `attach`, the tuner and the Trainer as ours do."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers as tf

from intaglio import PaFi, attach
from intaglio.hf.trainer import SparseMixin
from intaglio.method_kinds.method import NOTHING, Method
from intaglio.training.attach import REGIMES
from intaglio.training.regime import Regime, refuse_differing
from support import tiny

NAME, CLIPPED_AT = "gqa_llama", 1e-3


@dataclasses.dataclass(frozen=True)
class Settling(Method):
    """A method that trains what another chooses, and after some updates its first parameter alone."""

    name = "settling"
    summary = "all at first, then one parameter"

    after: int = 3
    of: Method = PaFi(budget=0.05, include=("*down_proj*",))  # noqa: RUF009  # frozen

    @property
    def chooser(self):
        return self.of

    @property
    def regimes(self):
        return (*self.of.regimes, ("settling", self))

    def with_inner(self, chooser):
        return dataclasses.replace(self, of=chooser)

    def selectable(self, model):
        return self.of.selectable(model)

    def choose(self, model, probe=None, exclude=NOTHING):
        return self.of.choose(model, probe, exclude)

    def to_dict(self):
        return {"name": self.name, "after": self.after, "of": self.of.to_dict()}


class Settled(Regime[Settling]):
    """A regime under which, after some updates, only the first slot trains; it counts the model's forward passes."""

    name = "settling"
    leaves_unused = True

    def __init__(self, model, method, wish):
        self.model, self.method, self.step, self.forwards = model, method, 0, 0

    def connect(self, slots):
        self.slots = slots
        self.handle = self.model.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.forwards += 1

    def after_step(self, step, optimizer):
        self.step = step
        for slot in list(self.slots)[1:]:
            slot.activate(step < self.method.after)

    def norm(self):
        return torch.tensor(100.0)

    def log(self):
        return {"settled": float(self.step >= self.method.after)}

    def state(self):
        return {"forwards": self.forwards}

    def check(self, method, state):
        refuse_differing({"after": method["after"]}, {"after": self.method.after}, prefix="method.")

    def load(self, step, method, state):
        self.forwards = state["forwards"]
        self.after_step(step, None)

    def release(self):
        self.handle.remove()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(REGIMES, Settled.name, Settled)


def trained(tuner, optimizer, steps, start=0):
    """Some updates; the values of each slot before and after them."""
    before = [p.detach().clone() for p in tuner.parameters()]
    for step in range(start, start + steps):
        tuner.model(**tiny.batch(NAME, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [not torch.equal(one, two) for one, two in zip(before, tuner.parameters(), strict=True)]


def adamw(tuner):
    return tuner.optimizer(torch.optim.AdamW, lr=1e-2)


def test_it_decides_what_trains_and_leaves_the_model_bare():
    model = tiny.build(NAME)
    tuner = attach(model, Settling(after=2))
    settled = tuner.regimes[1]
    assert [regime.name for regime in tuner.regimes] == ["fixed", "settling"]
    assert tuner.selection == PaFi(budget=0.05, include=("*down_proj*",)).choose(tiny.build(NAME))
    assert tuner.method == Settling(after=2)
    optimizer = adamw(tuner)
    assert all(trained(tuner, optimizer, 2))
    moved = trained(tuner, optimizer, 2, start=2)
    assert moved == [True] + [False] * (len(moved) - 1)
    assert len(moved) > 1
    assert settled.forwards == 4
    assert model._forward_pre_hooks
    assert tuner.detach() is model
    assert not model._forward_pre_hooks
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny.build(NAME).named_parameters()]


def test_its_state_goes_through_the_tuner_s():
    tuner = attach(tiny.build(NAME), Settling())
    optimizer = adamw(tuner)
    trained(tuner, optimizer, 4)
    state = tuner.state_dict()
    assert json.loads(json.dumps(state["settling"])) == {"forwards": 4}
    again = attach(tiny.build(NAME), Settling())
    resumed = adamw(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(state)
    assert again.regimes[1].forwards == 4
    assert trained(tuner, optimizer, 2, start=4) == trained(again, resumed, 2, start=4)  # the first slot alone, at once
    assert all(torch.equal(one, two) for one, two in zip(tuner.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"the checkpoint's method\.after is 3, this run's 5"):
        attach(tiny.build(NAME), Settling(after=5)).load_state_dict(state)


def test_its_norm_is_what_clipping_compares():
    tuner = attach(tiny.build(NAME), Settling())
    tuner.model(**tiny.batch(NAME)).loss.backward()
    before = [p.grad.clone() for p in tuner.parameters()]
    assert tuner.clip_grad_norm_(CLIPPED_AT) == 100.0
    for gradient, parameter in zip(before, tuner.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient * CLIPPED_AT / 100.0)


class SparseHFTrainer(SparseMixin, tf.Trainer):
    pass


def test_its_figures_are_in_the_trainer_s_log(tmp_path):
    tuner = attach(tiny.build(NAME), Settling(after=2))
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    batch = tiny.batch(NAME, rows=8)
    rows = [{key: tensor[i] for key, tensor in batch.items()} for i in range(8)]
    trainer = SparseHFTrainer(tuner, args=arguments, train_dataset=rows)
    trainer.train()
    assert [row["settled"] for row in trainer.state.log_history if "loss" in row] == [0.0, 1.0, 1.0]
