"""Small helpers for the tests of exports and of what serves them."""

import json

import torch

from intaglio import Delta, attach
from intaglio.core.fingerprint import fingerprint
from support import tiny

FP32, BF16 = torch.float32, torch.bfloat16


def tuned(name, method, dtype=FP32, lr=1e-2):
    """(base, the Delta of a short training of it)."""
    model = tiny.build(name, dtype=dtype)
    tuner = attach(model, method)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=lr)
    for step in range(3):
        model(**tiny.batch(name, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tiny.build(name, dtype=dtype), tuner.delta()


def handmade(model, selection, change=0.1):
    """A Delta that adds `change` (a number, or noise of that size where it is None) to the selected entries."""
    parameters = dict(model.named_parameters())
    base = {name: entries.gather(parameters[name]) for name, entries in selection.items()}
    prints = {name: fingerprint(values) for name, values in base.items()}
    torch.manual_seed(0)
    values = {n: v + (change if change is not None else 0.1 * torch.randn_like(v)) for n, v in base.items()}
    return Delta(selection, values, prints)


def same_delta(one, other):
    """Whether two Deltas have the same places, kinds, values and fingerprints, bit for bit."""
    if set(one.selection) != set(other.selection) or one.fingerprints != other.fingerprints:
        return False
    return all(
        (a.kind, a.shape) == (b.kind, b.shape)
        and getattr(a, "dim", None) == getattr(b, "dim", None)
        and torch.equal(a.flat(), b.flat())
        and one.values[n].dtype == other.values[n].dtype
        and torch.equal(one.values[n], other.values[n])
        for n, (a, b) in {n: (one.selection[n], other.selection[n]) for n in one.selection}.items()
    )


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder, **fields):
    """Change fields of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder
