"""Every process holds the whole model (data parallelism): all methods are as one process, or refused by name.

The rows of the distributed acceptance list that need no sharding: 1, 2, 3, 9, 10 and 11. Two processes here; `make distributed`
runs them on two and four.
"""

import contextlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from intaglio import ID3, S2FT, Batches, Full, Random, Updates, attach
from intaglio.methods import build
from support import tiny
from support.layers import adapted
from support.processes import WORLDS, Wire, on_processes

NAME, STEPS, ROWS = "gqa_llama", 4, 12
METHODS = {
    "s2ft": {"name": "s2ft", "o": 0.5, "down": 0.25, "v": 0.5, "up": 0.25},
    "s2ft-tied": {"name": "s2ft", "o": 0.5, "down": 0.25},
    "random": {"name": "random", "budget": 0.05},
    "pafi": {"name": "pafi", "budget": 0.02},
    "shira": {"name": "shira", "budget": 0.05},
    "fishmask": {"name": "fishmask", "budget": 0.02},
    "bitfit": {"name": "bitfit", "tensors": "one_dimensional"},
    "full": {"name": "full"},
    "gradient": {"name": "gradient", "budget": 0.02},
    "snip": {"name": "snip", "budget": 111},
    "id3": {"name": "id3", "budget": 203, "steps": STEPS, "until": 0.5},
    "id3-whole": {"name": "id3", "budget": 103, "steps": STEPS, "whole": ["model.norm.weight", "*.up_proj.weight"]},
    "id3-repeat": {"name": "id3", "budget": 30, "mode": "repeat", "steps": STEPS},
    "ist": {"name": "ist", "layers": 1, "interval": 2, "of": {"name": "s2ft", "o": 0.5, "down": 0.25}},
    "ist-id3": {"name": "ist", "layers": 1, "interval": 2, "of": {"name": "id3", "budget": 0.02, "steps": STEPS}},
    "rst": {"name": "rst", "layers": 1, "of": {"name": "random", "budget": 0.05}},
    "lisa": {"name": "lisa", "layers": 1, "redraw": 2},
}
ADAPTED = {"lora-ist": {"name": "ist", "layers": 2, "interval": 2}, "lora-id3": {"name": "id3", "budget": 50, "steps": STEPS}}
CASES = METHODS | ADAPTED


def measure(model, batch):
    """The loss in the model's own type; transformers takes it in fp32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def part(step, rank, world, rows=ROWS):
    return {key: t.chunk(world)[rank] for key, t in tiny.batch(NAME, rows=rows, seed=step).items()}


def attached(case, **kwargs):
    """A model attached; the probe is the same in every process."""
    method = build(CASES[case])
    model = adapted(4, dtype=torch.float64, lora_dropout=0.0) if case in ADAPTED else tiny.build(NAME, dtype=torch.float64)
    if method.learns:
        kwargs["probe"] = Batches([tiny.batch(NAME, seed=90 + i) for i in range(2)], measure)
    elif method.needs_probe:
        kwargs["probe"] = tiny.probe(NAME, method)
    return model.train(), attach(model, method, **kwargs)


def train(case, rank=0, world=1, wrap=lambda model: model, passes=1, **kwargs):
    """Weights, choices and the bytes sent at each of a few updates."""
    if passes > 1 and not build(CASES[case]).chooser.chooses_before:
        kwargs["updates"] = Updates(accumulation="exact")
    model, tuner = attached(case, **kwargs)
    run, optimizer, wire, log = wrap(model), tuner.optimizer(torch.optim.AdamW, lr=1e-3), Wire(), []
    for step in range(STEPS):
        with wire if world > 1 else contextlib.nullcontext():
            for i in range(passes):
                (measure(run, part(step * passes + i, rank, world)) / passes).backward()
            tuner.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()
        log.append(wire.take())
    selection = {name: entries.flat().tolist() for name, entries in tuner.selection.items()}
    draws = None if tuner.rotation is None else (tuner.rotation.history["draws"], tuner.rotation.importance)
    return {"weights": tuner.detach().state_dict(), "selection": selection, "draws": draws, "wire": log}


def refused(work):
    """What an error says, by kind."""
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def late(world):
    """Attached before the processes knew of each other: nothing is averaged."""
    from intaglio.training import ranks

    counted, ranks.count = ranks.count, lambda: 1
    model, tuner = attached("s2ft")
    ranks.count = counted
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3)
    measure(model, part(0, torch.distributed.get_rank(), world)).backward()
    optimizer.step()


def seeds_apart(rank):
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 2))
    tuner = attach(model, Random(budget=5))
    optimizer = tuner.optimizer(torch.optim.AdamW)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()


def experts_apart(rank):
    """Each process runs an expert of its own."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    tuner = attach(model, ID3(budget=5, steps=2))
    tuner.optimizer(torch.optim.AdamW)
    model[rank % 2](torch.ones(2, 4)).sum().backward()


