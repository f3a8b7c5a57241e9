"""A LoRA without its unimportant layers is the whole one with the rest switched off, bit for bit."""

import csv
import json

import peft
import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from intaglio import IST, RST
from intaglio.cli import app
from intaglio.export.pruned import losses, prune
from intaglio.hf.layers import layers_to_transform
from intaglio.training.rotation_record import FILE, ranking, read
from support import tiny
from support.importance import FAN, MODELS, layer_of, placed, record
from support.layers import NAME, adapted, attached, lora, probe, run, shake, stack


def trained(layers=6, model=None, method=None, **fields):
    model = model or adapted(layers, live=True, **fields)
    tuner = attached(model, method or IST(layers=2, interval=2))
    run(model, tuner, 8)
    tuner.rotation.release()
    return model.eval(), tuner


def switched_off(model, paths):
    """The model with the adapter of some layers at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and any(f".{path}." in name for path in paths):
                parameter.zero_()
    return model


CASES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "one pattern": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, r"layers\.[45]\.mlp.down_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    },
    "regex": {"target_modules": r".*layers\.\d+\.self_attn\.(q|v)_proj"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "every linear": {"target_modules": "all-linear"},
    "few layers": {"layers_to_transform": [1, 2, 4]},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT saves an adapted head whole
@pytest.mark.parametrize("case", CASES)
def test_a_pruned_adapter_is_the_others_switched_off(tmp_path, case):
    """IST item 7: bit for bit, as an ordinary PEFT folder, from a folder and from the model."""
    model, tuner = trained(**CASES[case])
    learned = tuner.rotation.recorder().save(tmp_path)
    total = len(learned["layers"])
    tuner.save(tmp_path / "adapter")
    batch = tiny.batch(NAME, seed=9)
    for k in (total, 2, 1):
        result = prune(tmp_path / "adapter", learned, k, tmp_path / f"pruned-{k}")
        again = prune(model, learned, k, tmp_path / f"again-{k}")
        assert result | {"path": ""} == again | {"path": ""}
        best = [learned["layers"][place] for place in sorted(ranking(learned)[:k])]
        assert result["layers"] == best
        loaded = peft.PeftModel.from_pretrained(stack(6), str(tmp_path / f"pruned-{k}")).eval()
        assert {layer_of(path, learned["layers"]) for path in placed(loaded)} - {None} == set(best)
        assert loaded.peft_config["default"].peft_type.value == "LORA"
        switched_off(model, set(learned["layers"]) - set(best))
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert result["bytes"] < result["of_bytes"]
    if case in ("lora", "every linear"):
        assert loaded.peft_config["default"].layers_to_transform == layers_to_transform(learned, 1)


@pytest.mark.parametrize("name", ["t5", "bare gpt2"])
def test_layers_that_numbers_do_not_name_are_pruned_too(tmp_path, name):
    model, layers, targets = MODELS[name]()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **FAN[name]))
    shake(model)
    learned = record(layers)
    prune(model, learned, 2, tmp_path / "pruned")
    loaded = peft.PeftModel.from_pretrained(MODELS[name]()[0], str(tmp_path / "pruned"))
    best = {layers[place] for place in ranking(learned)[:2]}
    assert {layer_of(path, layers) for path in placed(loaded)} == best
    saved = {n: p for n, p in model.named_parameters() if layer_of(n.removeprefix("base_model.model."), best) and ".lora_" in n}
    assert all(torch.equal(p, saved[n]) for n, p in loaded.named_parameters() if ".lora_" in n)


def test_the_loss_for_each_number_of_layers(tmp_path):
    """As measured with the others at zero; batches of unequal size count by their labels; the model is left as it was."""
    model, tuner = trained(use_dora=True)
    learned = tuner.rotation.recorder().save(tmp_path)
    held_out = [tiny.batch(NAME, rows=1, length=5, seed=70), tiny.batch(NAME, rows=4, length=14, seed=71)]
    data = type(probe())(held_out)
    before = model(**held_out[0]).logits
    result = prune(model, learned, 3, tmp_path / "pruned", probe=data)
    assert torch.equal(model(**held_out[0]).logits, before)
    assert [row["layers"] for row in result["losses"]] == [6, 5, 4, 3, 2, 1]
    with (tmp_path / "pruned/pruning.csv").open(newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in result["losses"]]
    assert losses(model, learned, data, [3]) == [result["losses"][3]]
    order = ranking(learned)
    for row in result["losses"]:
        off = {learned["layers"][place] for place in order[row["layers"] :]}
        disabled = [m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer) and layer_of(n[17:], off)]
        for layer in disabled:
            layer._disable_adapters = True
        with torch.no_grad():
            sums = [model(**batch).loss.item() * batch["labels"][:, 1:].numel() for batch in held_out]
        for layer in disabled:
            layer._disable_adapters = False
        assert row["loss"] == pytest.approx(sum(sums) / (4 + 4 * 13), rel=1e-6)
        assert row["last"] == learned["layers"][order[row["layers"] - 1]]


def test_what_cannot_be_pruned_is_refused(tmp_path):
    model, tuner = trained()
    learned = tuner.rotation.recorder().save(tmp_path)
    tuner.save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="from 1 to 6"):
        prune(tmp_path / "adapter", learned, 7, tmp_path / "out")
    with pytest.raises(ValueError, match="give the PeftModel"):
        prune(tmp_path / "adapter", learned, 2, tmp_path / "out", probe=probe())
    with pytest.raises(ValueError, match=r"holds nothing in model\.layers\.9"):
        prune(model, learned | {"layers": [*learned["layers"][:5], "model.layers.9"]}, 2, tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is no earlier export"):
        prune(model, learned, 2, tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged or truncated"):
        prune(tmp_path / "adapter", learned, 2, tmp_path / "out")
    bottleneck = adapted(6, config=peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="IA3 adapter"):
        prune(bottleneck, learned, 2, tmp_path / "out")
    biased = adapted(6, modules_to_save=["post_attention_layernorm"])
    with pytest.raises(ValueError, match="no part of a LoRA but lies in a layer"):
        prune(biased, learned, 2, tmp_path / "out")
    for config in ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
        with pytest.raises(ValueError, match="has changed the base"):
            prune(adapted(6, **config), learned, 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of a run as `intaglio train` leaves it: LoRA with the schedule ist, and held-out rows."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny.save_folder(folder / "model")
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model.train(), lora(task_type="CAUSAL_LM"))
    shake(model)
    tuner = attached(model, IST(layers=1, suppressed=1, interval=1))
    run(model, tuner, 6)
    path = folder / "run"
    tuner.save(path / "adapter")
    tuner.rotation.recorder().save(path)
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"name": base},
        "method": {"name": "lora"},
        "data": {"train": str(folder / "rows.jsonl"), "test_size": 10},
        "train": {"use_cpu": True, "per_device_train_batch_size": 4},
        "evaluate": {},
    }
    (path / "run.json").write_text(json.dumps({"config": config}))
    return path


def prune_command(*arguments):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def test_the_command_prunes_a_run(place, tmp_path):
    done = prune_command(place, "--layers", 1, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["path"] == str(place / "pruned-1")
    assert result["rows"] == 10
    assert [row["layers"] for row in result["losses"]] == [2, 1]
    base = tf.AutoModelForCausalLM.from_pretrained(place.parent / "model")
    loaded = peft.PeftModel.from_pretrained(base, str(place / "pruned-1"))
    assert {layer_of(path, read(place / FILE)["layers"]) for path in placed(loaded)} == set(result["layers"])
    assert "earlier export; --overwrite" in prune_command(place, "--layers", 1).output
    done = prune_command(place, "--layers", 1, "--overwrite", "--rows", 4)
    assert "← this adapter" in done.output
    assert "over 4 held-out rows" in done.output


def test_the_command_without_a_loss(place, tmp_path):
    done = prune_command(place, "--layers", 2, "--rows", 0, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "not taken" in done.output
    assert not (tmp_path / "out/pruning.csv").exists()


def test_the_command_says_what_is_wrong(place, tmp_path):
    assert "from 1 to 2" in prune_command(place, "--layers", 3).output
    assert "not a finished run" in prune_command(tmp_path, "--layers", 1).output
    assert "rows=-1" in prune_command(place, "--layers", 1, "--rows", -1).output
    (tmp_path / "run.json").write_text((place / "run.json").read_text())
    assert "has no layers.json" in prune_command(tmp_path, "--layers", 1).output
    _, tuner = trained(method=RST(layers=2))
    tuner.rotation.recorder().save(tmp_path)
    done = prune_command(tmp_path, "--layers", 1)
    assert done.exit_code == 2
    assert "learns no importance" in done.output
