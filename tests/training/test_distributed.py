"""Two processes on gloo: both ranks end with the weights of one process that saw both batches."""

import torch
from torch.nn.parallel import DistributedDataParallel

from intaglio import S2FT, Batches, Full, attach
from support import tiny
from support.processes import on_processes

METHODS = [S2FT(v=0.5, o=0.5, up=0.25, down=0.25), Full()]


def halves(step):
    batch = tiny.batch("gqa_llama", rows=4, seed=step)
    return [{key: t[:2] for key, t in batch.items()}, {key: t[2:] for key, t in batch.items()}]


def train(method, model, wrapped, pick):
    tuner = attach(model, method)
    run = wrapped(model)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3)
    for step in range(3):
        for batch in pick(step):
            (run(**batch).loss / len(pick(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuner.detach().state_dict()


def worker(rank, world):
    def build():
        return tiny.build("gqa_llama", dtype=torch.float64)

    return [train(method, build(), DistributedDataParallel, lambda step: [halves(step)[rank]]) for method in METHODS]


def choose_apart(rank, world):
    """Each rank calibrates on data of its own: refused on both."""
    try:
        probe = Batches([tiny.batch("gqa_llama", seed=rank)])
        attach(tiny.build("gqa_llama"), S2FT(o=0.5, down=0.1, select="activation"), probe=probe)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_choose_apart_are_refused(tmp_path):
    """S2FT checklist 12: different units on two ranks are seen at attach, on both."""
    assert all("chose different entries" in said for said in on_processes(2, tmp_path, choose_apart))


def test_two_ranks_equal_one_process(tmp_path):
    """S2FT checklist 9 and 12: gloo, the same units and weights on both ranks."""
    for method, *ranks in zip(METHODS, *on_processes(2, tmp_path, worker), strict=True):
        alone = train(method, tiny.build("gqa_llama", dtype=torch.float64), lambda model: model, halves)
        for key, want in alone.items():
            assert torch.equal(ranks[0][key], ranks[1][key])
            torch.testing.assert_close(ranks[0][key], want, rtol=0, atol=1e-9)
