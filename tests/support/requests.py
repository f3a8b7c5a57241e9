"""Small helpers for the tests of serving: adapters drawn at random, and what a request is told."""

import queue

import torch

from intaglio import Delta, Selection
from intaglio.core.entries import Slices
from intaglio.core.fingerprint import fingerprint
from intaglio.runtime.changes import LinearLayers
from intaglio.runtime.sampling import Sampling
from support import tiny


def draw(model, seed, *, layers=None, dims=(0, 1), strength=0.3):
    """A delta of a few rows or columns of each linear layer (or of those whose path ends in `layers`), unequal in number."""
    generator = torch.Generator().manual_seed(seed)
    entries, values, prints = {}, {}, {}
    for path, layer in LinearLayers(model).by_path.items():
        if layers is not None and not path.endswith(layers):
            continue
        dim = dims[int(torch.randint(len(dims), (1,), generator=generator))]
        size = layer.weight.shape[dim]
        count = int(torch.randint(1, max(2, size // 4), (1,), generator=generator))
        chosen = Slices(tuple(layer.weight.shape), dim, torch.randperm(size, generator=generator)[:count].sort().values)
        base = chosen.gather(layer.weight)
        noise = torch.randn(base.shape, generator=generator) * strength
        entries[f"{path}.weight"], prints[f"{path}.weight"] = chosen, fingerprint(base)
        values[f"{path}.weight"] = (base + noise).to(base.dtype)
    return Delta(Selection(entries), values, prints, {"name": "drawn", "seed": seed})


def columns(model, seed, **kwargs):
    """What S2FT trains: columns of the output projections."""
    return draw(model, seed, layers=("o_proj", "down_proj"), dims=(1,), **kwargs)


def merged_tokens(name, delta, prompt, count, eos=()):
    """Greedy tokens of the base with a delta's values in its weights."""
    model = tiny.build(name) if isinstance(name, str) else name
    if delta is not None:
        delta.apply_(model)
    try:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": list(eos) or None}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    finally:
        if delta is not None:
            delta.revert_(model)


class Answers:
    """Collects what requests are told."""

    def __init__(self, engine):
        self.engine, self.events, self._over, self._started = engine, {}, queue.Queue(), queue.Queue()

    def ask(self, key, prompt, count=8, adapter=None, **sampling):
        self.events[key] = []

        def deliver(event):
            self.events[key].append(event)
            if len(self.events[key]) == 1:
                self._started.put(key)
            if event.finish:
                self._over.put(key)

        return self.engine.submit(prompt, Sampling(count, **({"temperature": 0} | sampling)), deliver, adapter)

    def wait_for_one(self):
        """Until some request has had its first event."""
        return self._started.get(timeout=60)

    def wait(self, count=None):
        for _ in range(len(self.events) if count is None else count):
            self._over.get(timeout=60)
        for events in self.events.values():
            assert [e.finish for e in events[:-1]] == [None] * (len(events) - 1)
        return self

    def tokens(self, key):
        return [token for event in self.events[key] for token in event.tokens]

    def end(self, key):
        return self.events[key][-1]
