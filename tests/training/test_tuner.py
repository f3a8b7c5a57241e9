"""Training through slots against plain full fine-tuning with masks, the oracle."""

import copy
import warnings

import pytest
import torch

from intaglio import S2FT, Full, PaFi, Random, Selection, attach
from intaglio.core.entries import Slices
from intaglio.methods import build
from intaglio.model.structure import describe
from support import tiny


def run(model, parameters, optimizer, *, steps=20, mask=None):
    """AdamW steps of two micro-batches with clipping; `mask` keeps only chosen gradients."""
    for step in range(steps):
        for micro in range(2):
            (model(**tiny.batch("gqa_llama", seed=10 * step + micro)).loss / 2).backward()
        if mask is not None:
            for name, parameter in model.named_parameters():
                parameter.grad = mask(name, parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", [S2FT(o=0.5, down=0.25), Random(budget=0.1), Full()], ids=lambda m: m.name)
def test_twenty_steps_equal_masked_full_fine_tuning(method):
    """S2FT checklist 6: fp64, AdamW, two micro-batches, clipping: below 1e-12."""
    model = tiny.build("gqa_llama", dtype=torch.float64)
    dense = copy.deepcopy(model)
    tuner = attach(model, method)
    run(model, tuner.parameters(), tuner.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.0))

    def mask(name, parameter):
        if name not in tuner.selection:
            return None
        kept = torch.zeros_like(parameter).flatten()
        flat = tuner.selection[name].flat()
        kept[flat] = parameter.grad.flatten()[flat]
        return kept.view_as(parameter)

    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3, weight_decay=0.0)
    run(dense, list(dense.parameters()), optimizer, mask=mask)
    for (name, got), want in zip(model.named_parameters(), dense.parameters(), strict=False):
        if not name.startswith("intaglio_slots"):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_small_updates_survive_bf16():
    """S2FT checklist 10: 100 steps at lr 1e-5 on a bf16 model stay within 1 % of the fp32 run's update norm."""
    updates = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.build("gqa_llama", dtype=torch.bfloat16).to(dtype)
        tuner = attach(model, S2FT(o=0.5, down=0.25))
        start = [p.detach().clone() for p in tuner.parameters()]
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)
        for step in range(100):
            model(**tiny.batch("gqa_llama", seed=step % 4)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        updates[dtype] = torch.cat([(p - s).flatten() for p, s in zip(tuner.parameters(), start, strict=True)])
    distance = (updates[torch.bfloat16] - updates[torch.float32]).norm()
    assert updates[torch.float32].norm() > 1e-3
    assert distance < 0.01 * updates[torch.float32].norm()


def test_a_step_without_backward_changes_nothing():
    """S2FT checklist 11: weight decay and learning rate reach nothing that has no gradient."""
    model = tiny.build("gqa_llama")
    before = copy.deepcopy(model.state_dict())
    optimizer = attach(model, S2FT(o=0.5, down=0.25)).optimizer(torch.optim.AdamW, lr=1.0, weight_decay=0.5)
    optimizer.step()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adafactor, torch.optim.NAdam])
def test_any_torch_optimizer_keeps_weights_in_step(optimizer_cls):
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    tuner = attach(model, S2FT(o=0.5, down=0.25))
    optimizer = tuner.optimizer(optimizer_cls, lr=0.01)
    model(**tiny.batch("gqa_llama")).loss.backward()
    optimizer.step()
    assert not any(slot.is_stale() for slot in tuner.slots)
    assert tuner.step == 1


def test_an_unwatched_optimizer_loses_nothing_and_is_reported():
    model = tiny.build("gqa_llama")
    tuner = attach(model, S2FT(o=0.5, down=0.25))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    model(**tiny.batch("gqa_llama")).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="tuner.watch"):
        tuner.delta()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.delta()


def test_casting_the_model_leaves_slots_in_fp32():
    model = tiny.build("gqa_llama")
    tuner = attach(model, S2FT(o=0.5, down=0.25))
    model.bfloat16()
    assert {p.dtype for p in tuner.parameters()} == {torch.float32}
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    model(**tiny.batch("gqa_llama")).loss.backward()
    optimizer.step()
    assert not any(slot.is_stale() for slot in tuner.slots)
    with pytest.raises(ValueError, match=r"attached as torch\.float32, now torch\.bfloat16"):
        tuner.delta()


def test_any_module_can_be_attached():
    sequential = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before = sequential(x)
    tuner = attach(sequential, Random(budget=3))
    assert torch.equal(sequential(x), before)
    sequential(x).sum().backward()
    assert sum(p.grad.numel() for p in tuner.parameters()) == 3
    normed = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4)))
    assert attach(normed, Random(budget=2)).selection.size == 2


def test_lbfgs_is_refused():
    tuner = attach(tiny.build("gqa_llama"), S2FT(o=0.5, down=0.25))
    with pytest.raises(ValueError, match="LBFGS"):
        tuner.optimizer(torch.optim.LBFGS)


def test_excluding_everything_is_refused():
    model = tiny.build("gqa_llama")
    everything = attach(model, Full()).selection
    model = tiny.build("gqa_llama")
    for method in (S2FT(o=0.5, down=0.25), Random(budget=0.5), Full()):
        with pytest.raises(ValueError, match="nothing"):
            attach(model, method, exclude=everything)
    assert all(p.requires_grad for p in model.parameters())


def test_deepcopy_trains_the_copy_alone():
    model = tiny.build("gqa_llama")
    attach(model, S2FT(o=0.5, down=0.25))
    twin = copy.deepcopy(model)
    twin(**tiny.batch("gqa_llama")).loss.backward()
    assert all(slot.values.grad is not None for slot in twin.intaglio_slots)
    assert all(slot.values.grad is None for slot in model.intaglio_slots)


def test_state_dict_and_save_pretrained_stay_ordinary(tmp_path):
    import transformers as tf

    model = tiny.build("gqa_llama")
    keys = list(model.state_dict())
    tuner = attach(model, S2FT(o=0.5, down=0.25))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.5)
    model(**tiny.batch("gqa_llama")).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == keys
    stock = tf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    batch = tiny.batch("gqa_llama")
    assert torch.equal(stock(**batch).logits, model(**batch).logits)


def test_attach_refuses_and_leaves_the_model_unchanged():
    model = tiny.build("gqa_llama")
    before, required = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    cases = [
        (S2FT(o=0.01, down=0.25), "rounds to nothing"),
        (S2FT(o=9, down=0.25), "S2FT.o=9: a count must lie between 1 and the 8 query heads"),
        (S2FT(v=0.1), "S2FT.v=0.1: rounds to nothing of 4 key-value heads; give at least 0.25 or a count"),
        (Random(budget=10**9), "budget=1000000000"),
        (Random(include=("*.nothing.*",)), "matches no parameter"),
        (Full(include=("x",)), "names look like"),
    ]
    for method, message in cases:
        with pytest.raises(ValueError, match=message):
            attach(model, method)
    quantized = torch.nn.Linear(4, 4)
    quantized.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="matches no parameter"):
        attach(quantized, PaFi(include=("weight",)))
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    tuner = attach(model, S2FT(o=0.5, down=0.25))
    with pytest.raises(ValueError, match="attached already"):
        attach(model, Full())
    tuner.detach()
    attach(model, Full())


def test_a_foreign_selection_cannot_be_excluded():
    other = attach(tiny.build("opt"), S2FT(o=0.5, down=0.25)).selection
    with pytest.raises(ValueError, match=r"exclude: model\.decoder.*no such parameter; give entries of this model"):
        attach(tiny.build("gqa_llama"), S2FT(o=0.5, down=0.25), exclude=other)
    wider = {name: Slices((32, 50), 1, torch.tensor([0])) for name in ("model.layers.0.mlp.down_proj.weight",)}
    with pytest.raises(ValueError, match=r"exclude: .*down_proj\.weight of shape \[32, 50\]: the model has shape \[32, 48\]"):
        attach(tiny.build("gqa_llama"), Full(), exclude=Selection(wider))


