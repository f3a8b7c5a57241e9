"""Two processes on gloo: both ranks end with the weights of one process that saw both batches."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from intaglio import S2FT, Batches, Full, attach
from support import tiny

METHODS = [S2FT(v=0.5, o=0.5, up=0.25, down=0.25), Full()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def worker(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for method in METHODS:
        model = tiny.build("gqa_llama", dtype=torch.float64)
        state = train(method, model, DistributedDataParallel, lambda step: [halves(step)[rank]])
        torch.save(state, f"{folder}/{method.name}-{rank}.pt")
    dist.destroy_process_group()


def choose_apart(rank, port, folder):
    """Each rank calibrates on data of its own: refused on both."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        probe = Batches([tiny.batch("gqa_llama", seed=rank)])
        attach(tiny.build("gqa_llama"), S2FT(o=0.5, down=0.1, select="activation"), probe=probe)
    except ValueError as error:
        (folder / str(rank)).write_text(str(error))
    dist.destroy_process_group()


def test_ranks_that_choose_apart_are_refused(tmp_path):
    """S2FT checklist 12: different units on two ranks are seen at attach, on both."""
    mp.spawn(choose_apart, args=(free_port(), tmp_path), nprocs=2)
    assert all("chose different entries" in (tmp_path / str(rank)).read_text() for rank in (0, 1))


def test_two_ranks_equal_one_process(tmp_path):
    """S2FT checklist 9 and 12: gloo, the same units and weights on both ranks."""
    mp.spawn(worker, args=(free_port(), str(tmp_path)), nprocs=2)
    for method in METHODS:
        ranks = [torch.load(tmp_path / f"{method.name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        alone = train(method, tiny.build("gqa_llama", dtype=torch.float64), lambda model: model, halves)
        for key, want in alone.items():
            assert torch.equal(ranks[0][key], ranks[1][key])
            torch.testing.assert_close(ranks[0][key], want, rtol=0, atol=1e-9)
