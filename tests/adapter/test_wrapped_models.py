"""Wrapped models: a compiled one is unwrapped at every door, one of data parallelism where nothing is trained."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from intaglio import ID3, S2FT, AdapterPool, Delta, attach
from support import tiny

NAME = "gqa_llama"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one process."""
    meeting = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def wrap(request):
    if request.param == "ddp":
        request.getfixturevalue("alone")
    return {
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "data parallel": nn.DataParallel,
        "ddp": DistributedDataParallel,
        "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    }[request.param]


def logits(model):
    with torch.no_grad():
        return model(**{key: value for key, value in tiny.batch(NAME, seed=9).items() if key != "labels"}).logits


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "compiled already"])
@pytest.mark.parametrize("method", [S2FT(o=0.5, down=0.25), ID3(budget=200, steps=2)], ids=["s2ft", "id3"])
def test_a_compiled_model_trains_and_its_adapter_fits_the_base(method, ran, tmp_path):
    model = tiny.build(NAME)
    compiled = torch.compile(model, backend="eager")
    if ran:
        logits(compiled)
    tuner = attach(compiled, method)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for step in range(2):
        compiled(**tiny.batch(NAME, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = logits(compiled)
    assert not torch.equal(wanted, logits(tiny.build(NAME)))
    tuner.save(tmp_path / "adapter")
    fresh = tiny.build(NAME)
    Delta.load(tmp_path / "adapter").apply_(fresh)
    torch.testing.assert_close(logits(fresh), wanted)
    assert not any("_orig_mod" in name for name in tuner.selection)


@pytest.mark.parametrize("wrap", ["compiled", "data parallel", "ddp", "both"], indirect=True)
def test_adapters_are_put_on_what_is_inside(wrap, tmp_path):
    tuner = attach(tiny.build(NAME), S2FT(o=0.5, down=0.25))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    tuner.model(**tiny.batch(NAME)).loss.backward()
    optimizer.step()
    tuner.save(tmp_path / "adapter")
    expected, base = logits(tuner.detach()), tiny.build(NAME)
    before = logits(base)
    wrapped, delta = wrap(base), Delta.load(tmp_path / "adapter")
    delta.apply_(wrapped)
    assert torch.equal(logits(base), expected)
    delta.revert_(wrapped)
    assert torch.equal(logits(base), before)
    pool = AdapterPool(wrapped)
    pool.load("a", tmp_path / "adapter")
    with pool.using("a"):
        assert torch.equal(logits(base), expected)
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("wrap", ["data parallel", "ddp", "both"], indirect=True)
def test_what_data_parallelism_wraps_cannot_be_attached(wrap):
    model = wrap(tiny.build(NAME))
    with pytest.raises(ValueError, match=r"attach to the model first, and wrap tuner\.model then"):
        attach(model, S2FT(o=0.5, down=0.25))


def test_a_wrapped_model_with_a_tuner_is_known():
    tuner = attach(tiny.build(NAME), S2FT(o=0.5, down=0.25))
    with pytest.raises(ValueError, match="has a tuner attached"):
        AdapterPool(torch.compile(tuner.model, backend="eager"))
