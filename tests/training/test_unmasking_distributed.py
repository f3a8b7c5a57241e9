"""Two processes choose as one."""

import pytest
import torch
import torch.distributed as dist
from test_distributed import halves
from torch import nn

from intaglio import ID3, Updates, attach
from support import tiny
from support.processes import on_processes
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


def worker(rank, world):
    return [train(method, lambda step: [halves(step)[rank]]) for method in METHODS], sharded()


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
def ranks(tmp_path_factory):
    return on_processes(2, tmp_path_factory.mktemp("ranks"), worker)


@pytest.mark.parametrize("i", range(len(METHODS)))
def test_two_ranks_choose_and_train_as_one_process(ranks, i):
    """ID3 checklist 17: masks and weights bit for bit: halves of two batches sum as one sum is halved."""
    one, two = (trained[i] for trained, _ in ranks)
    alone = train(METHODS[i], halves, updates=Updates(accumulation="exact"))
    assert one["masks"] == two["masks"] == alone["masks"]
    for name, want in alone["weights"].items():
        assert torch.equal(one["weights"][name], two["weights"][name])
        assert torch.equal(one["weights"][name], want)


def test_sharded_weights_are_refused_by_name(ranks):
    """ID3 checklist 18, 19 and 23 are not offered: never a budget per rank, and no state to re-shard."""
    for _, message in ranks:
        assert message.startswith("0.weight: sharded over processes (DTensor); entries are chosen by whole gradients")
