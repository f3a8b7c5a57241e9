"""Exports: what stock PEFT and stock transformers load is the tuned model, and whatever is not exact never appears."""

import dataclasses
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from typer.testing import CliRunner

from intaglio import S2FT, Delta, Full, Random, attach
from intaglio.cli import app
from intaglio.core.entries import Elements, Slices
from intaglio.core.fingerprint import fingerprint
from intaglio.core.selection import Selection
from intaglio.export.lora import RANKS, lora_rank, to_lora
from intaglio.export.merged import to_merged
from intaglio.export.proof import InexactExport, answer, compare, prompts
from intaglio.export.staging import MARKER, staged
from intaglio.export.supertuning import to_supertuning
from intaglio.runs.config import load_config
from support import tiny

COLUMNS = S2FT(o=0.5, down=0.25)
ROWS = S2FT(v=0.5, o=None, up=0.25, down=None)
BOTH = S2FT(v=0.5, o=0.5, up=0.25, down=0.25)
SCATTERED = Random(budget=0.05, include=("*proj.weight",))
# Stock transformers cannot run DeBERTa (the first) in bfloat16: its q and v biases stay float32.
BASES = [(n, d) for n in tiny.MODELS for d in (torch.float32, torch.bfloat16) if (n, d) != ("deberta", torch.bfloat16)]
LINEAR = [(n, d) for n, d in BASES if n != "transposed_gpt2"]


def linear_only(method, name):
    """Without the experts, which no linear layer holds."""
    return dataclasses.replace(method, up=None, down=None) if name in tiny.MIXTURES else method


