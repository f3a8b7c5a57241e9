"""What IST has learned, handed on: PEFT places the layers and ranks asked for."""

import peft
import pytest
import torch

from intaglio.hf.layers import layers_to_transform, rank_pattern
from intaglio.training.rotation_record import ranking
from support.importance import FAN, MODELS, ROOT, layer_of, placed, record


@pytest.mark.parametrize("name", ["llama", "gpt2", "bare gpt2", "bert"])
def test_peft_places_the_layers_asked_for(name):
    for k in (1, 3, 12):
        model, layers, targets = MODELS[name]()
        learned = record(layers)
        numbers = layers_to_transform(learned, k)
        found = placed(
            peft.get_peft_model(
                model, peft.LoraConfig(target_modules=targets, layers_to_transform=numbers, **ROOT.get(name, {}), **FAN[name])
            )
        )
        best = sorted(learned["importance"], reverse=True)[:k]
        wanted = {layer for layer, importance in zip(layers, learned["importance"], strict=True) if importance in best}
        assert {layer_of(path, layers) for path in found} == wanted
        assert len(wanted) == len(numbers) == k


@pytest.mark.parametrize("name", MODELS)
def test_peft_gives_the_ranks_asked_for(name):
    """Every module of a layer has its rank: they add up, grow with importance, and alpha_pattern keeps the scale."""
    model, layers, targets = MODELS[name]()
    learned = record(layers, spread=3.0)
    pattern = rank_pattern(learned, 4)
    alphas = {key: 8 * rank / 4 for key, rank in pattern.items()}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern=pattern, alpha_pattern=alphas, **FAN[name])
    model = peft.get_peft_model(model, config)
    found = placed(model)
    ranks = dict(zip(layers, pattern.values(), strict=True))
    assert {layer_of(path, layers) for path in found} - {None} == set(layers)
    assert all(rank == ranks.get(layer_of(path, layers), 4) for path, rank in found.items())
    assert sum(ranks.values()) == 4 * len(layers)
    assert min(ranks.values()) >= 1
    in_order = [ranks[layers[place]] for place in ranking(learned)]
    assert in_order == sorted(in_order, reverse=True)
    assert in_order[0] > in_order[-1]
    scales = {m.scaling["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert scales == {2.0}


def test_ranks_are_proportional_and_bounded():
    paths = [f"h.{i}" for i in range(4)]
    learned = record(paths) | {
        "importance": [float(torch.logit(torch.tensor(p, dtype=torch.double))) for p in (0.4, 0.3, 0.2, 0.1)]
    }
    assert list(rank_pattern(learned, 5).values()) == [8, 6, 4, 2]
    assert list(rank_pattern(learned, 1).values()) == [1, 1, 1, 1]
    assert list(rank_pattern(learned, 5, most=6).values()) == [6, 6, 5, 3]
    assert list(rank_pattern(learned, 5, least=5).values()) == [5, 5, 5, 5]
    for seed in range(20):
        learned = record([f"h.{i}" for i in range(9)], seed, spread=6.0)
        for r, least, most in ((1, 1, None), (3, 1, 4), (7, 2, 30), (16, 16, 16), (5, 1, 45)):
            ranks = list(rank_pattern(learned, r, least=least, most=most).values())
            assert sum(ranks) == 9 * r
            assert least <= min(ranks)
            assert max(ranks) <= (most or 9 * r)


def test_what_cannot_be_handed_on_is_refused():
    learned = record(["h.0", "h.1"])
    for k in (0, 3, True, 1.0):
        with pytest.raises(ValueError, match="whole number from 1 to 2"):
            layers_to_transform(learned, k)
    with pytest.raises(ValueError, match="does not tell those of"):
        layers_to_transform(record(MODELS["t5"]()[1]), 2)
    for options in ({"r": 0}, {"r": 2, "least": 0}, {"r": 2, "most": 1.5}, {"r": 2, "least": 3}, {"r": 2, "most": 1}):
        with pytest.raises(ValueError, match="rank_pattern"):
            rank_pattern(learned, **options)
    for function in (layers_to_transform, rank_pattern):
        with pytest.raises(ValueError, match="learns no importance"):
            function(learned | {"importance": None}, 1)
