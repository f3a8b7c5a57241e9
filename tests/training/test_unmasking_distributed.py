"""Two processes choose as one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_distributed import free_port, halves
from torch import nn

from intaglio import ID3, Updates, attach
from support import tiny
from support.unmasking import adamw, chosen

METHODS = [
    ID3(budget=103, steps=4, whole=("model.norm.weight", "*.up_proj.weight")),
    ID3(budget=30, mode="repeat", exponent=2, eps=0.1),
]


def train(method, pick, *, updates=None):
    """The weights and the choices of five updates; each is the mean over the batches of `pick(step)`."""
    model = tiny.build("gqa_llama")
    tuner = attach(model, method, updates=updates)
    optimizer, masks = tuner.optimizer(adamw), []
    for step in range(5):
        batches = pick(step)
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        tuner.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        masks.append(chosen(tuner))
    return {"weights": tuner.detach().state_dict(), "masks": masks}


def worker(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for i, method in enumerate(METHODS):
        torch.save(train(method, lambda step: [halves(step)[rank]]), folder / f"{i}-{rank}.pt")
    (folder / f"refusal-{rank}").write_text(sharded())
    dist.destroy_process_group()


def sharded():
    """What attach says to a weight that FSDP2 has sharded."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    fully_shard(model[0], mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    try:
        attach(model, ID3(budget=2, steps=2))
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(free_port(), folder), nprocs=2)
    return folder


@pytest.mark.parametrize("i", range(len(METHODS)))
def test_two_ranks_choose_and_train_as_one_process(folder, i):
    """ID3 checklist 17: masks and weights bit for bit: halves of two batches sum as one sum is halved."""
    ranks = [torch.load(folder / f"{i}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = train(METHODS[i], halves, updates=Updates(accumulation="exact"))
    assert ranks[0]["masks"] == ranks[1]["masks"] == alone["masks"]
    for name, want in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        assert torch.equal(ranks[0]["weights"][name], want)


def test_sharded_weights_are_refused_by_name(folder):
    """ID3 checklist 18, 19 and 23 are not offered: never a budget per rank, and no state to re-shard."""
    for rank in (0, 1):
        message = (folder / f"refusal-{rank}").read_text()
        assert message.startswith("0.weight: sharded over processes (DTensor); entries are chosen by whole gradients")
