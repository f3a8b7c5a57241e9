"""Layers in turn on two processes (gloo): the same layers everywhere, trained by the mean of both batches."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from intaglio import IST, S2FT, Batches, Full, attach
from support import tiny
from support.layers import NAME, adapted, changed, layer_of, stack, weights
from support.processes import on_processes

CASES = {
    "lora": (IST(layers=2, interval=3), lambda: adapted(dtype=torch.float64, lora_dropout=0.0)),
    "s2ft": (IST(layers=2, interval=3, of=S2FT(o=0.5, down=0.25)), lambda: stack(dtype=torch.float64)),
    "full": (IST(layers=2, interval=3, of=Full()), lambda: stack(dtype=torch.float64)),
}


def halves(step):
    batch = tiny.batch(NAME, rows=4, seed=step)
    return [{key: t[:2] for key, t in batch.items()}, {key: t[2:] for key, t in batch.items()}]


def measure(model, batch):
    """The loss in fp64; transformers takes it in fp32."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def train(case, wrapped, pick, probe, steps=10):
    """Weights, draws and what each update changed."""
    method, build = CASES[case]
    model = build()
    tuner = attach(model, method, probe=probe)
    run, optimizer = wrapped(model), tuner.optimizer(torch.optim.AdamW, lr=1e-3)
    for step in range(steps):
        before, active = weights(model), set(tuner.rotation.active)
        for batch in pick(step):
            (run(**batch).loss / len(pick(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert {layer_of(name) for name in changed(before, weights(model))} - {None} == active
    return {"weights": weights(model), "rotation": tuner.rotation.state()}


def worker(rank, world):
    def wrap(model):
        return DistributedDataParallel(model, find_unused_parameters=True)

    probe = Batches([halves(90 + i)[rank] for i in range(2)], measure)  # each process its own data
    return {case: train(case, wrap, lambda step: [halves(step)[rank]], probe) for case in CASES}


class Mean:
    """Both processes' probes in one."""

    def batches(self):
        return iter([{"one": halves(90 + i)[0], "two": halves(90 + i)[1]} for i in range(2)])

    def loss(self, model, batch):
        return (measure(model, batch["one"]) + measure(model, batch["two"])) / 2


def test_two_ranks_equal_one_process(tmp_path):
    """IST checklist 26: the same masks at every update, losses averaged, no union of masks, weights equal."""
    ranks = on_processes(2, tmp_path, worker)
    for case in CASES:
        one, two = (rank[case] for rank in ranks)
        assert one["rotation"] == two["rotation"]
        assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])
        alone = train(case, lambda model: model, halves, Mean())
        assert alone["rotation"]["history"]["draws"] == one["rotation"]["history"]["draws"]
        assert alone["rotation"]["importance"] == pytest.approx(one["rotation"]["importance"], abs=1e-9)
        assert max(map(abs, one["rotation"]["importance"])) > 0.01
        for key, want in alone["weights"].items():
            torch.testing.assert_close(one["weights"][key], want, rtol=0, atol=1e-9)


def unprepared(rank, world):
    """DDP that expects every gradient, and ranks with seeds of their own."""
    model = adapted()
    tuner = attach(model, IST(layers=2, seed=rank), probe=Batches([tiny.batch(NAME)]))
    try:
        run = DistributedDataParallel(model)
        for step in range(2):
            run(**halves(step)[rank]).loss.backward()
    except RuntimeError as error:
        return str(error), tuner.rotation.active
    return "", []


def test_ddp_that_expects_every_gradient_stops(tmp_path):
    """IST checklist 26: torch names the setting; and ranks agree on layers even where their seeds differ."""
    (error, layers), (_, others) = on_processes(2, tmp_path, unprepared)
    assert "find_unused_parameters=True" in error
    assert layers == others


def uneven(rank, world):
    """One process trains on fewer rows than the other, which splits a probe into more pieces."""
    model, pieces = adapted(), []

    def loss(model, batch):
        pieces.append(len(batch["input_ids"]))
        return model(**batch).loss

    tuner = attach(model, IST(layers=2, interval=1), probe=Batches([tiny.batch(NAME, rows=4)], loss))
    run, optimizer = DistributedDataParallel(model, find_unused_parameters=True), tuner.optimizer(torch.optim.SGD, lr=0.1)
    run(**tiny.batch(NAME, rows=1 + 3 * rank)).loss.backward()
    optimizer.step()
    return pieces


def test_a_probe_has_as_many_pieces_in_every_process(tmp_path):
    """A trainer's loss may gather over processes, and would wait for ever for one that has fewer."""
    few, many = on_processes(2, tmp_path, uneven)
    assert few == many
    assert set(few) == {4}
