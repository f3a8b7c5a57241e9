"""Where the budget went: the record of a run is what happened, and inspect shows it."""

import json

import pytest
import torch

from intaglio import ID3, PaFi, Updates, attach
from intaglio.core.budget import top_k
from intaglio.core.scores import gradient
from intaglio.runs.inspect import inspect
from intaglio.training.unmasking_record import FILE, read
from support import tiny

NAME = "tied_llama"


def run(method, *, steps, exclude=None, accumulation="none", passes=1):
    model = tiny.build(NAME)
    tuner = attach(model, method, exclude=exclude, updates=Updates(accumulation=accumulation))
    insight = tuner.unmasking.recorder()
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    counts = []
    for step in range(steps):
        for micro in range(passes):
            model(**tiny.batch(NAME, seed=step * passes + micro)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append({name: slot.index.numel() for name, slot in tuner.unmasking.slots.items()})
    return tuner, insight, counts


def first_choice(budget, passes=1, exclude=None):
    """What |g| of the first update would choose, from whole gradients."""
    model = tiny.build(NAME)
    for micro in range(passes):
        model(**tiny.batch(NAME, seed=micro)).loss.backward()
    scores = {name: gradient(p.grad) for name, p in model.named_parameters()}
    for name, entries in (exclude or {}).items():
        scores[name].view(-1)[entries.flat()] = float("-inf")
    return top_k(iter(scores.items()), budget)


@pytest.mark.parametrize(("accumulation", "passes"), [("none", 1), ("exact", 3)])
def test_the_record_is_what_happened(tmp_path, accumulation, passes):
    """ID3 checklist 2: counts at each update, and B(T + 1) / 2 single updates made where T divides B."""
    exclude = PaFi(budget=500).choose(tiny.build(NAME), None, attach(tiny.build(NAME), ID3(steps=1)).selection)
    for others in (None, exclude):
        tuner, insight, counts = run(
            ID3(budget=900, steps=30, exponent=0), steps=30, exclude=others, accumulation=accumulation, passes=passes
        )
        record = insight.save(tmp_path)
        assert record == json.loads((tmp_path / FILE).read_text()) == read(tmp_path / FILE)
        assert record["at"] == list(range(1, 31))
        assert all(record["chosen"][name][t] == counts[t][name] for name in record["chosen"] for t in range(30))
        assert record["writes"] == 900 * 31 // 2  # B(T + 1) / 2, as T divides B
        assert record["touched"] == record["trained"] == record["budget"] == tuner.selection.size == 900
        shared = {name: figures["entries"] for name, figures in record["overlap"].items()}
        assert shared["largest first gradients (static |g|)"] == tuner.selection.overlap(first_choice(900, passes, others)) > 0
        barred = others or attach(tiny.build(NAME), ID3(steps=1)).selection
        pafi = PaFi(budget=900).choose(tiny.build(NAME), None, barred)
        assert shared["smallest weights (PaFi)"] == tuner.selection.overlap(pafi)


def test_a_static_choice_is_its_own_reference(tmp_path):
    tuner, insight, _ = run(ID3(budget=300, exponent=0, mode="static"), steps=3)
    record = insight.save(tmp_path)
    assert record["overlap"]["largest first gradients (static |g|)"] == {"entries": 300, "share": 1.0}
    assert record["writes"] == 300 * 3
    assert tuner.selection == first_choice(300)


def test_looking_changes_nothing():
    one, _, _ = run(ID3(budget=300, steps=5), steps=5)
    model = tiny.build(NAME)
    tuner = attach(model, ID3(budget=300, steps=5))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for step in range(5):
        model(**tiny.batch(NAME, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.selection == one.selection
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), one.model.parameters(), strict=True))


def test_a_resumed_run_does_not_claim_to_know_the_first_gradients(tmp_path):
    first = attach(tiny.build("gqa_llama"), ID3(budget=100, steps=4))
    optimizer = first.optimizer(torch.optim.AdamW, lr=1e-2)
    first.model(**tiny.batch("gqa_llama")).loss.backward()
    optimizer.step()
    tuner = attach(tiny.build("gqa_llama"), ID3(budget=100, steps=4))
    recorder = tuner.unmasking.recorder()
    tuner.load_state_dict(first.state_dict())
    assert recorder.save(tmp_path)["overlap"].keys() == {"smallest weights (PaFi)"}


def test_inspect_shows_a_run(tmp_path):
    """The folder of a run, as `intaglio train` leaves it; counts per kind add up to the budget."""
    tuner, insight, _ = run(ID3(budget=700, steps=7), steps=7)
    insight.save(tmp_path)
    tuner.save(tmp_path / "adapter")
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "trainable": {"of": 20_000}}))
    shown = inspect(tmp_path)["unmasking"]
    assert sum(shown["kinds"].values()) == 700
    assert {"self_attn.q_proj", "model.embed_tokens.weight"} & shown["kinds"].keys()
    assert not any(".0." in kind or ".1." in kind for kind in shown["kinds"])
    assert (tmp_path / "unmasking.png").read_bytes().startswith(b"\x89PNG")
    record, name = json.loads((tmp_path / FILE).read_text()), "model.embed_tokens.weight"
    for damage in (
        {"updates": "x"}, {"budget": True}, {"touched": 10**400}, {"at": 3}, {"at": record["at"][::-1]}, {"chosen": [1]},
        {"chosen": {**record["chosen"], name: ["x"] * 7}}, {"chosen": {**record["chosen"], name: [1]}}, {"shapes": {}},
        {"shapes": {**record["shapes"], name: 5}}, {"overlap": {"x": 1}}, {"overlap": None},
    ):  # fmt: skip
        (tmp_path / FILE).write_text(json.dumps(record | damage))
        with pytest.raises(ValueError, match=r"unmasking\.json: damaged"):
            inspect(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"unmasking\.json: damaged"):
        inspect(tmp_path)


def test_a_run_before_its_first_choice_is_shown_too(tmp_path):
    """B < T: nothing is unmasked yet, and an adapter without entries is saved, loaded and inspected."""
    tuner, insight, _ = run(ID3(budget=1, steps=50), steps=2)
    insight.save(tmp_path)
    tuner.save(tmp_path / "adapter")
    (tmp_path / "run.json").write_text(json.dumps({"config": {}}))
    result = inspect(tmp_path)
    assert result["entries"] == 0
    assert "unmasking" not in result