def broken_gradient(rank, world):
    """One process's gradient is not finite in the second of three updates."""
    model, tuner = attached("id3-whole")
    optimizer, seen = tuner.optimizer(torch.optim.AdamW, lr=1e-3), []
    for step in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        (measure(model, part(step, rank, world)) * (float("nan") if (step, rank) == (1, world - 1) else 1.0)).backward()
        with pytest.warns(UserWarning, match="not finite") if step == 1 else contextlib.nullcontext():
            optimizer.step()
        optimizer.zero_grad()
        seen.append(all(torch.equal(before[n], p) for n, p in model.named_parameters() if "intaglio" not in n))
    return seen, {name: p.detach().clone() for name, p in model.named_parameters() if "intaglio" not in name}


def work(rank, world):
    found = {("bare", case): train(case, rank, world) for case in CASES}
    found |= {("passes", case): train(case, rank, world, passes=2) for case in ("s2ft", "random", "id3", "lora-ist")}
    found["first gradients"] = record(rank, world)
    found["dense clip"] = train("id3", rank, world, updates=Updates(clip="dense"))

    def wrap(model):
        return DistributedDataParallel(model, find_unused_parameters=True)

    found |= {("wrapped", case): train(case, rank, world, wrap) for case in ("s2ft", "full", "id3-whole", "ist", "lora-ist")}
    found["nothing to wrap"] = refused(lambda: train("random", rank, world, wrap))
    found["late"] = refused(lambda: late(world))
    found["seeds apart"] = refused(lambda: seeds_apart(rank))
    found["experts apart"] = refused(lambda: experts_apart(rank))
    found["broken gradient"] = broken_gradient(rank, world)
    return found