def test_shared_layers_are_refused():
    model = tiny.build("gqa_llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    for select in ("random", "weight"):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp.*is shared between layers"):
            attach(model, S2FT(o=0.5, down=0.25, select=select))


def test_missing_projection_names_what_exists():
    with pytest.raises(ValueError, match=r"no gate projection; it has q, k, v, o, up, down"):
        attach(tiny.build("opt"), S2FT(gate=0.25))
    with pytest.raises(ValueError, match="no o projection: its attention is not built like any known one; it has up, down"):
        attach(tiny.Homemade(), S2FT(o=0.5, down=0.25))
    assert attach(tiny.Homemade(), S2FT(o=None, down=0.25)).selection.size == 2 * 5 * 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "s3ft"}, "did you mean 's2ft'"),
        ({"name": "s2ft", "sede": 1}, "did you mean 'seed'"),
        ({"name": "s2ft", "down": 0.0}, "above 0"),
        ({"name": "s2ft", "down": 1.5}, "at most 1.0"),
        ({"name": "s2ft", "o": -1}, "above 0"),
        ({"name": "s2ft", "down": True}, "wanted is int or float"),
        ({"name": "s2ft", "down": "lots"}, "wanted is int or float"),
        ({"name": "s2ft", "seed": "x"}, "method.seed='x': wanted is int"),
        ({"name": "s2ft", "select": 5}, "wanted is one of random, weight, activation, product, gradient"),
        ({"name": ["s2ft"]}, "unknown"),
        ({"name": "random", "budget": 0}, "budget=0"),
        ({"name": "random", "budget": 1.5}, "budget=1.5"),
        ({"name": "pafi", "budget": -3}, "budget=-3"),
        ({"name": "random", "include": "*.mlp.*"}, "wanted is a list of names"),
        ({"name": "s2ft", "down_proj": 0.1}, "unknown for 's2ft'"),
        ({"name": "s2ft", "o": None, "down": None}, "no projection is trained"),
        ({"name": "s2ft", "largest": True}, "no effect"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        build(fields)


def test_all_problems_of_a_method_come_at_once():
    with pytest.raises(ValueError, match=r"o=0:.*down=2\.0.*select='best'"):
        S2FT(down=2.0, o=0, select="best")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_s2ft_quota_is_exact_and_even(name):
    """S2FT checklist 13: the total is the rounded share, and layers differ by at most one unit."""
    model = tiny.build(name)
    layers = describe(model)
    for share in (0.05, 0.3, 0.5, 0.77, 1.0):
        selection = S2FT(o=None, down=share).choose(model, None, Selection())
        counts = [len(selection[layer.projections["down"].parameter].index) for layer in layers]
        units = [layer.projections["down"].units for layer in layers]
        assert sum(counts) == int(share * sum(units) + 0.5)
        assert max(abs(count - share * n) for count, n in zip(counts, units, strict=True)) <= 1
        assert max(counts) - min(counts) <= 1 or len(set(units)) > 1


def test_s2ft_seed_fixes_the_units_for_ever():
    """S2FT checklist 12: a changed draw would silently change what every recipe trains."""
    selection = S2FT(o=4, down=6, seed=0).choose(tiny.build("gqa_llama"), None, Selection())
    chosen = {name.removeprefix("model.layers."): entries.index.tolist() for name, entries in selection.items()}
    assert chosen == EXPECTED


EXPECTED = {
    "0.self_attn.o_proj.weight": list(range(16)),
    "0.mlp.down_proj.weight": [0, 27, 33],
    "1.self_attn.o_proj.weight": list(range(16, 32)),
    "1.mlp.down_proj.weight": [3, 10, 24],
}
