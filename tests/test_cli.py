"""The command line as a user runs it: real processes, a tiny real model folder, real files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from intaglio import Delta
from intaglio.adapter.folder import WEIGHTS
from support import tiny

RUN = """
model: {{name: "{model}"}}
method: {{name: s2ft, o: 0.5, down: 0.25}}
data:
  task: reasoning_gym/chain_sum
  settings: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}}
  train_size: 60
  test_size: 8
train:
  max_steps: 10
  save_steps: 5
  logging_steps: 1
  learning_rate: 1e-2
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  use_cpu: true
evaluate: {{max_new_tokens: 4}}
"""


def intaglio(*arguments, cwd, check=True):
    command = [sys.executable, "-m", "intaglio", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a run file, and one finished run in runs/run."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny.save_folder(folder / "model")
    (folder / "run.yaml").write_text(RUN.format(model=model))
    done = intaglio("train", "run.yaml", cwd=folder)
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_train_writes_everything(place):
    run = place / "runs/run"
    result = json.loads((run / "run.json").read_text())
    names = {p.name for p in run.iterdir()}
    assert {"adapter", "check.safetensors", "answers.jsonl", "loss.png", "accuracy.png", "checkpoint-5", "checkpoint-10"} <= names
    assert result["training"]["steps"] == 10
    assert result["training"]["seconds_per_step"] > 0
    assert result["training"]["peak_memory_bytes"] > 1e7
    assert [row["step"] for row in result["training"]["history"] if "loss" in row] == list(range(1, 11))
    assert result["trainable"]["entries"] == Delta.load(run / "adapter").selection.size
    assert result["trainable"]["share"] == result["trainable"]["entries"] / result["trainable"]["of"]
    assert result["before"]["total"] == result["after"]["total"] == 8
    assert str(place) not in (run / "adapter/adapter_config.json").read_text()  # a local base's path is nobody's business
    assert result["versions"].keys() >= {"intaglio", "torch", "transformers", "trl", "peft"}
    losses = [row["loss"] for row in result["training"]["history"] if "loss" in row]
    assert losses[-1] < losses[0]
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [line["when"] for line in lines] == ["before"] * 8 + ["after"] * 8
    for png in ("loss.png", "accuracy.png"):
        assert (run / png).read_bytes().startswith(b"\x89PNG")
    text = (place / "stdout.txt").read_text()
    for part in ("trainable", "peak memory", "before", "after", "of it format", "of it skill"):
        assert part in text


def test_checkpoints_hold_no_model(place):
    checkpoint = place / "runs/run/checkpoint-5"
    names = {p.name for p in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "tuner_state.safetensors", "optimizer.pt", "complete.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    selected = Delta.load(checkpoint).selection.size
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(t.numel() for s in state.values() for k, t in s.items() if k != "step") == 2 * selected
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 4.5 * selected + 10_000


def test_verify_in_a_new_process(place):
    done = intaglio("verify", "runs/run", "--json", cwd=place)
    assert json.loads(done.stdout)["equal"] is True
    broken = safetensors.torch.load_file(place / "runs/run/check.safetensors")
    broken["logits"] += 1
    (place / "other").mkdir()
    for name in ("run.json", "adapter"):
        (place / "other" / name).symlink_to(place / "runs/run" / name)
    safetensors.torch.save_file(broken, place / "other/check.safetensors")
    done = intaglio("verify", "other", cwd=place, check=False)
    assert done.returncode == 1
    assert "DIFFERENT" in done.stdout


def test_evaluate_gives_the_runs_own_score(place):
    after = json.loads((place / "runs/run/run.json").read_text())["after"]
    found = json.loads(intaglio("evaluate", "runs/run", "--json", cwd=place).stdout)
    assert {key: found[key] for key in after} == after
    base = json.loads(intaglio("evaluate", "run.yaml", "evaluate.limit=3", "--json", cwd=place).stdout)
    assert base["total"] == 3
    assert base["adapter"] is None


RESUMED = {
    "s2ft": ["method={name: s2ft, o: 0.5, down: 0.25}"],
    "random": ["method={name: random, budget: 500}"],
    "full": ["method={name: full}"],
    "lora": ["method={name: lora}"],
    "bottleneck": ["method={name: bottleneck, bottleneck_size: 4, placement: parallel}"],
    "id3": ["method={name: id3, budget: 503}"],
    "id3-lean": [
        "method={name: id3, budget: 503}",
        "attach={accumulation: lean, decay: start}",
        "train.gradient_accumulation_steps=2",
    ],
    "id3-lora": ["method={name: id3, budget: 0.3}", "attach={lora: {r: 4}, bias_correction: per_entry}"],
    "lora-ist": ["method={name: lora, r: 4}", "schedule={name: ist, layers: 1, suppressed: 1, interval: 2}"],
    "s2ft-ist": [
        "method={name: s2ft, o: 0.5, down: 0.25}",
        "schedule={name: ist, layers: 1, suppressed: 1, interval: 2}",
        "train.eval_strategy=steps",
        "train.eval_steps=5",
    ],
    "id3-lora-ist": [
        "method={name: id3, budget: 0.3}",
        "attach={lora: {r: 4}}",
        "schedule={name: ist, layers: 1, suppressed: 1, interval: 2, state: drop}",
    ],
    "lisa": ["method={name: full}", "schedule={name: lisa, layers: 1, redraw: 2}"],
    "bottleneck-rst": ["method={name: bottleneck, bottleneck_size: 4}", "schedule={name: rst, layers: 1, state: offload}"],
    "repeat": ["method={name: id3, budget: 100, mode: repeat}"],
    "gradient": ["method={name: gradient, budget: 500}", "train.gradient_accumulation_steps=2"],
}


@pytest.mark.parametrize("method", RESUMED)
def test_resume_in_a_new_process_is_bit_exact(place, method):
    """10 steps = 5, a crash, and 5 in a new process; the model is bf16, so full-precision values must survive too."""
    settings = [*RESUMED[method], "model.dtype=bfloat16", "evaluate.before=false", "train.weight_decay=0.1"]
    settings += ["evaluate.limit=1", f"train.output_dir=runs/{method}"]
    intaglio("train", "run.yaml", *settings, cwd=place)
    folder = place / f"runs/{method}"
    one = safetensors.torch.load_file(folder / "adapter" / WEIGHTS)
    # What a crash after step 5 leaves: no later checkpoint, no result, and one torn folder that must be passed over.
    for path in ("adapter", "checkpoint-10"):
        subprocess.run(["rm", "-r", folder / path], check=True)
    (folder / "run.json").unlink()
    torn = folder / "checkpoint-7"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    intaglio("train", "run.yaml", *settings, "--resume", cwd=place)
    result = json.loads((folder / "run.json").read_text())
    assert result["training"]["resumed_from"] == "checkpoint-5"
    two = safetensors.torch.load_file(folder / "adapter" / WEIGHTS)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_calibrated_permuted_and_disjoint(place):
    """Chosen by smallest activation on training rows, permuted while it trains; a second adapter leaves the first's alone."""
    settings = ["method.select=activation", "data.calibration=0.2", "evaluate.limit=1", "evaluate.before=false"]
    for name, extra in (
        ("index", []),
        ("permuted", ["attach.permute=true"]),
        ("second", ["attach.exclude=[runs/index/adapter]"]),
    ):
        intaglio("train", "run.yaml", *settings, f"train.output_dir=runs/{name}", *extra, cwd=place)
    index, permuted, second = (Delta.load(place / f"runs/{name}/adapter") for name in ("index", "permuted", "second"))
    assert index.selection == permuted.selection
    assert all(torch.allclose(value, permuted.values[key], atol=1e-4) for key, value in index.values.items())
    assert second.selection.overlap(index.selection) == 0
    assert index.selection != Delta.load(place / "runs/run/adapter").selection
    assert json.loads(intaglio("verify", "runs/permuted", "--json", cwd=place).stdout)["equal"]
    (place / "runs/permuted/run.json").unlink()
    settings[0:0] = ["attach.permute=true", "train.output_dir=runs/permuted"]
    intaglio("train", "run.yaml", *settings, "train.max_steps=12", "--resume", cwd=place)
    assert Delta.load(place / "runs/permuted/adapter").selection == index.selection
    bad = [["data.calibration=61"], ["data.calibration=1.5"], ["method={name: lora}"], ["method.select=random"]]
    for mistake in bad:
        done = intaglio("train", "run.yaml", *settings, "train.output_dir=runs/never", *mistake, cwd=place, check=False)
        assert done.returncode == 2
        assert "data.calibration" in done.stderr or "attach: has no effect" in done.stderr
        assert not (place / "runs/never").exists()


