"""Many adapters in one batch equal each adapter alone."""

import pytest
import torch
from torch import nn

from intaglio.runtime.changes import Adapter, Change, LinearLayers, from_delta
from intaglio.runtime.mixing import Mixer, mix_plainly
from intaglio.runtime.table import Table
from support import requests as tools
from support import tiny

SEGMENTS = [1, 7, 1, 2, 5, 1, 1, 4, 6]  # short and long, of adapters and of none
OWNERS = [0, 1, None, 2, None, 3, 0, None, 2]


def adapters(model, count=4, **kwargs):
    layers = LinearLayers(model)
    return [from_delta(tools.draw(model, seed, **kwargs), layers) for seed in range(count)]


def watched(model):
    """A mixer on the model, and what each layer was given and gave before and after it."""
    seen = {}
    layers = LinearLayers(model)

    def before(path):
        return lambda layer, inputs, output: seen.__setitem__(path, [inputs[0].clone(), output.clone()])

    def after(path):
        return lambda layer, inputs, output: seen[path].append(output.clone())

    for path, layer in layers.by_path.items():
        layer.register_forward_hook(before(path))
    mixer = Mixer(model, layers)
    for path, layer in layers.by_path.items():
        layer.register_forward_hook(after(path))
    return mixer, seen


def check(seen, owners):
    assert seen
    changed = 0
    for path, (x, y, mixed) in seen.items():
        x, y, mixed = (tensor.flatten(0, -2) for tensor in (x, y, mixed))
        torch.testing.assert_close(mixed, mix_plainly(y, x, path, owners), rtol=1e-5, atol=1e-5)
        bare = [row for row, owner in enumerate(owners) if owner is None]
        assert torch.equal(mixed[bare].view(torch.int32), y[bare].view(torch.int32))  # bit for bit
        changed += not torch.equal(mixed, y)
    assert changed == len(seen)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_mixed_rows_equal_the_plain_twin(name):
    model = tiny.build(name)
    mixer, seen = watched(model)
    drawn = adapters(model)
    owners = [None if i is None else drawn[i] for i in OWNERS]
    ids = torch.randint(3, 96, (1, sum(SEGMENTS)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), mixer.using(owners, SEGMENTS):
        model(input_ids=ids)
    check(seen, [owner for owner, length in zip(owners, SEGMENTS, strict=True) for _ in range(length)])


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_sequences_equal_merged_models(name):
    model = tiny.build(name)
    deltas = [None, *(tools.draw(model, seed) for seed in range(3))]
    layers = LinearLayers(model)
    owners = [None if delta is None else from_delta(delta, layers) for delta in deltas]
    batch = tiny.batch(name, rows=4)
    with torch.no_grad():
        base = model(**batch).logits
        mixer = Mixer(model, layers)
        with mixer.using(owners):
            mixed = model(**batch).logits
        assert torch.equal(model(**batch).logits, base)
        mixer.remove()
        assert torch.equal(mixed[0], base[0])
        for row, delta in enumerate(deltas[1:], 1):
            delta.apply_(model)
            expected = model(**batch).logits[row]
            delta.revert_(model)
            torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4)
            assert (mixed[row] - base[row]).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model = tiny.build("gqa_llama", dtype=dtype)
    drawn = adapters(model)
    mixer = Mixer(model)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    owners = [drawn[0], None, drawn[1], drawn[2]]
    with torch.no_grad():
        y = layer(x)
        with mixer.using(owners, [1, 1, 6, 1]):
            mixed = layer(x)
    rows = [drawn[0], None, *[drawn[1]] * 6, drawn[2]]
    expected = mix_plainly(y[0].double(), x[0].double(), "model.layers.0.mlp.down_proj", [wide(a) for a in rows])
    tolerance = 1e-10 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(mixed[0].double(), expected, rtol=tolerance, atol=tolerance)


def wide(adapter):
    if adapter is None:
        return None

    def double(tensor):
        return tensor.double() if tensor.is_floating_point() else tensor

    return Adapter({path: Change(double(c.read), double(c.write)) for path, c in adapter.changes.items()})


def test_adapters_come_and_go():
    """Random batches of 40 adapters on a layer: always the twin's answer, and the table grows no further than a batch needs."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(20, 12)})
    mixer = Mixer(model)
    sizes = torch.randint(1, 9, (40,)).tolist()
    pool = [Adapter({"layer": Change(torch.randperm(20)[:n], torch.randn(n, 12))}) for n in sizes]
    for _ in range(200):
        chosen = [None if i == 40 else pool[i] for i in torch.randint(41, (6,)).tolist()]
        x = torch.randn(6, 20)
        with torch.no_grad():
            y = model["layer"](x)
            with mixer.using(chosen, [1] * 6):
                mixed = model["layer"](x)
        torch.testing.assert_close(mixed, mix_plainly(y, x, "layer", chosen))
    assert mixer._tables[12].rows.shape[0] <= 2 * 6 * 8


def test_a_table_keeps_what_fits_and_drops_the_oldest():
    def adapter(n):
        return Adapter({"layer": Change(torch.arange(n), torch.full((n, 3), float(n)))})

    table, few, some, many = Table(3), adapter(2), adapter(3), adapter(4)
    table.place([few, some])
    assert table.rows.shape[0] == 5
    table.place([some])
    assert few.serial in table.starts  # room for nobody else is needed yet
    table.place([many])  # the oldest, then the next
    assert set(table.starts) == {many.serial}
    assert table.rows.shape[0] == 5
    table.place([few, some, many])
    for one in (few, some, many):
        start, n = table.starts[one.serial], one.written[3]
        assert torch.equal(table.rows[start : start + n], torch.full((n, 3), float(n)))


def test_a_batch_of_other_rows_is_refused():
    model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    mixer = Mixer(model)
    adapter = Adapter({"layer": Change(torch.tensor([1]), torch.ones(1, 4))})
    with torch.no_grad(), mixer.using([adapter, None], [1, 2]), pytest.raises(RuntimeError, match="4 rows, the batch has 3"):
        model["layer"](torch.zeros(4, 4))
    assert torch.equal(model["layer"](torch.zeros(4, 4)), model["layer"].bias.expand(4, 4))  # the base again


def test_the_head_and_shared_weights_are_left_alone():
    model = tiny.build("tied_llama")
    assert "lm_head" not in LinearLayers(model).by_path
    assert "lm_head" not in LinearLayers(tiny.build("gqa_llama")).by_path
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    assert "model.layers.1.mlp.down_proj" not in LinearLayers(model).by_path
    with pytest.raises(ValueError, match="of its own"):
        LinearLayers(model).of("lm_head.weight")