def bases(cases):
    return pytest.mark.parametrize(("name", "dtype"), cases, ids=[f"{n}-{str(d).removeprefix('torch.')}" for n, d in cases])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a tiny base from a folder, in a type, as a user does (a cast afterwards would cast rotary tables too)."""
    place, kinds = tmp_path_factory.mktemp("bases"), {}

    def load(name, dtype=torch.float32):
        if name not in kinds:
            model = tiny.build(name)
            model.save_pretrained(place / name)
            kinds[name] = type(model)
        return kinds[name].from_pretrained(place / name, dtype=dtype).eval()

    return load


def tune(model, name, method=COLUMNS, lr=1e-2):
    """The Delta of a short training; `model` is the tuned model afterwards."""
    tuner = attach(model, method)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=lr)
    for i in range(3):
        model(**tiny.batch(name, seed=i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = tuner.delta()
    tuner.detach().eval()
    return delta


def state(model):
    return {key: t.clone() for key, t in model.state_dict().items()}


def same(model, expected):
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(t, expected[key]) for key, t in found.items())


@torch.no_grad()
def logits(model, name):
    inputs = tiny.batch(name, seed=9)
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def handmade(model, selection, change=0.1):
    """A Delta that adds `change` to the selected entries."""
    parameters = dict(model.named_parameters())
    base = {name: entries.gather(parameters[name]) for name, entries in selection.items()}
    prints = {name: fingerprint(values) for name, values in base.items()}
    return Delta(selection, {name: values + change for name, values in base.items()}, prints)


# LoRA


@pytest.mark.parametrize("method", [COLUMNS, ROWS], ids=["columns", "rows"])
@bases(BASES)
def test_lora_is_exact_in_stock_peft(load, tmp_path, name, dtype, method):
    """Merged by PEFT, the weights are the tuned ones (bit for bit in the base's type bfloat16); the base is untouched."""
    tuned, base = load(name, dtype), load(name, dtype)
    delta, before = tune(tuned, name, linear_only(method, name)), state(base)
    result = to_lora(delta, base, tmp_path / "lora")
    assert same(base, before)
    assert result["max_difference"] <= 2e-4
    assert result["tokens"] > 50 or not base.can_generate()
    loaded = PeftModel.from_pretrained(load(name, dtype).float(), str(tmp_path / "lora"))
    assert (logits(loaded, name) - logits(tuned.float(), name)).abs().max() <= 2e-4
    merged = loaded.merge_and_unload().state_dict()
    for key, tensor in tuned.state_dict().items():
        if dtype == torch.bfloat16:
            assert torch.equal(merged[key].to(dtype), tensor.to(dtype))
        else:
            torch.testing.assert_close(merged[key], tensor, rtol=1e-6, atol=1e-7)


def test_lora_folder_is_what_engines_read(load, tmp_path):
    """One rank, padded with zeros; alpha = rank; no patterns; unfused names with PEFT's prefix; one factor of 0 and 1."""
    base = load("gqa_llama")
    weights = {"o_proj": (1, [0, 9, 31]), "v_proj": (0, [2])}
    names = {f"model.layers.1.self_attn.{p}.weight": chosen for p, chosen in weights.items()}
    parameters = dict(base.named_parameters())
    chosen = {n: Slices(tuple(parameters[n].shape), dim, torch.tensor(index)) for n, (dim, index) in names.items()}
    delta = handmade(base, Selection(chosen))
    result = to_lora(delta, base, tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert result["rank"] == config["r"] == config["lora_alpha"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(n.removesuffix(".weight") for n in names)  # only one layer of two
    tensors = safetensors.torch.load_file(tmp_path / "lora/adapter_model.safetensors")
    for name in names:
        prefix = "base_model.model." + name.removesuffix(".weight")
        a, b = tensors.pop(f"{prefix}.lora_A.weight"), tensors.pop(f"{prefix}.lora_B.weight")
        outputs, inputs = parameters[name].shape
        assert (a.shape, b.shape) == ((8, inputs), (outputs, 8))
        zero_one = a if "o_proj" in name else b
        assert zero_one.sum() == len(names[name][1])
        assert set(zero_one.unique().tolist()) == {0.0, 1.0}
        expected = torch.zeros(outputs, inputs)
        values = torch.full(delta.values[name].shape, 0.1)
        chosen[name].scatter_(expected, values)
        torch.testing.assert_close(b @ a, expected, rtol=0, atol=1e-7)
    assert not tensors


def test_targets_are_last_names_where_they_mean_the_same(load, tmp_path):
    base = load("mha_llama")
    delta = tune(load("mha_llama"), "mha_llama", COLUMNS)
    assert to_lora(delta, base, tmp_path / "lora")["targets"] == ["down_proj", "o_proj"]


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (2, 8), (8, 8), (9, 16), (129, 256), (257, 320), (321, 512), (512, 512)])
def test_ranks_are_those_that_vllm_takes(count, rank):
    assert rank in RANKS
    assert lora_rank(Selection({"w.weight": Slices((64, 1024), 1, torch.arange(count))})) == rank


def test_rank_above_512_is_refused_with_advice():
    selection = Selection(
        {"a.weight": Slices((64, 1024), 1, torch.arange(513)), "b.weight": Slices((64, 64), 1, torch.arange(2))}
    )
    with pytest.raises(ValueError, match=r"a\.weight has 513 chosen slices.*at most 512.*fewer units.*--to merged"):
        lora_rank(selection)


REFUSED = {
    "scattered": (SCATTERED, r"proj\.weight: holds elements.*more parameters\); use --to supertuning.*or --to merged"),
    "whole": (Full(), r"holds whole.*use --to merged"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_lora_can_hold_is_refused(load, tmp_path, kind):
    """Exporting Elements (or whole tensors) to LoRA: a clear error, the model unchanged, nothing on disk."""
    method, message = REFUSED[kind]
    base = load("gqa_llama")
    before = state(base)
    delta = tune(load("gqa_llama"), "gqa_llama", method)
    with pytest.raises(ValueError, match=message):
        to_lora(delta, base, tmp_path / "lora")
    assert same(base, before)
    assert not list(tmp_path.iterdir())


PLACES = {
    "embedding": ("tied_llama", "model.embed_tokens.weight", 0, "tied weights|'weight' of Embedding"),
    "untied embedding": ("gqa_llama", "model.embed_tokens.weight", 0, "'weight' of Embedding"),
    "bias": (
        "qkv_bias_qwen2",
        "model.layers.0.self_attn.q_proj.bias",
        0,
        r"q_proj\.bias: holds slices of a tensor of shape \[32\]",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_slices_of_other_tensors_are_refused(load, tmp_path, place):
    name, parameter, dim, message = PLACES[place]
    base = load(name)
    shape = tuple(dict(base.named_parameters())[parameter].shape)
    delta = handmade(base, Selection({parameter: Slices(shape, dim, torch.tensor([1, 3]))}))
    with pytest.raises(ValueError, match=message):
        to_lora(delta, base, tmp_path / "lora")
    assert not list(tmp_path.iterdir())
    merged = to_merged(delta, base, tmp_path / "merged")  # the way that the error names
    assert merged["max_difference"] == 0.0


@pytest.mark.parametrize("export", [to_lora, to_supertuning])
def test_three_dimensional_experts_are_refused(load, tmp_path, export):
    delta = tune(load("mixtral"), "mixtral", S2FT(o=None, down=0.25))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj: .*--to merged"):
        export(delta, load("mixtral"), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_rounded_factors_are_noticed(load, tmp_path):
    """bfloat16 factors of a change that bfloat16 cannot hold: refused, and nothing is left behind."""
    base = load("gqa_llama")
    delta = tune(load("gqa_llama"), "gqa_llama", BOTH, lr=0.3)
    with pytest.raises(InexactExport, match=r"a logit differs by .* allowed are .* float32 does not"):
        to_lora(delta, base, tmp_path / "lora", dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())
    assert to_lora(delta, base, tmp_path / "lora")["rank"] == 16


def test_half_precision_factors_are_kept_where_they_fit(load, tmp_path):
    """Tuned values of twice the base's differ from it by a number that bfloat16 holds."""
    base = load("gqa_llama", torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    entries = Slices((32, 48), 1, torch.tensor([3, 40]))
    original = entries.gather(dict(base.named_parameters())[name])
    delta = Delta(Selection({name: entries}), {name: original * 2}, {name: fingerprint(original)})
    result = to_lora(delta, base, tmp_path / "lora", dtype=torch.bfloat16)
    assert result["max_difference"] <= 2e-4
    tensors = safetensors.torch.load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_foreign_base_is_refused(load, tmp_path):
    delta = tune(load("gqa_llama"), "gqa_llama")
    other = tiny.build("gqa_llama", seed=3)
    for export in (to_lora, to_merged, to_supertuning):
        before = state(other)
        with pytest.raises(ValueError, match="fingerprint"):
            export(delta, other, tmp_path / "export")
        assert same(other, before)
    with pytest.raises(ValueError, match="no such parameter"):
        to_lora(delta, load("opt"), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_is_refused(load, tmp_path):
    model = load("gqa_llama")
    tuner = attach(model, COLUMNS)
    for export in (to_lora, to_merged):
        with pytest.raises(ValueError, match="tuner attached"):
            export(tuner.delta(), model, tmp_path / "export")


# merged


@pytest.mark.parametrize("method", [BOTH, Full()], ids=lambda m: m.name)
@bases(BASES)
def test_merged_is_a_plain_model(load, tmp_path, name, dtype, method):
    """S2FT checklist 19. Export to plain HF Linear: reload with stock transformers, identical logits, no extra keys."""
    tuned, base = load(name, dtype), load(name, dtype)
    delta, before = tune(tuned, name, method), state(base)
    to_merged(delta, base, tmp_path / "merged")
    assert same(base, before)
    reloaded, info = type(base).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(logits(reloaded.eval(), name), logits(tuned, name))
    assert same(reloaded, tuned.state_dict())
    load(name, dtype).save_pretrained(tmp_path / "base")
    keys = [safetensors.torch.load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("base", "merged")]
    assert keys[0] == keys[1]
    assert all(module.__module__.split(".")[0] in ("torch", "transformers") for module in reloaded.modules())


def test_merged_loads_without_us(load, tmp_path):
    """In a process that never imports Intaglio."""
    tuned, base = load("gqa_llama"), load("gqa_llama")
    to_merged(tune(tuned, "gqa_llama"), base, tmp_path / "merged")
    ids = tiny.batch("gqa_llama")["input_ids"]
    code = f"""
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.save(model(input_ids=torch.tensor({ids.tolist()})).logits.detach(), sys.argv[2])
assert "intaglio" not in sys.modules and "peft" not in sys.modules
"""
    torch.set_num_threads(1)
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + code]
    subprocess.run([*command, tmp_path / "merged", tmp_path / "logits.pt"], check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), tuned(input_ids=ids).logits)


def test_a_base_that_no_folder_can_hold_is_refused(load, tmp_path):
    """`.to(bfloat16)` after loading rounds the rotary table, which is in no file: the reloaded model differs."""
    base, tuned = (load("gqa_llama").to(torch.bfloat16) for _ in range(2))
    delta = tune(tuned, "gqa_llama")
    with pytest.raises(InexactExport, match="load it with dtype"):
        to_merged(delta, base, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    assert same(base, state(load("gqa_llama").to(torch.bfloat16)))


# SUPERTUNING


@pytest.mark.parametrize("kind", ["slices", "elements"])
@bases(LINEAR)
def test_supertuning_is_exact_in_stock_peft(load, tmp_path, name, dtype, kind):
    base, tuned = load(name, dtype), load(name, dtype)
    linear = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Linear)}
    names = [
        n for n, p in base.named_parameters() if id(p) in linear and ("layer" in n or ".h." in n) and p.shape[0] > 8
    ]  # no routers
    method = linear_only(BOTH, name) if kind == "slices" else Random(budget=0.02, include=tuple(names))
    delta, before = tune(tuned, name, method), state(base)
    result = to_supertuning(delta, base, tmp_path / "super")
    assert same(base, before)
    assert result["entries"] == delta.selection.size <= result["padded"]
    loaded = PeftModel.from_pretrained(load(name, dtype).float(), str(tmp_path / "super"))
    assert (logits(loaded, name) - logits(tuned.float(), name)).abs().max() <= 2e-4
    merged = loaded.merge_and_unload().state_dict()
    for key, tensor in tuned.state_dict().items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-6, atol=1e-7)


def test_supertuning_leaves_room_for_the_densest_weight(load, tmp_path):
    """Shares of 1 in 1024, 1 in 3 and all of a weight: PEFT's own count fits each, whatever the rounding."""
    base = load("gqa_llama")
    parameters = dict(base.named_parameters())
    for counts in ([1, 3], [1, 341], [7, 1024]):
        names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
        chosen = {n: Elements(tuple(parameters[n].shape), torch.arange(c)) for n, c in zip(names, counts, strict=True)}
        result = to_supertuning(handmade(base, Selection(chosen)), base, tmp_path / str(counts[1]))
        assert result["entries"] == sum(counts)
        assert result["padded"] == 2 * max(counts)


def test_supertuning_takes_linear_layers_only(load, tmp_path):
    delta = tune(load("transposed_gpt2"), "transposed_gpt2", COLUMNS)
    with pytest.raises(ValueError, match=r"c_proj\.weight: its layer is no nn\.Linear.*--to merged"):
        to_supertuning(delta, load("transposed_gpt2"), tmp_path / "super")
    delta = tune(load("gqa_llama"), "gqa_llama", Random(budget=0.05))
    with pytest.raises(ValueError, match="of Embedding"):
        to_supertuning(delta, load("gqa_llama"), tmp_path / "super")
    assert not list(tmp_path.iterdir())


# the check itself, and the folder


def test_the_check_sees_a_small_change(load):
    model = load("gqa_llama")
    reference = answer(model, prompts(model))
    assert reference.inputs.given.shape == (4, 24)
    assert compare(reference, model) == {"max_difference": 0.0, "tolerance": 2e-4, "tokens": pytest.approx(64, abs=4)}
    with torch.no_grad():
        model.lm_head.weight[5] += 1e-3
    with pytest.raises(InexactExport, match="a logit differs"):
        compare(reference, model)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(InexactExport, match="a logit differs by nan"):
        compare(reference, model)


def test_one_pass_says_what_generating_would(load):
    model = load("gqa_llama")
    reference = answer(model, prompts(model))
    model.generation_config.eos_token_id = None
    ids = prompts(model).given
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert torch.equal(generated, reference.inputs.given)


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    def work():
        with staged(tmp_path / "out") as folder:
            (folder / "file").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/thesis.txt").write_text("theirs")

    with pytest.raises(ValueError, match="exists and is no earlier export"):
        work()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["thesis.txt"]


def test_a_failure_leaves_the_earlier_export(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / MARKER).write_text("{}")

    def fail():
        with staged(tmp_path / "export", overwrite=True) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert [p.name for p in (tmp_path / "export").iterdir()] == [MARKER]
    with staged(tmp_path / "export", overwrite=True) as folder:
        (folder / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert [p.name for p in (tmp_path / "export").iterdir()] == ["whole"]


# the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, an adapter of it that names no base, and a finished run around the same adapter."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("place")
    base = tiny.save_folder(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tuner = attach(model, BOTH)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    model(**tiny.batch("gqa_llama")).loss.backward()
    optimizer.step()
    tuner.save(folder / "adapter")
    tuner.save(folder / "run/adapter")
    config = load_config({"model": {"name": base}, "data": {"task": "reasoning_gym/gcd"}}).model_dump(mode="json")
    total = sum(p.numel() for p in model.parameters())
    (folder / "run/run.json").write_text(json.dumps({"config": config, "trainable": {"of": total}}))
    model(**tiny.batch("gqa_llama"))
    tuner.detach().eval().save_pretrained(folder / "tuned")
    return folder


def run(place, *arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("to", ["lora", "merged", "supertuning"])
def test_export_command(place, tmp_path, to):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run(place, "export", place / "run", "--to", to, "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == str(tmp_path / "out")
    assert result["bytes"] > result["compact_bytes"] > 0
    assert result["tokens"] > 90  # 7 prompts: 3 of text through the tokenizer
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # all as readable as the card
    for file in (tmp_path / "out").iterdir():  # no machine paths
        assert str(place).encode() not in file.read_bytes()
    tuned = AutoModelForCausalLM.from_pretrained(place / "tuned")
    if to == "merged":
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tuned.state_dict())
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
        assert (tmp_path / "out/generation_config.json").is_file()
    else:
        base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.bfloat16).float()
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
        assert (logits(loaded, "gqa_llama") - logits(tuned.float(), "gqa_llama")).abs().max() <= 2e-4
    done = run(place, "export", place / "run", "--to", to, "--output", tmp_path / "out", "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert "greedy tokens the same" in done.stdout


MISTAKES = {
    "no base": (["adapter", "--to", "lora"], "names no base model (it was a local folder); give --base"),
    "form": (["run", "--to", "onnx"], "to='onnx': known are lora, gguf, merged"),
    "dtype": (["run", "--to", "lora", "--dtype", "int8"], "dtype='int8': known are float32"),
    "dtype without effect": (["run", "--to", "merged", "--dtype", "float32"], "has no effect with --to merged"),
    "not an adapter": (["base", "--to", "lora"], "not an"),
    "missing base": (["adapter", "--to", "lora", "--base", "nobody/nothing"], "'nobody/nothing'"),
    "occupied": (["run", "--to", "lora", "--output", "base"], "exists and is no earlier export"),
    "occupied, overwrite": (["run", "--to", "lora", "--output", "base", "--overwrite"], "exists and is no earlier export"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_clear_line(place, monkeypatch, mistake):
    monkeypatch.chdir(place)
    arguments, message = MISTAKES[mistake]
    output = [] if "--output" in arguments else ["--output", "never"]
    before = sorted(p.name for p in place.iterdir())
    done = run(place, "export", *arguments, *output)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert sorted(p.name for p in place.iterdir()) == before


def test_an_earlier_export_needs_overwrite_and_base_can_be_given(place, tmp_path):
    arguments = ["export", place / "adapter", "--to", "lora", "--base", place / "base", "--output", tmp_path / "out"]
    assert run(place, *arguments).exit_code == 0
    done = run(place, *arguments)
    assert done.exit_code == 2
    assert "--overwrite replaces it" in done.stderr