def test_bottleneck_adapters(place):
    """A PEFT type of our own through the whole command: counted, saved, checked, scored again."""
    settings = ["method={name: bottleneck, bottleneck_size: 4}", "train.output_dir=runs/series", "evaluate.limit=4"]
    intaglio("train", "run.yaml", *settings, cwd=place)
    result = json.loads((place / "runs/series/run.json").read_text())
    tensors = safetensors.torch.load_file(place / "runs/series/adapter" / WEIGHTS)
    assert result["trainable"]["entries"] == sum(t.numel() for t in tensors.values()) == 2 * 2 * 2 * 4 * 32
    assert result["trainable"]["of"] == json.loads((place / "runs/run/run.json").read_text())["trainable"]["of"]
    losses = [row["loss"] for row in result["training"]["history"] if "loss" in row]
    assert losses[-1] < losses[0]
    assert json.loads(intaglio("verify", "runs/series", "--json", cwd=place).stdout)["equal"]
    again = json.loads(intaglio("evaluate", "runs/series", "--json", cwd=place).stdout)
    assert {key: again[key] for key in result["after"]} == result["after"]


def test_entries_chosen_on_training_rows(place):
    settings = ["method={name: fishmask, budget: 500, samples: 6, exclude: ['*embed*']}", "data.calibration=10"]
    settings += ["train.output_dir=runs/fishmask", "evaluate.before=false", "evaluate.limit=1"]
    intaglio("train", "run.yaml", *settings, cwd=place)
    delta = Delta.load(place / "runs/fishmask/adapter")
    assert delta.selection.size == 500
    assert not any("embed" in name for name in delta.selection)
    assert delta.method["samples"] == 6
    assert json.loads(intaglio("verify", "runs/fishmask", "--json", cwd=place).stdout)["equal"]


def test_a_run_killed_at_any_moment_resumes(place):
    """SIGKILL during training; --resume finishes, from a complete checkpoint or from the start."""
    settings = ["train.output_dir=runs/killed", "train.save_steps=1", "train.max_steps=40", "evaluate.before=false"]
    command = [sys.executable, "-m", "intaglio", "train", "run.yaml", *settings]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((place / "runs/killed").glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    intaglio("train", "run.yaml", *settings, "--resume", cwd=place)
    assert json.loads((place / "runs/killed/run.json").read_text())["training"]["steps"] == 40


def test_an_earlier_run_is_never_mixed_or_lost(place):
    before = (place / "runs/run/run.json").read_bytes()
    for mistake in ("data={train: nowhere.jsonl}", "method.o=0.001"):  # found before, and only after loading
        done = intaglio("train", "run.yaml", "--overwrite", mistake, cwd=place, check=False)
        assert done.returncode == 2
        assert Delta.load(place / "runs/run/adapter").selection.size > 0
        assert (place / "runs/run/run.json").read_bytes() == before
    assert intaglio("train", "run.yaml", "--overwrite", "--resume", cwd=place, check=False).returncode == 2
    done = intaglio("train", "run.yaml", cwd=place, check=False)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert (place / "runs/run/run.json").read_bytes() == before


def test_methods_lists_all(place):
    """Ours and those that PEFT runs, each with its fields; the table shows what the JSON holds."""
    from intaglio.methods import METHODS
    from intaglio.runs.peft_methods import PEFT_METHODS

    listed = json.loads(intaglio("methods", "--json", cwd=place).stdout)
    assert listed.keys() == METHODS.keys() | PEFT_METHODS.keys()
    assert all(method["summary"] and method["fields"]["name"] == name for name, method in listed.items())
    assert listed["lora"]["fields"]["r"] == 8
    assert listed["bottleneck"]["fields"]["placement"] == "series"
    text = intaglio("methods", cwd=place).stdout
    for part in ("down", "lora", "BottleneckConfig"):
        assert part in text


MISTAKES = {
    "method": (["method.name=s2tf"], "did you mean 's2ft'"),
    "key": (["method.larges=true"], "did you mean 'largest'"),
    "target": (["method.downn=0.1"], "did you mean 'down'"),
    "share 0": (["method.down=0.0"], "above 0"),
    "share above 1": (["method.down=1.01"], "at most 1.0"),
    "budget of nothing": (["method={name: random, budget: 1e-9}"], "rounds to nothing"),
    "no biases": (["method={name: bitfit}"], "tensors='one_dimensional' trains the scales"),
    "few examples": (["method={name: fishmask, samples: 11}", "data.calibration=10"], "the probe has 10 examples"),
    "missing data": (["data={train: nowhere.jsonl}"], "nowhere.jsonl: no such file"),
    "missing model": (["model.name=nobody/nothing"], "model.name='nobody/nothing'"),
    "missing folder": (["model.name=./nowhere"], "model.name='./nowhere'"),
    "from_pretrained": (["model.nmae=foo"], "model: from_pretrained refuses"),
    "output is a file": (["train.output_dir=run.yaml"], "is a file"),
    "train value": (["train.learning_rate=fast"], "train.learning_rate='fast': wanted is float"),
    "run file": None,
}


@pytest.mark.filterwarnings("default")  # the command's own process would not raise them either
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_clear_line(place, mistake, monkeypatch):
    """In this process, which has the libraries loaded; a process of its own for each takes five seconds longer."""
    from typer.testing import CliRunner

    from intaglio.cli import app

    overrides, message = MISTAKES[mistake] or ([], "absent.yaml: no such run file")
    file = "absent.yaml" if MISTAKES[mistake] is None else "run.yaml"
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, ["train", file, "train.output_dir=runs/never", *overrides])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert not (place / "runs/never/adapter").exists()


