"""A model whose gradients a test sets, and training loops for `attach` and for its dense twin."""

import copy

import torch
from torch import nn

from intaglio import attach
from support import tiny
from support.dense_unmasking import DenseUnmasking


class Leaves(nn.Module):
    """Parameters "0", "1", …; `backward(g0, g1, …)` gives them exactly these gradients (None: none)."""

    def __init__(self, *weights):
        super().__init__()
        for name, weight in enumerate(weights):
            self.register_parameter(str(name), nn.Parameter(torch.as_tensor(weight).clone()))

    @property
    def leaves(self):
        return [p for name, p in self.named_parameters() if "/" not in name and "." not in name]

    def backward(self, *gradients):
        used = [(p, g) for p, g in zip(self.leaves, gradients, strict=True) if g is not None]
        sum((p * torch.as_tensor(g).to(p)).sum() for p, g in used).backward()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(*shapes, dtype=torch.float32):
    return Leaves(*(normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)))


def gradients(model, seed):
    return [normal(*p.shape, seed=1000 * seed + i) for i, p in enumerate(model.leaves)]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("intaglio_slots")}


def chosen(tuner):
    """name → sorted offsets of what is trained now."""
    slots = tuner.unmasking.slots.items()
    return {name: slot.index.sort().values.tolist() for name, slot in slots if slot.index.numel()}


def offsets(selection):
    return {name: entries.flat().tolist() for name, entries in selection.items()}


def adamw(parameters, **kwargs):
    return torch.optim.AdamW(parameters, **({"lr": 1e-2, "weight_decay": 0.1} | kwargs))


def loss(model, name, step, micro=0):
    return model(**tiny.batch(name, seed=100 * step + micro)).loss


def both(name, method, *, make=adamw, dtype=torch.float32, **kwargs):
    """A tiny model attached, with its optimizer, and the dense twin of the same."""
    model = tiny.build(name, dtype=dtype)
    dense = DenseUnmasking(copy.deepcopy(model), method, make, kwargs.get("exclude"))
    tuner = attach(model, method, **kwargs)
    return tuner, tuner.optimizer(make), dense


def assert_equal_weights(model, other):
    left, right = weights(model), weights(other)
    assert left.keys() == right.keys()
    unequal = [name for name in left if not torch.equal(left[name], right[name])]
    assert not unequal


def stable_top(scores, k, taken=None):
    """name → sorted offsets of the k best by a plain stable sort of everything at once; `taken` ones are left out."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    if taken:
        barred = torch.cat([torch.isin(torch.arange(s.numel()), torch.tensor(taken.get(n, []))) for n, s in scores.items()])
        flat = flat.masked_fill(barred, -1.0)
    best = flat.sort(descending=True, stable=True).indices[:k].sort().values
    found, start = {}, 0
    for name, score in scores.items():
        inside = best[(best >= start) & (best < start + score.numel())] - start
        found |= {name: inside.tolist()} if inside.numel() else {}
        start += score.numel()
    return found
