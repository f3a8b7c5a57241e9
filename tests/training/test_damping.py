"""What a probe measures, and that it leaves no trace."""

import copy
import dataclasses
import gc

import peft
import pytest
import torch
from torch import nn

from intaglio import ID3, IST, S2FT, Batches, BitFit, Full, Updates, attach
from intaglio.core.probe import chunks
from intaglio.model.peft_layers import adapters_of, damped
from support import tiny
from support.layers import NAME, adapted, attached, lora, run, shake, stack, update

TARGETS = ["q_proj", "down_proj"]
SETS = [[0, 2], [1, 2, 3]]
OTHER = {
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, target_modules=TARGETS),
    "oft": peft.OFTConfig(r=4, oft_block_size=0, target_modules=TARGETS),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "hra": peft.HRAConfig(r=2, target_modules=TARGETS),
    "miss": peft.MissConfig(r=2, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "dora": lora(use_dora=True),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}
INEXACT = ("hra",)  # its identity is a product of reflections, and rounds
quiet = [
    pytest.mark.filterwarnings("ignore:(Failed to load the CUDA extension|Setting boft_n)"),  # of BOFT, on a machine without
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # of PEFT, for every RMSNorm
]
each = pytest.mark.parametrize("name", [pytest.param(name, marks=quiet) for name in OTHER])


def measured(tuner, sets=SETS, seed=9):
    return tuner.rotation.losses(sets, tiny.batch(NAME, seed=seed))


@torch.no_grad()
def loss(model, seed=9):
    return float(model.eval()(**tiny.batch(NAME, seed=seed)).loss)


def scaled(model, places, factor):
    """A copy whose B is multiplied in these layers."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name and any(f".layers.{i}." in name for i in places):
            parameter.data.mul_(factor)
    return twin


LORAS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "lora_alpha": 11},
    "all linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("fields", LORAS.values(), ids=list(LORAS))
@pytest.mark.parametrize("factor", [0.25, 0.0, 0.7])
def test_damping_is_scaling(fields, factor):
    """IST checklist 11: the loss is that of a copy whose B was multiplied by β in those layers, to 1e-6."""
    model = adapted(4, live=True, **fields)
    plain = copy.deepcopy(model)
    tuner = attached(model, IST(layers=1, suppression=factor))
    for places, found in zip(SETS, measured(tuner), strict=True):
        assert found == pytest.approx(loss(scaled(plain, places, factor)), abs=1e-6)
        assert abs(found - loss(plain)) > 1e-4


@each
def test_an_adapter_that_does_nothing_is_damped_to_nothing(name):
    """IST checklist 12: identity-initialised adapters: the loss moves by exactly 0, whatever the kind."""
    model = peft.get_peft_model(stack(4), copy.deepcopy(OTHER[name])).train()
    found, untouched = measured(attached(model, IST(layers=1))), loss(model)
    assert found == pytest.approx([untouched] * 2, abs=1e-6 if name in INEXACT else 0.0, rel=0)


@each
def test_any_adapter_is_damped_between_base_and_tuned(name):
    """IST checklist 12: y = base + β (adapted − base) in each damped layer, by the definition; β = 0 is the base."""
    model = peft.get_peft_model(stack(4), copy.deepcopy(OTHER[name])).train()
    shake(model)
    tuner = attached(model, IST(layers=1, suppression=0.0))
    tuned, everything = loss(model), [0, 1, 2, 3]
    with model.disable_adapter():
        base = loss(model)
    assert abs(tuned - base) > 1e-4
    assert measured(tuner, [everything])[0] == pytest.approx(base, abs=1e-6)
    layers = list(adapters_of(model, list(model.parameters())).values())
    with torch.no_grad():
        for module, names in layers[:2]:
            x = torch.randn(5, module.get_base_layer().weight.shape[-1])
            module._disable_adapters = True
            without = module(x)
            module._disable_adapters = False
            expected = without + 0.3 * (module(x) - without)
            with damped([(module, names)], 0.3):
                assert torch.allclose(module(x), expected, atol=1e-6)
            assert not module._forward_hooks
            assert not module.base_layer._forward_hooks


def test_experts_behind_a_parameter_wrapper_are_damped():
    """LoRA on a bare parameter runs the base layer with the tuned weight in it: its response is not the base's."""
    model = tiny.build("mixtral").train()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(model, config).train()
    shake(model)
    tuner = attach(model, IST(layers=1, suppression=0.0), probe=Batches([tiny.batch("mixtral")]))
    tuned = loss(model)
    with model.disable_adapter():
        base = loss(model)
    assert abs(tuned - base) > 1e-4
    assert measured(tuner, [[0, 1]])[0] == pytest.approx(base, abs=1e-6)


