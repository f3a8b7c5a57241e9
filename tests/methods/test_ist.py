"""How layers are drawn and importance is learned: pure functions against closed forms and independent samplers."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from intaglio import IST, LISA, RST, S2FT, Full
from intaglio.method_kinds.layer_method import draw
from intaglio.methods import build

FAITHFUL = {"law": "multinomial", "reward": "faithful", "floor": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zeros(count):
    return torch.zeros(count, dtype=torch.float64)


def teach(method, costs, level, updates, seed=0, importance=None):
    """Importance after probes of a stack in which damping layer i adds costs[i] to the loss."""
    draws, importance = generator(seed), zeros(len(costs)) if importance is None else importance
    for _ in range(updates):
        sets = method.suppressed_sets(importance, draws)
        importance = method.learn(importance, sets, [level + float(sum(costs[i] for i in places)) for places in sets])
    return importance


def inclusion(method, importance, draws, seed=0):
    """Share of the draws in which each layer is active."""
    seen, source = zeros(importance.numel()), generator(seed)
    for _ in range(draws):
        seen[method.active(importance, source)] += 1
    return seen / draws


@pytest.mark.parametrize("fields", [{}, {"rate": 3, "candidates": 4, "both_ways": True}], ids=["authors", "both ways"])
def test_scores_equal_the_closed_form(fields):
    """IST checklist 1: a score rises by rate · (exp(−l_k) − mean) · p(1−p) in S_k, 100 updates, fp64."""
    method = IST(**(FAITHFUL | fields))
    draws, losses = np.random.default_rng(0), np.random.default_rng(1)
    importance, score = zeros(12), np.zeros(12)
    for _ in range(100):
        sets = [sorted(draws.choice(12, 6, replace=False).tolist()) for _ in range(method.candidates)]
        scripted = losses.uniform(0.1, 3.0, len(sets)).tolist()
        importance = method.learn(importance, sets, scripted)
        p = 1 / (1 + np.exp(-score))
        rewards = np.exp(-np.array(scripted))
        new = score.copy()
        for places, advantage in zip(sets, rewards - rewards.mean(), strict=True):
            for i in range(12):
                if i in places or method.both_ways:
                    new[i] += (fields.get("rate", 10) if i in places else -3) * advantage * p[i] * (1 - p[i])
        score = new
        assert np.abs(importance.numpy() + score).max() < 1e-12  # importance is minus the authors' score
    assert np.abs(score).max() > 1


@pytest.mark.parametrize("fields", [{}, FAITHFUL], ids=["default", "faithful"])
def test_the_layer_that_hurts_most_when_damped_ranks_first(fields):
    """IST checklist 2: one layer of 0.1, twenty seeds, loss 1."""
    method = IST(**fields)
    for seed in range(20):
        costs = [0.0] * 16
        costs[seed % 16] = 0.1
        importance = teach(method, costs, 1.0, 100, seed)
        assert int(method.weights(importance).argmax()) == seed % 16
        assert float(importance[seed % 16]) > 0


def independent(law, weights, count, draws, seed):
    """Indicator of the chosen places by another sampler: one by one, or by sorting."""
    source, seen = np.random.default_rng(seed), np.zeros((draws, len(weights)))
    for row in seen:
        if law == "multinomial":
            row[source.choice(len(weights), count, replace=False, p=weights / weights.sum())] = 1
        else:
            row[np.argsort(source.uniform(0, weights))[-count:]] = 1
    return seen.mean(0)


@pytest.mark.parametrize("law", ["multinomial", "uniform"])
def test_the_law_of_the_draws(law):
    """IST checklist 3: 20,000 draws against an independent sampler, every layer within 3 sigma of the difference."""
    importance = torch.tensor([4.0] * 4 + [-4 / 3] * 10 + [0.5, -3.0], dtype=torch.float64)
    method, draws = IST(layers=4, law=law, floor=0.0), 20_000
    mine = inclusion(method, importance, draws).numpy()
    theirs = independent(law, method.weights(importance).numpy(), 4, draws, seed=1)
    p = (mine + theirs) / 2
    assert np.all(np.abs(mine - theirs) <= 3 * np.sqrt(2 * p * (1 - p) / draws))
    assert mine.sum() == pytest.approx(4)


def test_the_two_laws_differ_as_measured():
    """Reference page 1.3: 8 important of 32, 8 drawn: 0.55 against 0.81 of the updates."""
    importance = torch.tensor([4.0] * 8 + [-4 / 3] * 24, dtype=torch.float64)
    for law, expected in (("multinomial", 0.55), ("uniform", 0.81)):
        seen = inclusion(IST(layers=8, law=law, floor=0.0), importance, 4000)
        assert float(seen[:8].mean()) == pytest.approx(expected, abs=0.01)


def test_suppressed_sets_prefer_unimportant_layers():
    importance = torch.tensor([3.0] * 6 + [-3.0] * 6, dtype=torch.float64)
    method, source, seen = IST(), generator(), zeros(12)
    for _ in range(500):
        sets = method.suppressed_sets(importance, source)
        assert len({tuple(places) for places in sets}) == 3
        assert all(places == sorted(set(places)) and len(places) == 6 for places in sets)
        for places in sets:
            seen[places] += 1
    assert seen[6:].mean() > 3 * seen[:6].mean()


@pytest.mark.parametrize("policy", ["any", "contiguous", "top"])
@pytest.mark.parametrize("law", ["uniform", "multinomial"])
def test_rst_is_ist_that_learns_nothing(policy, law):
    """IST checklist 4: the same layers at every draw, for any law and floor."""
    ist, rst = IST(layers=3, rate=0, policy=policy, law=law, floor=0.3, seed=5), RST(layers=3, policy=policy, seed=5)
    one, two, importance, masks = generator(), generator(), zeros(10), []
    for _ in range(200):
        importance = ist.learn(importance, [[0, 1], [2, 3]], [1.0, 2.0])
        masks.append(ist.active(importance, one))
        assert masks[-1] == rst.active(zeros(10), two)
    assert len({tuple(mask) for mask in masks}) > 5 or policy == "top"
    assert not rst.learns
    assert not rst.needs_probe
    assert not ist.learns
    assert torch.equal(rst.learn(importance, [], []), importance)
    assert rst.suppressed_sets(importance, one) == []


def test_the_default_learns_at_any_level_of_the_loss():
    """IST checklist 20: a shift of all losses changes no bit; planted costs are found as the docstring says."""
    method = IST()
    source = np.random.default_rng(0)
    one = two = zeros(32)
    for _ in range(50):
        sets = method.suppressed_sets(one, generator())
        losses = source.uniform(2.0, 4.0, 3).astype(np.float32).astype(np.float64)  # as a probe gives them
        one, two = method.learn(one, sets, losses.tolist()), method.learn(two, sets, (losses + 5).tolist())
        assert torch.equal(one, two)
    assert float(one.abs().max()) > 0.5


def rank_correlation(one, two):
    ranks = [np.argsort(np.argsort(values)) for values in (one, two)]
    return float(np.corrcoef(*ranks)[0, 1])


def planted(method, updates, trials=12):
    """Median over planted stacks of: how often the truly 8 most important of 32 train; rank correlation. Loss 3."""
    results = []
    for seed in range(trials):
        costs = np.random.default_rng(seed).exponential((0.005, 0.01, 0.02)[seed % 3], 32)
        importance = teach(method, costs, 3.0, updates, seed)
        seen = inclusion(method, importance, 200, seed)
        results.append((float(seen[np.argsort(-costs)[:8]].mean()), rank_correlation(importance.numpy(), costs)))
    return [statistics.median(column) for column in zip(*results, strict=True)]


def test_planted_importance_is_found_in_300_updates():
    """IST checklist 20: inclusion ≥ 0.40 and Spearman ≥ 0.9 by default, where the authors' rule is at chance."""
    chance, spearman = planted(IST(), 300)
    assert chance >= 0.5
    assert spearman >= 0.9
    assert 0.25 < planted(IST(**FAITHFUL), 300)[0] < 0.32


