"""Bit for bit what the authors' ID3 computes, where their code is right: fp32, no ties, B mod T = 0, no weight decay.

Optional: their package is no dependency of ours. `make selective-parity` fetches and runs it. What their
optimizer needs to be compared with:

* `eps` and `exp` are the score's; Adam's own eps cannot be given and is torch's default;
* `verify=False`, or the constructor writes a copy of all weights to the temporary folder and leaves it there;
* the budget a multiple of `max_steps`, or each step unmasks one entry too many; no step after the last, which would too;
* no two equal scores at the cut-off, where it keeps the wrong ones;
* no `weight_decay` in a parameter group (the keyword is forced to 0, a group's value is not), no closure, and a gradient on
  every trainable parameter.
"""

import copy

import pytest
import torch

from support import tiny

wrap = pytest.importorskip("selective_optimizers.wrap", reason="the authors' package: make selective-parity")

STEPS, BUDGET, LR = 50, 1000, 1e-2
SCORES = [(0, 1e-3), (1, 1.0), (2, 0.1)]  # exponent, eps
MODELS = ["mha_llama", "tied_llama"]
pytestmark = [
    pytest.mark.parametrize(("exponent", "eps"), SCORES),
    pytest.mark.parametrize("model", MODELS),
]


def train(model, optimizer):
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**tiny.batch("mha_llama", seed=step)).loss.backward()
        optimizer.step()
    return dict(model.named_parameters())


def authors(model, exponent, eps):
    """Their optimizer, driven as the head of this file says."""
    of = wrap.get_selective_optimizer(torch.optim.AdamW, "id3")
    optimizer = of(model.parameters(), lr=LR, budget=BUDGET, max_steps=STEPS, exp=exponent, eps=eps, verify=False)
    weights = train(model, optimizer)
    assert optimizer.get_budget_used() == BUDGET
    return weights, {
        name: mask for (name, _), mask in zip(weights.items(), optimizer.param_groups[0]["chosen_masks"], strict=True)
    }


class Oracle:
    """Dense gradients, one stable sort of all scores, torch's AdamW, and the masked entries put back."""

    def __init__(self, model, exponent, eps):
        self.weights, self.exponent, self.eps = list(model.parameters()), exponent, eps
        self.inner = torch.optim.AdamW(self.weights, lr=LR, weight_decay=0.0)
        self.start = [w.detach().clone() for w in self.weights]
        self.masks = [torch.zeros_like(w, dtype=torch.bool) for w in self.weights]

    def zero_grad(self):
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self):
        scores = torch.cat([(w.grad.abs() / (w.abs() + self.eps).pow(self.exponent)).flatten() for w in self.weights])
        scores[torch.cat([m.flatten() for m in self.masks])] = -1.0
        ranked, order = torch.sort(scores, descending=True, stable=True)
        unmask = BUDGET // STEPS
        assert ranked[unmask - 1] > ranked[unmask], "a tie at the cut-off: not the regime of this test"
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[order[:unmask]] = True
        for mask, new in zip(self.masks, chosen.split([m.numel() for m in self.masks]), strict=True):
            mask |= new.view_as(mask)
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.grad[~mask] = 0.0
        self.inner.step()
        for weight, mask, start in zip(self.weights, self.masks, self.start, strict=True):
            weight[~mask] = start[~mask]


def assert_equal(ours, theirs):
    assert list(ours) == list(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def test_authors_code_equals_dense_oracle(model, exponent, eps):
    model = tiny.build(model)
    other = copy.deepcopy(model)
    theirs, masks = authors(model, exponent, eps)
    oracle = Oracle(other, exponent, eps)
    assert_equal(train(other, oracle), theirs)
    assert all(torch.equal(ours, mask) for ours, mask in zip(oracle.masks, masks.values(), strict=True))


def test_ours_equals_authors_code(model, exponent, eps):
    from intaglio import ID3, attach

    model = tiny.build(model)
    other = copy.deepcopy(model)
    theirs, masks = authors(model, exponent, eps)
    tuner = attach(other, ID3(budget=BUDGET, steps=STEPS, exponent=exponent, eps=eps))
    train(other, tuner.optimizer(torch.optim.AdamW, lr=LR, weight_decay=0.0))
    assert tuner.selection.size == BUDGET
    chosen = {name: tuner.selection[name].flat().tolist() for name in tuner.selection}
    assert chosen == {name: mask.flatten().nonzero().flatten().tolist() for name, mask in masks.items() if mask.any()}
    assert_equal(dict(tuner.detach().named_parameters()), theirs)
