"""Norms of heads and channels, against planted units and brute force."""

import copy

import pytest
import torch

from intaglio import S2FT, Batches, Selection, attach
from intaglio.model.calibration import STRUCTURES, activation_norms, gradient_norms, weight_norms
from intaglio.model.structure import describe
from support import tiny

ON_DATA = ("activation", "product", "gradient")
STRATEGIES = ("weight", *ON_DATA)


def probe(name, *, split=(4,), rows=4, length=12):
    """The same rows, split into batches of the given sizes, with padding on both sides."""
    whole = tiny.batch(name, rows=rows, length=length)
    whole["attention_mask"][0, 9:] = 0
    whole["attention_mask"][1, :4] = 0
    if name in tiny.CAUSAL:
        whole["labels"] = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
        whole["labels"][1, 4] = -100  # it would be predicted from a padding token
    parts = {key: value.split(list(split)) for key, value in whole.items()}
    return Batches([{key: parts[key][i] for key in parts} for i in range(len(split))])


def chosen(model, data, **fields):
    selection = S2FT(**fields).choose(model, data, Selection())
    return selection


def scale(model, layer, role, unit, factor):
    """Multiply one unit's entries of a projection."""
    projection = describe(model)[layer].projections[role]
    index, weight = projection.index(torch.tensor([unit])), model.get_parameter(projection.parameter)
    with torch.no_grad():
        weight.index_copy_(projection.dim, index, weight.index_select(projection.dim, index) * factor)


@pytest.mark.parametrize("name", [n for n in tiny.MODELS if n not in tiny.MIXTURES])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("strategy", ["weight", "activation", "product"])
def test_a_planted_channel_and_head_are_found(name, strategy, largest):
    """S2FT checklist 14: a unit scaled ×100 or ×0.01 is the first by the strategy that sees it."""
    model, factor = tiny.build(name), 100.0 if largest else 0.01
    layers = describe(model)
    for layer in range(len(layers)):
        if strategy == "weight":
            scale(model, layer, "down", 7, factor)
            scale(model, layer, "o", 1, factor)
        else:
            activate(model, layer, "down", 7, factor)
            activate(model, layer, "o", 1, factor)
    data = None if strategy == "weight" else probe(name)
    picked = chosen(model, data, o=len(layers), down=len(layers), select=strategy, largest=largest)
    for layer in layers:
        down, o = layer.projections["down"], layer.projections["o"]
        assert down.owners(picked[down.parameter].index).tolist() == [7]
        assert o.owners(picked[o.parameter].index).tolist() == [1]


def activate(model, layer, role, unit, factor):
    """Scale one unit among the inputs of o or down, whatever comes before it."""
    projection = describe(model)[layer].projections[role]
    index = projection.index(torch.tensor([unit]))
    module = model.get_submodule(projection.parameter.removesuffix(".weight"))

    def hook(_module, inputs):
        x = inputs[0].clone()
        x[..., index] *= factor
        return (x, *inputs[1:])

    module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("largest", [True, False])
def test_gradient_norms_equal_brute_force(name, largest):
    """S2FT checklist 14: summed squares of each example's autograd gradient; the choice follows."""
    model, data = tiny.build(name).double(), probe(name)
    layers = describe(model)
    found = gradient_norms(model, layers, data)
    expected = {layer.name: torch.zeros(layer.projections["down"].units).double() for layer in layers}
    (batch,) = data.batches()
    for row in range(len(batch["input_ids"])):
        reference = copy.deepcopy(model)
        reference(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        for layer in layers:
            down = layer.projections["down"]
            gradient = reference.get_parameter(down.parameter).grad.movedim(down.dim, 0).flatten(1)
            expected[layer.name] += gradient.square().sum(1)
    picked = chosen(model, data, o=None, down=2 * len(layers), select="gradient", largest=largest)
    for layer in layers:
        torch.testing.assert_close(found[layer.name, "channels"], expected[layer.name].sqrt(), rtol=1e-6, atol=1e-12)
        down = layer.projections["down"]
        quota = len(picked[down.parameter].index)
        assert set(picked[down.parameter].index.tolist()) <= set(
            expected[layer.name].sort(descending=largest).indices[:quota].tolist()
        )
        assert quota > 0


def test_activation_norms_equal_the_definition():
    """Inputs of o and down over the tokens that are not padding; a key-value head sums the query heads it serves."""
    model, data = tiny.build("gqa_llama"), probe("gqa_llama")
    layers = describe(model)
    seen: dict[str, torch.Tensor] = {}
    for layer in layers:
        for role in ("o", "down"):
            path = layer.projections[role].parameter.removesuffix(".weight")
            model.get_submodule(path).register_forward_pre_hook(lambda m, x, path=path: seen.__setitem__(path, x[0].detach()))
    found = activation_norms(model, layers, data)
    (batch,) = data.batches()
    real = batch["attention_mask"].bool()
    for layer in layers:
        down = seen[f"{layer.name}.mlp.down_proj"][real]
        heads = seen[f"{layer.name}.self_attn.o_proj"][real].view(-1, 4, 8)
        torch.testing.assert_close(found[layer.name, "channels"].float(), down.norm(dim=0))
        torch.testing.assert_close(found[layer.name, "heads"].float(), heads.square().sum((0, 2)).sqrt())
        torch.testing.assert_close(found[layer.name, "kv_heads"].float(), heads.square().sum((0, 2)).view(2, 2).sum(1).sqrt())


def test_rows_without_labels_count_for_nothing():
    model, layers = tiny.build("gqa_llama"), describe(tiny.build("gqa_llama"))
    rows = tiny.batch("gqa_llama", rows=3)
    rows["labels"][1] = -100
    kept = {key: value[[0, 2]] for key, value in rows.items()}
    some, both = (gradient_norms(model, layers, Batches([data])) for data in (rows, kept))
    assert all(torch.equal(value, both[key]) for key, value in some.items())


def test_padding_counts_for_nothing():
    """S2FT checklist 14: other tokens under the mask change no norm."""
    model = tiny.build("gqa_llama")
    layers = describe(model)
    data = probe("gqa_llama")
    other = copy.deepcopy(data)
    for batch in other.data:
        batch["input_ids"][batch["attention_mask"] == 0] = 95
    for norms in (activation_norms, gradient_norms):
        left, right = norms(model, layers, data), norms(model, layers, other)
        for key, value in left.items():
            torch.testing.assert_close(value, right[key], rtol=1e-5, atol=1e-8)
    unmasked = Batches([{k: v for k, v in batch.items() if k != "attention_mask"} for batch in data.data])
    assert not torch.allclose(
        activation_norms(model, layers, unmasked)["model.layers.0", "channels"],
        activation_norms(model, layers, data)["model.layers.0", "channels"],
    )


@pytest.mark.parametrize("strategy", ON_DATA)
def test_the_split_into_batches_changes_nothing(strategy):
    """S2FT checklist 14: norms and choice of one batch of 4 rows are those of batches of 1 and 3."""
    model = tiny.build("gqa_llama")
    layers = describe(model)
    norms = gradient_norms if strategy == "gradient" else activation_norms
    one, many = (norms(model, layers, probe("gqa_llama", split=split)) for split in ((4,), (1, 3)))
    for key, value in one.items():
        torch.testing.assert_close(value, many[key], rtol=1e-5, atol=1e-9)
    fields = {"o": 2, "down": 6, "select": strategy}
    first, second = (chosen(model, probe("gqa_llama", split=split), **fields) for split in ((2, 2), (3, 1)))
    assert first == second


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_looking_leaves_no_trace(name, strategy):
    if name in tiny.MIXTURES and strategy in ("activation", "product"):
        assert chosen(tiny.build(name), probe(name), o=0.5, down=None, select=strategy).size > 0  # heads can be seen
        with pytest.raises(ValueError, match="holds all experts in one weight"):
            chosen(tiny.build(name), probe(name), o=0.5, down=0.25, select=strategy)
        return
    model = tiny.build(name)
    model.train()
    model.get_submodule(describe(model)[0].name).eval()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    first.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    random_state = torch.random.get_rng_state()
    chosen(model, probe(name), o=0.5, down=0.25, select=strategy)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("strategy", ["activation", "product"])
def test_activations_need_no_gradient(strategy):
    """S2FT checklist 14: A and S run forward only; no graph is built."""
    model = tiny.build("gqa_llama")
    graphs = []
    model.lm_head.register_forward_hook(lambda m, i, out: graphs.append(out.requires_grad))
    chosen(model, probe("gqa_llama", split=(2, 2)), o=0.5, down=0.25, select=strategy)
    assert graphs == [False, False]


def test_gradients_are_freed_layer_by_layer():
    """S2FT checklist 14: never more than one reading weight's gradient is alive when the next is formed."""
    model, data = tiny.build("gqa_llama"), probe("gqa_llama")
    layers = describe(model)
    alive: list[int] = []
    weights = [
        p
        for layer in layers
        for role in ("o", "down")
        if (p := model.get_parameter(layer.projections[role].parameter)) is not None
    ]
    handles = [p.register_hook(lambda g: alive.append(sum(w.grad is not None for w in weights))) for p in weights]
    gradient_norms(model, layers, data)
    for handle in handles:
        handle.remove()
    assert len(alive) == 4 * len(weights)
    assert max(alive) == 0


@pytest.mark.parametrize("name", ["gqa_llama", "mixtral", "qwen2_moe", "transposed_gpt2"])
def test_ranks_stay_inside_each_layer_and_nest(name):
    """Even quotas whatever the norms, and of one structure the smaller set inside the larger."""
    model = tiny.build(name)
    for layer in describe(model)[:1]:
        scale(model, 0, "down", 0, 50.0)
        assert layer.projections["down"].units
    picked = chosen(model, None, o=None, up=0.5, down=0.25, select="weight", largest=True)
    for layer in describe(model):
        up, down = (layer.projections[role] for role in ("up", "down"))
        units_up, units_down = (set(p.owners(picked[p.parameter].index).tolist()) for p in (up, down))
        assert units_down < units_up
        assert (len(units_up), len(units_down)) == (up.units // 2, up.units // 4)


def test_exclusion_meets_ranking():
    """S2FT checklist 15: the next best units, none of the first."""
    model, data = tiny.build("gqa_llama"), probe("gqa_llama")
    method = S2FT(o=0.25, down=0.25, select="activation")
    first = method.choose(model, data, Selection())
    second = method.choose(model, data, first)
    both = chosen(model, data, o=0.5, down=0.5, select="activation")
    assert second.overlap(first) == 0
    assert both.difference(first).keys() <= second.keys()
    with pytest.raises(ValueError, match=r"S2FT\.o=0\.25: of the query heads nothing is left"):
        method.choose(model, data, chosen(model, data, o=1.0, down=1.0))


def test_weight_norms_equal_the_definition():
    model = tiny.build("transposed_gpt2")
    norms = weight_norms(model, describe(model))
    weight = model.transformer.h[1].mlp.c_proj.weight.detach()
    torch.testing.assert_close(norms["transformer.h.1", "channels"].float(), weight.norm(dim=1))
    assert {key[1] for key in norms} == set(STRUCTURES)


def test_mistakes_are_explained_before_anything_changes():
    model = tiny.build("gqa_llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    good = tiny.batch("gqa_llama")
    cases = [
        (None, "activation", "looks at data: give a probe"),
        (Batches([{k: v for k, v in good.items() if k != "labels"}]), "gradient", "add `labels`"),
        (Batches([good | {"labels": torch.full_like(good["labels"], -100)}]), "gradient", "every label is -100"),
        (Batches([good | {"attention_mask": torch.ones(3, 1, 12, 12)}]), "activation", "one mask entry per token"),
    ]
    for data, strategy, message in cases:
        with pytest.raises(ValueError, match=message):
            attach(model, S2FT(o=0.5, select=strategy), probe=data)
    with pytest.raises(ValueError, match="data is empty"):
        Batches([])
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    before["model.layers.0.mlp.down_proj.weight"] = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight: its channels have norms that are not finite"):
        attach(model, S2FT(select="weight", o=0.5))
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_product_ranks_by_both_norms():
    """Against weights and activations, each by itself."""
    model, data = tiny.build("gqa_llama"), probe("gqa_llama")
    layers = describe(model)
    weights, inputs = weight_norms(model, layers), activation_norms(model, layers, data)
    picked = chosen(model, data, o=None, down=0.25, select="product")
    for layer in layers:
        projection, key = layer.projections["down"], (layer.name, "channels")
        expected = (weights[key] * inputs[key]).argsort(stable=True)[: projection.units // 4]
        assert picked[projection.parameter].index.tolist() == sorted(expected.tolist())


def test_a_decoder_counts_the_tokens_of_its_targets():
    """Of an encoder-decoder model: padding of the source is left out of the encoder, padding of the target of the decoder."""
    batch = tiny.batch("bart")
    batch["attention_mask"][0, 8:] = 0
    batch["labels"][:, 5:] = -100
    short = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": batch["labels"][:, :5].contiguous(),
    }
    model = tiny.build("bart")
    layers = describe(model)
    long, cut = (activation_norms(model, layers, Batches([given])) for given in (batch, short))
    for key, norm in long.items():
        torch.testing.assert_close(norm, cut[key], rtol=1e-5, atol=1e-6)
    whole = activation_norms(model, layers, Batches([short | {"attention_mask": torch.ones_like(batch["attention_mask"])}]))
    assert not torch.allclose(whole[layers[0].name, "channels"], cut[layers[0].name, "channels"])


def test_a_probe_without_batches_is_refused():
    class Nothing:
        def batches(self):
            return iter(())

        def loss(self, model, batch):
            raise AssertionError

    with pytest.raises(ValueError, match="probe: it has no batches to calibrate on"):
        S2FT(o=0.5, down=0.25, select="activation").choose(tiny.build("gqa_llama"), Nothing())