def test_every_layer_keeps_a_chance():
    """IST checklist 21: the floor, under importance as extreme as fp64 can hold."""
    importance = torch.tensor([800.0] * 8 + [-800.0] * 24, dtype=torch.float64)
    for law in ("uniform", "multinomial"):
        method, draws = IST(layers=8, law=law, floor=0.2), 8000
        seen = inclusion(method, importance, draws)
        least = 0.2 * 8 / 32
        assert float(seen.min()) > least - 4 * math.sqrt(least / draws)
        assert float(inclusion(IST(layers=8, law=law, floor=0.0), importance, 50)[8:].max()) == 0
        assert len(method.suppressed_sets(importance, generator())) == 3  # though one set has all the weight


@pytest.mark.parametrize("reward", ["normalised", "faithful"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_teaches_nothing(reward, bad):
    """IST checklist 21."""
    importance = torch.randn(8, dtype=torch.float64, generator=generator())
    sets = [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(IST(reward=reward).learn(importance, sets, [1.0, bad, 2.0]), importance)
    assert torch.equal(IST(reward=reward).learn(importance, sets, [2.0, 2.0, 2.0]), importance)  # a tie
    assert not torch.equal(IST(reward=reward).learn(importance, sets, [1.0, 1.5, 2.0]), importance)


def test_every_small_size_is_defined():
    """IST checklist 22: no size hangs; what cannot work is refused by name, all else draws what it says."""
    for total, layers, suppressed, candidates in itertools.product(range(1, 6), range(1, 6), range(1, 6), (2, 7)):
        method = IST(layers=layers, suppressed=suppressed, candidates=candidates)
        distinct = math.comb(total, suppressed)
        if layers > total or suppressed > total or distinct < 2:
            with pytest.raises(ValueError, match=r"IST\.(layers|suppressed)="):
                method.check(total)
            continue
        method.check(total)
        sets = method.suppressed_sets(torch.linspace(-900, 900, total, dtype=torch.float64), generator())
        assert len({tuple(places) for places in sets}) == len(sets) == min(candidates, distinct)
        for policy in ("any", "contiguous", "top"):
            active = IST(layers=layers, policy=policy).active(zeros(total), generator())
            assert active == sorted(set(active))
            assert len(active) == layers


def test_shares_round_down_to_at_least_one():
    assert [IST(layers=0.25).active_count(n) for n in (1, 2, 3, 4, 8, 30, 32)] == [1, 1, 1, 1, 2, 7, 8]
    assert [IST().suppressed_count(n) for n in (1, 2, 3, 32)] == [1, 1, 1, 16]
    with pytest.raises(ValueError, match=r"RST\.layers=33: the model has 32 layers.*at most 32"):
        RST(layers=33).check(32)
    with pytest.raises(ValueError, match=r"IST\.suppressed=1\.0: of 8 layers there is one set of 8.*damp fewer"):
        IST(suppressed=1.0).check(8)
    with pytest.raises(ValueError, match="a model of one layer has nothing to choose"):
        IST().check(1)
    IST(rate=0).check(1)


def test_blocks_are_adjacent_and_reach_every_layer():
    """IST checklist 18: coverage, under importance that never asks for the first layers."""
    method = IST(layers=8, policy="contiguous", floor=0.0)
    importance = torch.cat([torch.full((24,), -900.0), torch.full((8,), 900.0)]).double()
    source, ages, longest = generator(), [0] * 32, [0] * 32
    for _ in range(300):
        active = method.active(importance, source, ages)
        assert active == list(range(active[0], active[0] + 8))
        ages = [0 if i in active else age + 1 for i, age in enumerate(ages)]
        longest = [max(pair) for pair in zip(longest, ages, strict=True)]
    assert max(longest) <= 8 * 4 + 4  # overdue after 32 draws; then four blocks at most
    assert min(longest[:16]) > 20  # and not before


def test_top_is_always_the_last_layers():
    assert IST(layers=0.25, policy="top").active(zeros(32), generator()) == list(range(24, 32))


def test_when_layers_are_drawn_and_probed():
    assert [step for step in range(61) if LISA().draws_at(step)] == [0, 20, 40, 60]
    assert all(IST().draws_at(step) for step in range(5))
    assert [step for step in range(31) if IST().probes_at(step)] == [10, 20, 30]
    assert not any(RST().probes_at(step) for step in range(100))


def test_a_method_inside_a_method_survives_a_run_file():
    method = IST(layers=4, of=S2FT(down=0.1), state="drop", seed=3)
    assert build(method.to_dict()) == method
    assert build(LISA().to_dict()) == LISA()
    assert LISA().of == Full()
    assert build({"name": "rst", "of": {"name": "bitfit", "exclude": ["x"]}}).of.exclude == ("x",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "layers=0: a count of layers must be at least 1"),
        ({"layers": 1.5}, "layers=1.5"),
        ({"suppressed": -1}, "suppressed=-1"),
        ({"candidates": 1}, "candidates=1: give a whole number of at least 2"),
        ({"suppression": 1.0}, "suppression=1.0: give a factor of at least 0 and below 1"),
        ({"interval": 0}, "interval=0"),
        ({"rate": math.nan}, "rate=nan"),
        ({"rate": -1}, "rate=-1"),
        ({"floor": 1.5}, "floor=1.5"),
        ({"law": "binomial"}, "law='binomial'"),
        ({"policy": "bottom"}, "policy='bottom': known are any, contiguous, top"),
        ({"state": "forget"}, "state='forget': known are keep, drop, offload"),
        ({"redraw": 0}, "redraw=0"),
        ({"of": IST()}, "of=IST.*give a method that chooses entries"),
        ({"of": "s2ft"}, "of='s2ft'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        IST(**fields)


def test_bad_fields_of_a_run_file():
    with pytest.raises(ValueError, match=r"method\.of\.name='s2tf': unknown; did you mean 's2ft'"):
        build({"name": "ist", "of": {"name": "s2tf"}})
    with pytest.raises(ValueError, match=r"method\.of=3: wanted is a method"):
        build({"name": "ist", "of": 3})
    with pytest.raises(ValueError, match=r"layers=0.*policy='all'"):
        IST(layers=0, policy="all")


def test_draws_are_pinned():
    """A changed draw would silently change what every seed trains."""
    source = generator(0)
    assert [draw(torch.ones(8, dtype=torch.float64), 2, "uniform", source) for _ in range(3)] == PINNED


PINNED = [[0, 3], [0, 5], [3, 5]]


def test_a_block_is_overdue_after_eight_rounds_of_all_draws_rounded_up():
    """8 layers, 3 at a time: a round takes 3 draws, so that a layer is trained at the latest after 24."""
    method = IST(layers=3, policy="contiguous", floor=0.0)
    importance = torch.tensor([-800.0] * 4 + [800.0] * 4, dtype=torch.float64)
    for age, forced in ((23, False), (24, True)):
        active = method.active(importance, generator(), [age, *[0] * 7])
        assert (0 in active) == forced


def test_more_sets_than_draws_can_find_are_listed():
    """924 sets of 6 of 12 layers: what 200 draws leave is taken in order."""
    sets = IST(candidates=924).suppressed_sets(zeros(12), generator())
    assert len({tuple(places) for places in sets}) == len(sets) == math.comb(12, 6)