def record(rank, world, folder=None):
    """What a record of a run with ID3 says of other rules' choices."""
    import tempfile
    from pathlib import Path

    model, tuner = attached("id3")
    recorder, optimizer = tuner.unmasking.recorder(), tuner.optimizer(torch.optim.AdamW, lr=1e-3)
    for step in range(2):
        measure(model, part(step, rank, world)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        return recorder.save(Path(folder))["overlap"]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    return on_processes(request.param, tmp_path_factory.mktemp("ranks"), work)


def assert_as_alone(ranks, key, alone):
    first = ranks[0][key]
    for other in ranks[1:]:
        assert all(torch.equal(first["weights"][name], weight) for name, weight in other[key]["weights"].items())
    assert first["selection"] == alone["selection"]
    if alone["draws"] is not None:
        assert first["draws"][0] == alone["draws"][0]
        torch.testing.assert_close(first["draws"][1], alone["draws"][1], rtol=0, atol=1e-10)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_loop_without_a_wrapper_is_as_one_process(ranks, case):
    """Rows 1, 2, 9 and 11: nothing but `attach` and the loop; the processes' weights are equal to the bit."""
    assert_as_alone(ranks, ("bare", case), train(case))


@pytest.mark.parametrize("case", ["s2ft", "random", "id3", "lora-ist"])
def test_several_passes_are_as_one_process(ranks, case):
    assert_as_alone(ranks, ("passes", case), train(case, passes=2))


@pytest.mark.parametrize("case", ["s2ft", "full", "id3-whole", "ist", "lora-ist"])
def test_distributed_data_parallel_averages_what_it_sees(ranks, case):
    """Row 3: what is gathered outside the graph is hidden from the wrapper."""
    assert_as_alone(ranks, ("wrapped", case), train(case))


def test_clipping_by_the_dense_norm_is_as_one_process(ranks):
    assert_as_alone(ranks, "dense clip", train("id3", updates=Updates(clip="dense")))


def test_a_record_is_that_of_one_process(ranks):
    """Each process has seen a part of the first gradients."""
    alone = record(0, 1)
    assert all(rank["first gradients"] == alone for rank in ranks)
    assert "largest first gradients (static |g|)" in alone


def test_what_is_chosen_is_all_that_travels(ranks):
    """Row 10: 4 (fp64: 8) bytes for a chosen entry once all are chosen; no dense all-reduce before."""
    weights = sum(p.numel() for p in tiny.build(NAME).parameters())
    choosing, chosen = ranks[0]["bare", "id3"]["wire"][1], ranks[0]["bare", "id3"]["wire"][-1]
    assert any("reduce_scatter" in kind for kind in choosing)
    assert sum(size for kind, size in choosing.items() if "reduce_scatter" not in kind) < 203 * 8 * 4 + 16_384
    assert sum(size for kind, size in choosing.items() if "reduce_scatter" in kind) <= 8 * (weights + 100 * len(ranks))
    assert sum(chosen.values()) <= 8 * 203 + 1024


def test_resting_layers_send_nothing(ranks):
    """Row 11: of four layers two train."""
    _, tuner = attached("lora-ist")
    trained = sum(slot.values.numel() for slot in tuner.slots)
    sent = ranks[0]["bare", "lora-ist"]["wire"][2]
    assert sum(sent.values()) <= 8 * trained / 2 + 1024


def test_what_would_drift_apart_is_refused(ranks):
    """Row 1: at the first update, in every process, by name."""
    for rank in ranks:
        assert "its gradient differs between the processes" in rank["late"]
        assert "0.weight: the processes of this run do not hold the same weights" in rank["seeds apart"]
        assert "formed gradients of different weights" in rank["experts apart"]
        assert "not needed when a module doesn't have any parameter that requires a gradient" in rank["nothing to wrap"]


def test_a_gradient_that_is_broken_in_one_process_changes_nothing_in_any(ranks):
    """Row 9."""
    for seen, weights in (rank["broken gradient"] for rank in ranks):
        assert seen == [False, True, False]
        assert all(torch.equal(weights[name], weight) for name, weight in ranks[0]["broken gradient"][1].items())


def equals(rank, world):
    """Many equal scores, spread over the processes: the k best are those of one sort, for every k."""
    from intaglio.core.budget import TopK
    from intaglio.training.best_of_all import best_of_all

    generator = torch.Generator().manual_seed(3)
    key = torch.randperm(400, generator=generator) + (torch.arange(400) % 3 << 40)
    score = torch.randint(0, 4, (400,), generator=generator).float() / 3
    order = sorted(range(400), key=lambda i: (-float(score[i]), int(key[i])))
    mine, right = torch.arange(400) % world == rank, True
    for k in (1, 7, 99, 100, 101, 250, 399, 400, 500):
        best = best_of_all(TopK.of(400, score[mine], key[mine], score[mine]), k)
        right = right and best.held()[1].tolist() == [int(key[i]) for i in order[:k]]
    return right


@pytest.mark.parametrize("world", WORLDS)
def test_the_best_of_all_are_those_of_one_sort(world, tmp_path):
    """Row 9: ties over processes."""
    assert on_processes(world, tmp_path, equals) == [True] * world


def test_one_process_is_asked_nothing():
    """`S2FT` and `Full` alone: no hook, and the model is as any other to DistributedDataParallel."""
    for method in (S2FT(o=0.5), Full()):
        model = tiny.build(NAME)
        before = len(model._forward_pre_hooks)
        tuner = attach(model, method)
        assert len(model._forward_pre_hooks) == before
        assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
        tuner.detach()