def test_debug_shows_the_traceback(place):
    done = intaglio("train", "absent.yaml", "--debug", cwd=place, check=False)
    assert "Traceback" in done.stderr


def test_messages_need_a_chat_template(place, tmp_path):
    bare = tiny.save_folder(tmp_path / "bare", chat=False)
    rows = [{"messages": [{"role": "user", "content": f"a{i}"}, {"role": "assistant", "content": "b"}]} for i in range(4)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "empty.jsonl").write_text("")
    settings = ["train.output_dir=runs/never", f"data={{train: {tmp_path / 'chat.jsonl'}, test_size: 1}}"]
    done = intaglio("train", "run.yaml", f"model.name={bare}", *settings, cwd=place, check=False)
    assert done.returncode == 2
    assert "no chat template" in done.stderr
    done = intaglio("train", "run.yaml", f"data={{train: {tmp_path / 'empty.jsonl'}}}", settings[0], cwd=place, check=False)
    assert done.returncode == 2
    assert "holds no rows" in done.stderr
    trained = intaglio("train", "run.yaml", settings[1], "train.output_dir=runs/chat", "train.max_steps=2", "--json", cwd=place)
    assert json.loads(trained.stdout)["after"]["total"] == 1


def test_a_foreign_adapter_is_refused(place, tmp_path):
    other = tiny.save_folder(tmp_path / "other", seed=5)
    done = intaglio("evaluate", "run.yaml", f"model.name={other}", "--adapter", "runs/run/adapter", cwd=place, check=False)
    assert done.returncode == 2
    assert "fingerprint" in done.stderr
    done = intaglio("evaluate", "run.yaml", "--adapter", "runs", cwd=place, check=False)
    assert done.returncode == 2
    assert "not an adapter folder" in done.stderr


def test_loss_on_held_out_rows_and_the_best_checkpoint(place):
    settings = ["train.eval_strategy=steps", "train.eval_steps=5", "train.load_best_model_at_end=true", "evaluate.limit=1"]
    intaglio("train", "run.yaml", *settings, "train.output_dir=runs/best", cwd=place)
    history = json.loads((place / "runs/best/run.json").read_text())["training"]["history"]
    losses = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    assert losses.keys() == {5, 10}
    best = Delta.load(place / f"runs/best/checkpoint-{min(losses, key=losses.__getitem__)}")
    final = Delta.load(place / "runs/best/adapter")
    assert all(torch.equal(final.values[name], best.values[name]) for name in best.selection)
    (place / "text.jsonl").write_text('{"text": "abc"}\n' * 3)
    mistake = ["data={train: text.jsonl}", "train.eval_strategy=steps", "train.output_dir=runs/never"]
    (place / "text.yaml").write_text(f"model: {{name: {place / 'model'}}}\n")
    done = intaglio("train", "text.yaml", *mistake, cwd=place, check=False)
    assert done.returncode == 2
    assert "no held-out rows" in done.stderr


def test_chat_templates_come_from_files(place):
    (place / "turns.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    settings = [
        "data.chat=true",
        "train.max_steps=1",
        "evaluate.limit=2",
        "train.output_dir=runs/template",
        "train.report_to=tensorboard",
    ]
    intaglio("train", "run.yaml", *settings, "train.chat_template_path=turns.jinja", cwd=place)
    after = json.loads((place / "runs/template/run.json").read_text())["after"]
    again = json.loads(intaglio("evaluate", "runs/template", "--json", cwd=place).stdout)
    assert {key: again[key] for key in after} == after
    assert list((place / "runs/template").rglob("events.out.tfevents.*"))
    intaglio("train", "run.yaml", *settings, "--overwrite", cwd=place)
    done = intaglio("train", "run.yaml", *settings, "--overwrite", "train.chat_template_path=some/model", cwd=place, check=False)
    assert done.returncode == 2
    assert "give a .jinja or .j2 file" in done.stderr
