"""Resume means the same run: what differs is refused by name, what is damaged is passed over, what is over stays over."""

import json
import shutil

import pytest
import safetensors.torch

from intaglio import train
from intaglio.hf.checkpoint import COMPLETE, last_checkpoint
from support import tiny

METHODS = {"s2ft": {"name": "s2ft", "o": 0.25, "down": 0.1}, "lora": {"name": "lora", "r": 2, "target_modules": "all-linear"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, another with other frozen weights, data, other data."""
    place = tmp_path_factory.mktemp("place")
    tiny.save_folder(place / "base")
    shutil.copytree(place / "base", place / "other")
    weights = safetensors.torch.load_file(place / "other/model.safetensors")
    weights["model.norm.weight"] *= 1.25
    safetensors.torch.save_file(weights, place / "other/model.safetensors", {"format": "pt"})
    for name, sign in (("rows", "+"), ("others", "-")):
        lines = (json.dumps({"prompt": f"q{i}{sign}", "completion": "a"}) for i in range(8))
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    return place


def blocks(place, output, method="s2ft", **settings):
    fixed = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "use_cpu": True}
    return {
        "model": {"name": str(place / "base")},
        "method": dict(METHODS[method]),
        "data": {"train": str(place / "rows.jsonl")},
        "train": fixed | {"output_dir": str(output), "disable_tqdm": True, "logging_steps": 1} | settings,
    }


@pytest.fixture(scope="module", params=METHODS)
def whole(request, place, tmp_path_factory):
    """(method, folder) of a run from end to end."""
    output = tmp_path_factory.mktemp("whole") / request.param
    train(blocks(place, output, request.param))
    return request.param, output


def weights(output):
    return (output / "adapter/adapter_model.safetensors").read_bytes()


def half(whole, output, *steps):
    for step in steps:
        shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
    return output


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("train.optim", {"optim": "sgd"}),
        ("train.learning_rate was 0.001, now 0.002", {"learning_rate": 2e-3}),
        ("train.weight_decay", {"weight_decay": 0.3}),
        ("train.lr_scheduler_type", {"lr_scheduler_type": "constant"}),
        ("train.seed", {"seed": 7}),
        ("train.per_device_train_batch_size", {"per_device_train_batch_size": 4}),
        ("train.max_length", {"max_length": 5}),
        ("train.gradient_accumulation_steps", {"gradient_accumulation_steps": 2}),
    ],
)
def test_other_settings_are_refused_by_name(whole, place, tmp_path, named, change):
    method, folder = whole
    with pytest.raises(ValueError, match=rf"resume: checkpoint-2 is of a run with other settings: .*{named}"):
        train(blocks(place, half(folder, tmp_path / "run", 2), method, **change), resume=True)


@pytest.mark.parametrize(
    ("named", "block", "value"),
    [("model was", "model", "other"), ("data.train was 'sha256:", "data", "others.jsonl")],
)
def test_another_base_and_other_data_are_refused(whole, place, tmp_path, named, block, value):
    method, folder = whole
    changed = blocks(place, half(folder, tmp_path / "run", 2), method)
    changed[block] = {"name" if block == "model" else "train": str(place / value)}
    with pytest.raises(ValueError, match=named):
        train(changed, resume=True)


@pytest.mark.parametrize("field", [{"r": 4}, {"lora_alpha": 2}, {"target_modules": ["q_proj"]}])
def test_another_lora_is_refused(place, tmp_path, field):
    train(blocks(place, tmp_path / "run", "lora", max_steps=2))
    changed = blocks(place, tmp_path / "run", "lora")
    changed["method"] |= field
    with pytest.raises(ValueError, match="with other settings: method was"):
        train(changed, resume=True)


def test_data_that_moved_and_other_logging_are_the_same_run(whole, place, tmp_path):
    method, folder = whole
    shutil.copy(place / "rows.jsonl", tmp_path / "moved.jsonl")
    changed = blocks(place, half(folder, tmp_path / "run", 2), method, logging_steps=2, save_steps=4)
    changed["data"] = {"train": str(tmp_path / "moved.jsonl")}
    train(changed, resume=True)
    assert weights(tmp_path / "run") == weights(folder)


def test_a_run_that_is_over_makes_no_further_update(whole, place, tmp_path):
    """Killed in the final save: the last checkpoint is whole, the result is not."""
    method, folder = whole
    result = train(blocks(place, half(folder, tmp_path / "run", 2, 4), method), resume=True)
    assert result["training"]["steps"] == 4
    assert [entry["step"] for entry in result["training"]["history"] if "loss" in entry] == [1, 2, 3, 4]
    assert weights(tmp_path / "run") == weights(folder)


def test_the_mean_loss_is_that_of_the_whole_run(whole, place, tmp_path):
    """Not of the part since the last start."""
    method, folder = whole
    result = train(blocks(place, half(folder, tmp_path / "run", 2), method), resume=True)
    then = json.loads((folder / "run.json").read_text())
    assert result["training"]["final_loss"] == then["training"]["final_loss"]
    losses = [entry["loss"] for entry in result["training"]["history"] if "loss" in entry]
    assert result["training"]["final_loss"] == sum(losses) / 4


def test_an_older_checkpoint_stays_until_the_newer_one_is_complete(whole, place, tmp_path, monkeypatch):
    """With a limit of one, a run that is killed between the two would begin anew."""
    method, folder = whole
    run = half(folder, tmp_path / "run", 2)
    monkeypatch.setattr("intaglio.hf.trainer.mark_complete", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        train(blocks(place, run, method, save_total_limit=1), resume=True)
    assert last_checkpoint(run).name == "checkpoint-2"
    monkeypatch.undo()
    train(blocks(place, run, method, save_total_limit=1), resume=True)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(whole, place, tmp_path, damage):
    """Any file of it: the run goes on from the one before, and ends as it would have."""
    method, folder = whole
    names = [path.name for path in (folder / "checkpoint-4").iterdir() if path.name != COMPLETE]
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors"} <= set(names)
    for name in names:
        run = half(folder, tmp_path / name, 2, 4)
        path = run / "checkpoint-4" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x40
        path.unlink()
        if damage != "remove":
            path.write_bytes(content if damage == "flip" else content[:-1])
        with pytest.warns(UserWarning, match=f"checkpoint-4: {name} is .*an earlier checkpoint is taken"):
            assert last_checkpoint(run).name == "checkpoint-2"
    with pytest.warns(UserWarning, match="an earlier checkpoint is taken"):
        train(blocks(place, run, method), resume=True)
    assert weights(run) == weights(folder)


def test_a_checkpoint_of_before_settings_were_kept_is_taken(whole, place, tmp_path):
    """0.1.0 wrote the step alone."""
    method, folder = whole
    run = half(folder, tmp_path / "run", 2)
    (run / "checkpoint-2" / COMPLETE).write_text('{"step": 2}')
    train(blocks(place, run, method), resume=True)
    assert weights(run) == weights(folder)