def test_only_the_trained_adapter_is_damped():
    """IST checklist 13: another adapter that is active too keeps its full share, its tensors and its scale."""
    model = adapted(4, live=True)
    model.add_adapter("fixed", lora(lora_alpha=3))
    model.base_model.set_adapter(["default", "fixed"])
    for name, parameter in model.named_parameters():
        if ".fixed." in name:
            parameter.data.normal_(std=0.1)
            parameter.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scales = {name: dict(m.scaling) for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    plain = copy.deepcopy(model)
    tuner = attached(model, IST(layers=1, suppression=0.25, interval=2))
    for name, parameter in plain.named_parameters():
        if "lora_B.default" in name and any(f".layers.{i}." in name for i in SETS[0]):
            parameter.data.mul_(0.25)
    assert measured(tuner)[0] == pytest.approx(loss(plain), abs=1e-6)
    run(model.train(), tuner, 4)
    assert tuner.rotation.probes == 2
    for name, parameter in model.named_parameters():
        assert ".fixed." not in name or torch.equal(parameter, before[name])
    assert scales == {n: dict(m.scaling) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {m.active_adapters[-1] for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == {"fixed"}


TRACED = {
    "lora": (lambda: adapted(4, live=True), IST(layers=1)),
    "dora": (lambda: adapted(4, live=True, use_dora=True), IST(layers=1)),
    "oft": (lambda: peft.get_peft_model(stack(4), copy.deepcopy(OTHER["oft"])).train(), IST(layers=1)),
    "s2ft": (lambda: stack(4), IST(layers=1, of=S2FT(o=0.5, down=0.25))),
    "full, bf16": (lambda: stack(4, dtype=torch.bfloat16), IST(layers=1, of=Full())),
    "full": (lambda: stack(4), IST(layers=1, of=Full())),
    "id3": (lambda: stack(4), IST(layers=1, of=ID3(budget=0.05, steps=4))),
}


@pytest.mark.parametrize("case", TRACED)
def test_a_probe_leaves_no_trace(case):
    """IST checklist 10: weights, scales, flags, requires_grad, hooks, random state and graphs are what they were."""
    build, method = TRACED[case]
    model = build()
    tuner = attached(model, method)
    run(model, tuner, 4)
    model.model.layers[1].eval() if case == "full" else None

    def trace():
        tensors = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
        modules = {
            name: (
                m.training,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                copy.deepcopy({k: v for k, v in vars(m).items() if k in ("scaling", "_active_adapter", "_disable_adapters")}),
            )
            for name, m in model.named_modules()
        }
        flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
        return tensors, modules, flags, torch.random.get_rng_state()

    before = trace()
    gc.collect()
    graphs = sum(issubclass(type(o), torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())
    found = measured(tuner)
    after = trace()
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) and o.grad_fn is not None for o in gc.get_objects()) == graphs
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1:3] == before[1:3]
    assert torch.equal(after[3], before[3])
    assert found == measured(tuner)
    assert len(set(found)) == 2


@pytest.mark.parametrize("factor", [0.0, 0.25])
@pytest.mark.parametrize(
    "method", [S2FT(o=0.5, down=0.25), Full(), BitFit(tensors="one_dimensional")], ids=["s2ft", "full", "norms"]
)
def test_weights_are_damped_toward_where_they_started(method, factor):
    """start + β (tuned − start), in the damped layers only."""
    model = stack(4)
    base = copy.deepcopy(model)
    tuner = attached(model, IST(layers=4, of=method, suppression=factor))
    run(model, tuner, 3)
    mixed = copy.deepcopy(base)
    for name, parameter in mixed.named_parameters():
        share = factor if any(f".layers.{i}." in name for i in SETS[0]) else 1.0
        parameter.data += share * (model.get_parameter(name).detach() - parameter.data)
    assert measured(tuner)[0] == pytest.approx(loss(mixed), abs=1e-6)
    assert abs(loss(mixed) - loss(model)) > 1e-4


def test_entries_chosen_while_training_are_damped_toward_the_base():
    model = stack(4)
    base = copy.deepcopy(model)
    method = IST(layers=4, of=ID3(budget=0.05, steps=4), suppression=0.0)
    tuner = attach(model, method, probe=Batches([tiny.batch(NAME)]), updates=Updates())
    run(model, tuner, 4)
    for name, parameter in base.named_parameters():
        if any(f".layers.{i}." in name for i in SETS[0]):
            continue
        parameter.data.copy_(model.get_parameter(name).detach())
    assert measured(tuner)[0] == pytest.approx(loss(base), abs=1e-6)


class Watched(nn.Module):
    """Counts the rows of each forward."""

    def __init__(self, model):
        super().__init__()
        self.rows = []
        model.register_forward_pre_hook(lambda m, args, kwargs: self.rows.append(len(kwargs["input_ids"])), with_kwargs=True)


@pytest.mark.parametrize("name", [NAME, "bert"])
def test_a_probe_in_pieces_is_the_whole(name):
    """IST checklist 19: at most the rows of a training batch at a time, the loss weighed by labels: equal to 1e-6."""
    model = stack(4) if name == NAME else tiny.build(name)
    batch = tiny.batch(name, rows=7)
    if name == NAME:
        batch["labels"][0, :9] = -100
        batch["labels"][3] = -100
        batch["labels"][4:6, 1:] = -100  # of these only the first label is left, which the shift drops
    with torch.no_grad():
        whole = float(model.eval()(**batch).loss)
        tokens = batch["input_ids"].shape[1]
        for rows in (1, 2, 3, 6):
            pieces = list(chunks(model, batch, rows * tokens))
            assert all(len(piece["input_ids"]) <= rows for piece, _ in pieces)
            assert sum(share for _, share in pieces) == pytest.approx(1)
            assert sum(float(model(**piece).loss) * share for piece, share in pieces) == pytest.approx(whole, abs=1e-6)
    assert len(list(chunks(model, batch, 0))) == len(list(chunks(model, batch, 7 * tokens))) == 1


def test_pieces_are_as_large_as_the_training_batches():
    """IST checklist 19: the probe's 8 rows in pieces of the 3 rows that are trained on; longer rows, fewer at a time."""
    model = adapted(4)
    tuner = attach(model, IST(layers=1, interval=2), probe=Batches([tiny.batch(NAME, rows=8), tiny.batch(NAME, length=24)]))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    watched = Watched(model)
    for step in range(4):
        update(model, optimizer, step)
    assert watched.rows == [3, 3] + [3, 3, 2] * 3 + [3, 3] + [1, 1, 1] * 3


def test_the_probe_runs_under_the_autocast_of_training():
    model = adapted(4, live=True, lora_dropout=0.0)
    seen = []

    def measure(model, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return model(**batch).loss

    tuner = attach(model, IST(layers=1, interval=1), probe=Batches([tiny.batch(NAME)], measure))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    for autocast in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result = model(**tiny.batch(NAME)).loss
        result.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [True] * 3 + [False] * 3


def test_batches_come_in_turn_and_a_loss_that_is_not_finite_is_counted():
    """IST checklist 21: a NaN teaches nothing, and training goes on."""
    seen = []

    def measure(model, batch):
        seen.append(int(batch["seed"]))
        return torch.tensor(float("nan")) if batch["seed"] == 1 else model(batch["input_ids"]).logits.square().mean()

    batches = Batches([{"input_ids": tiny.batch(NAME, seed=i)["input_ids"], "seed": torch.tensor(i)} for i in range(3)], measure)
    model = adapted(4, live=True)
    tuner = attach(model, IST(layers=1, interval=1), probe=batches)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.01)
    importance = []
    for step in range(5):
        update(model, optimizer, step)
        importance.append(tuner.rotation.importance.clone())
    assert seen == [i for i in (0, 1, 2, 0, 1) for _ in range(3)]
    assert (tuner.rotation.probes, tuner.rotation.skipped) == (5, 2)
    assert torch.equal(importance[0], importance[1])
    assert not torch.equal(importance[1], importance[2])
    assert tuner.rotation.history["probes"][1][3] == [None] * 3


def test_a_merged_adapter_cannot_be_probed():
    model = adapted(4, live=True)
    tuner = attached(model, IST(layers=1))
    model.merge_adapter()
    with pytest.raises(ValueError, match="Linear: its adapter is merged into the weights; unmerge it"):
        measured(tuner)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_cost_of_probes_is_known():
    """IST checklist 31: interval 40 takes at most 3 forwards in 40 updates, 4 % where a forward is half a step."""
    model = adapted(4)
    method = IST(layers=1, interval=40)
    tuner = attached(model, method)
    run(model, tuner, 40)
    assert tuner.rotation.probes == 1
    assert tuner.rotation.seconds > 0
    assert method.candidates * 0.5 / method.interval <= 0.04
    assert dataclasses.replace(method, interval=10).candidates * 0.5 / 10 == pytest.approx(0.15)
