"""LoRA exports in every layout, and the way back: the same Delta, bit for bit."""

import json
import math

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, save_as_lora
from typer.testing import CliRunner

from intaglio import S2FT, BitFit, Delta, Full, Random
from intaglio.cli import app
from intaglio.core.entries import Slices
from intaglio.core.selection import Selection
from intaglio.export.approximate_lora import REPORT, to_approximate_lora
from intaglio.export.from_lora import read_lora, to_delta
from intaglio.export.lora import to_lora
from intaglio.export.peft_folder import EXACT
from intaglio.export.proof import InexactExport
from intaglio.export.staging import MARKER
from intaglio.runs.export import export
from support import tiny
from support.exports import BF16, FP32, config_of, handmade, rewrite, same_delta, tuned

BOTH = S2FT(q=0.25, v=0.5, o=0.5, up=0.25, down=0.25)
SCATTERED = Random(budget=0.05, include=("*proj.weight",))


def tensors_of(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def some_layers(model, layers=(1,), count=3):
    """Slices of two projections in some layers only, of unequal number."""
    parameters = dict(model.named_parameters())
    places = {}
    for layer in layers:
        for part, dim, n in (("mlp.down_proj", 1, count), ("self_attn.v_proj", 0, count + 2)):
            name = f"model.layers.{layer}.{part}.weight"
            places[name] = Slices(tuple(parameters[name].shape), dim, torch.arange(1, 1 + n))
    return Selection(places)


def merged(base, folder):
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload().state_dict()


# ragged


def test_ragged_ranks_are_exact_and_scale_is_one_with_or_without_patterns(tmp_path):
    """Trap 1: alpha_pattern equals rank_pattern, and alpha equals r, so that an engine which ignores both scales by 1 too."""
    base = tiny.build("gqa_llama")
    delta = handmade(base, some_layers(base), change=None)
    result = to_lora(delta, base, tmp_path / "ragged", ragged=True)
    config = config_of(tmp_path / "ragged")
    assert (result["rank"], result["max_lora_rank"]) == (5, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.1.mlp.down_proj": 3}
    assert config["lora_alpha"] == config["r"] == 5
    shapes = {key.split(".")[-3]: t.shape[0] for key, t in tensors_of(tmp_path / "ragged").items() if "lora_A" in key}
    assert shapes == {"down_proj": 3, "v_proj": 5}
    uniform = to_lora(delta, base, tmp_path / "uniform")
    assert uniform["rank"] == 8
    assert result["bytes"] < uniform["bytes"]
    one, other = (merged(tiny.build("gqa_llama"), tmp_path / kind) for kind in ("ragged", "uniform"))
    assert all(torch.equal(t, other[key]) for key, t in one.items())


def test_equal_ranks_need_no_pattern(tmp_path):
    base, delta = tuned("gqa_llama", S2FT(o=None, down=0.25))
    to_lora(delta, base, tmp_path / "lora", ragged=True)
    assert config_of(tmp_path / "lora")["rank_pattern"] == {}
    assert config_of(tmp_path / "lora")["r"] == 12


# filled layers


@pytest.mark.parametrize("name", ["gqa_llama", "transposed_gpt2"])
def test_filled_layers_leave_no_projection_with_a_gap(tmp_path, name):
    """Trap 4: every layer of every projection that is there at all, zeros where nothing changed; target_modules by last name."""
    base = tiny.build(name)
    part = "model.layers.1.mlp.down_proj" if name == "gqa_llama" else "transformer.h.1.mlp.c_fc"
    weight = dict(base.named_parameters())[f"{part}.weight"]
    delta = handmade(base, Selection({f"{part}.weight": Slices(tuple(weight.shape), 1, torch.tensor([2, 7]))}), change=None)
    result = to_lora(delta, base, tmp_path / "lora", fill_layers=True)
    tensors = tensors_of(tmp_path / "lora")
    assert config_of(tmp_path / "lora")["target_modules"] == [part.rpartition(".")[2]]
    assert (result["modules"], result["filled"]) == (2, 1)
    for letter in "AB":
        own = tensors[f"base_model.model.{part}.lora_{letter}.weight"]
        other = tensors[f"base_model.model.{part.replace('1', '0', 1)}.lora_{letter}.weight"]
        assert own.shape == other.shape
        assert own.any()
        assert not other.any()
    found, plain = merged(tiny.build(name), tmp_path / "lora"), dict(base.named_parameters())
    assert not torch.equal(found[f"{part}.weight"], plain[f"{part}.weight"])


def test_ragged_and_filled_layers_exclude_each_other(tmp_path):
    base = tiny.build("gqa_llama")
    with pytest.raises(ValueError, match=r"ragged and fill_layers: .*give one of them"):
        to_lora(handmade(base, some_layers(base)), base, tmp_path / "lora", ragged=True, fill_layers=True)
    assert not list(tmp_path.iterdir())


# the way back

LAYOUTS = {"uniform": {}, "ragged": {"ragged": True}, "filled": {"fill_layers": True}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gqa_llama", "head_dim_qwen3", "transposed_gpt2", "fused_phi3", "tied_llama"])
def test_delta_to_lora_and_back_is_the_same_delta(tmp_path, name, dtype, layout):
    """In fp32 with values between half and twice the base's, whose difference is an fp32 number."""
    base, delta = tuned(name, BOTH, dtype)
    if dtype == FP32:
        factors = torch.Generator().manual_seed(0)
        for parameter, entries in delta.selection.items():
            original = entries.gather(base.get_parameter(parameter))
            delta.values[parameter] = original * torch.empty_like(original).uniform_(0.6, 1.9, generator=factors)
    before = {key: t.clone() for key, t in base.state_dict().items()}
    exported = to_lora(delta, base, tmp_path / "lora", **LAYOUTS[layout])
    result = to_delta(read_lora(tmp_path / "lora"), base, tmp_path / "back")
    back = Delta.load(tmp_path / "back")
    assert exported["rounded"] == 0
    assert not (tmp_path / "lora" / EXACT).exists()
    assert same_delta(back, delta)
    assert list(back.selection) == [n for n, _ in base.named_parameters() if n in delta.selection]
    assert back.method == delta.method
    assert result["entries"] == delta.selection.size
    assert result["source_bytes"] > result["compact_bytes"] == delta.nbytes
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())


def test_values_that_no_sum_gives_come_back_too(tmp_path):
    """Large steps in fp32, and factors in bfloat16: what base + change misses by a bit is noted beside the LoRA."""
    base, delta = tuned("gqa_llama", BOTH)
    small = handmade(tiny.build("gqa_llama", dtype=BF16), some_layers(base), change=1e-3)
    small_base = tiny.build("gqa_llama", dtype=BF16)
    for name, (one, model, dtype) in {"fp32": (delta, base, FP32), "bf16": (small, small_base, BF16)}.items():
        exported = to_lora(one, model, tmp_path / name, dtype=dtype)
        to_delta(read_lora(tmp_path / name), model, tmp_path / f"{name}-back")
        assert same_delta(Delta.load(tmp_path / f"{name}-back"), one)
        assert (tmp_path / name / EXACT).exists() == (exported["rounded"] > 0)
    assert to_lora(delta, base, tmp_path / "again")["rounded"] > 0
    (tmp_path / "again" / EXACT).unlink()  # lost on the way: a last bit
    to_delta(read_lora(tmp_path / "again"), base, tmp_path / "close")
    back = Delta.load(tmp_path / "close")
    assert not same_delta(back, delta)
    for name, values in delta.values.items():
        change = (values - delta.selection[name].gather(base.get_parameter(name))).abs()
        assert ((back.values[name] - values).abs() <= change * 2**-23).all()


@pytest.mark.parametrize("spoil", ["values", "index", "outside"])
def test_noted_values_that_do_not_fit_are_refused(tmp_path, spoil):
    base, delta = tuned("gqa_llama", BOTH)
    to_lora(delta, base, tmp_path / "lora")
    path = tmp_path / "lora" / EXACT
    tensors = safetensors.torch.load_file(path)
    key = next(key for key in tensors if key.endswith(".values" if spoil == "values" else ".index"))
    tensors[key] = tensors[key] + {"values": 1.0, "index": 1, "outside": 10**6}[spoil]
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"damaged, or of another adapter"):
        to_delta(read_lora(tmp_path / "lora"), base, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_partial_layers_come_back_without_the_filling(tmp_path):
    base = tiny.build("gqa_llama")
    delta = handmade(base, some_layers(base), change=None)
    to_lora(delta, base, tmp_path / "lora", fill_layers=True)
    to_delta(read_lora(tmp_path / "lora"), base, tmp_path / "back")
    assert same_delta(Delta.load(tmp_path / "back"), delta)


def test_slices_that_did_not_change_come_back_too(tmp_path):
    base = tiny.build("gqa_llama")
    for change in (0.0, 0.1):
        delta = handmade(base, some_layers(base), change=change)
        if change:
            delta.values["model.layers.1.mlp.down_proj.weight"][:, 1] -= change
        to_lora(delta, base, tmp_path / f"lora{change}")
        to_delta(read_lora(tmp_path / f"lora{change}"), base, tmp_path / f"back{change}")
        assert set(Delta.load(tmp_path / f"back{change}").selection) == set(delta.selection)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_foreign_one_hot_lora_with_a_scale_is_recognised(tmp_path, rslora):
    base = tiny.build("gqa_llama")
    model = get_peft_model(tiny.build("gqa_llama"), LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["o_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.zero_()
            parameter.data[[0, 2], [30, 4]] = 1  # two of four ranks, not in order
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "lora")
    to_delta(read_lora(tmp_path / "lora"), base, tmp_path / "back")
    delta = Delta.load(tmp_path / "back")
    entries = delta.selection["model.layers.0.self_attn.o_proj.weight"]
    assert isinstance(entries, Slices)
    assert (entries.dim, entries.index.tolist()) == (1, [4, 30])
    delta.apply_(base)
    expected = merged(tiny.build("gqa_llama"), tmp_path / "lora")
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)


def lora_folder(folder, spoil=None, **config):
    """A LoRA of the tiny model whose A is one-hot, but for what `spoil` does to a module's factors."""
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]} | config
    model = get_peft_model(tiny.build("gqa_llama"), LoraConfig(**settings))
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            a.zero_()
            a[torch.arange(len(a)), torch.arange(len(a)) + 3] = 1
            b.copy_(torch.randn_like(b))
            if spoil is not None:
                spoil(a, b)
    model.save_pretrained(folder)
    return folder


def _two_ones(a, b):
    a[0, 9] = 1


def _not_one(a, b):
    a[1, 4] = 0.5


def _same_place(a, b):
    a[1] = a[0]


NOT_ONE_HOT = {"two ones": _two_ones, "a half": _not_one, "the same place": _same_place}


@pytest.mark.parametrize("kind", NOT_ONE_HOT)
def test_a_lora_that_is_not_one_hot_is_refused(tmp_path, kind):
    folder = lora_folder(tmp_path / "lora", NOT_ONE_HOT[kind])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj: neither factor is one-hot"):
        to_delta(read_lora(folder), tiny.build("gqa_llama"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_lora_that_changes_nothing_is_refused(tmp_path):
    folder = lora_folder(tmp_path / "lora", lambda a, b: (a.zero_(), b.zero_()))
    with pytest.raises(ValueError, match="changes nothing"):
        to_delta(read_lora(folder), tiny.build("gqa_llama"), tmp_path / "back")


BEYOND = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("kind", BEYOND)
def test_more_than_two_factors_is_refused(tmp_path, kind):
    folder = rewrite(lora_folder(tmp_path / "lora"), **BEYOND[kind])
    with pytest.raises(ValueError, match=rf"cannot become a sparse adapter: it has {kind}="):
        read_lora(folder)


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    _, delta = tuned("gqa_llama", S2FT(o=0.5, down=None))
    delta.save(tmp_path / "delta")
    with pytest.raises(ValueError, match="not a LoRA folder"):
        read_lora(tmp_path / "delta")
    folder = lora_folder(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"has no such parameter|has no such linear"):
        to_delta(read_lora(folder), tiny.build("opt"), tmp_path / "back")
    with pytest.raises(ValueError, match=r"fits a weight of shape \[32, 32\], the base has \[32, 64\]: another base"):
        to_delta(read_lora(folder), tiny.build("head_dim_qwen3"), tmp_path / "back")
    weights = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({key: t for key, t in tensors.items() if "layers.1" not in key or "lora_A" in key}, weights)
    with pytest.raises(ValueError, match=r"layers\.1.*LoRA factors A \[r, in\] and B \[out, r\] expected, found"):
        read_lora(folder)
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match="missing, damaged or truncated"):
        read_lora(folder)


def test_a_change_that_the_bases_type_cannot_hold_is_refused(tmp_path):
    folder = lora_folder(tmp_path / "lora")
    with pytest.raises(InexactExport, match=r"does not fit torch\.bfloat16, try --dtype float32"):
        to_delta(read_lora(folder), tiny.build("gqa_llama", dtype=BF16), tmp_path / "back")
    assert not (tmp_path / "back").exists()


# approximate


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def place(base_folder, tmp_path_factory):
    """(base folder, adapter of scattered entries, file of texts)."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("place")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    chosen = SCATTERED.choose(model, None, Selection())
    handmade(model, chosen, change=None).save(folder / "adapter")
    (folder / "texts.txt").write_text("The capital of France is Paris.\n\nTwo and two are four, and four and four are eight.\n")
    return base_folder, folder / "adapter", folder / "texts.txt"


@pytest.fixture(scope="module")
def loaded(place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter, texts = place
    lines = [line for line in texts.read_text().splitlines() if line]
    return AutoModelForCausalLM.from_pretrained(base), Delta.load(adapter), lines, AutoTokenizer.from_pretrained(base)


def test_the_loss_is_measured_as_it_says(loaded, tmp_path):
    """Against a plain computation: both KL with torch's own function, the Frobenius norm from the file's factors."""
    base, delta, texts, tokenizer = loaded
    result = to_approximate_lora(delta, base, tmp_path / "lora", rank=12, texts=texts, tokenizer=tokenizer, max_loss=1.0)
    tuned_model = type(base).from_pretrained(base.config._name_or_path)
    delta.apply_(tuned_model)
    lora = PeftModel.from_pretrained(type(base).from_pretrained(base.config._name_or_path), str(tmp_path / "lora"))
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    logs = [[m(input_ids=i).logits[0].double().log_softmax(-1) for i in ids] for m in (lora, base, tuned_model)]
    kl = [
        sum(
            torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item() for q, p in zip(other, logs[2], strict=True)
        )
        for other in logs[:2]
    ]
    assert result["loss"] == pytest.approx(kl[0] / kl[1], rel=1e-3)
    assert result["kl_of_adapter"] == pytest.approx(kl[1] / sum(i.numel() for i in ids), rel=1e-3)
    tensors, lost, total = tensors_of(tmp_path / "lora"), 0.0, 0.0
    for name, entries in delta.selection.items():
        change = torch.zeros(entries.shape)
        entries.scatter_(change, delta.values[name] - entries.gather(base.get_parameter(name)))
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        lost += (change - tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]).square().sum().item()
        total += change.square().sum().item()
    assert result["frobenius"] == pytest.approx(math.sqrt(lost / total), rel=1e-4)
    report = json.loads((tmp_path / "lora" / REPORT).read_text())
    assert report["loss"] == result["loss"]
    assert set(report["modules"]) == {n.removesuffix(".weight") for n in delta.selection}


def test_more_rank_loses_less_and_full_rank_nothing(loaded, tmp_path):
    base, delta, texts, tokenizer = loaded
    options = {"texts": texts, "tokenizer": tokenizer, "max_loss": 10.0}
    results = [to_approximate_lora(delta, base, tmp_path / str(r), rank=r, **options) for r in (2, 8, 16)]
    losses = [result["loss"] for result in results]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.01
    narrow = Selection({name: entries for name, entries in delta.selection.items() if min(entries.shape) == 16})
    whole = to_approximate_lora(handmade(base, narrow, change=None), base, tmp_path / "whole", rank=16, **options)
    assert whole["loss"] < 1e-8
    assert whole["frobenius"] < 1e-6
    assert whole["same_token"] == 1.0


def test_too_great_a_loss_is_refused_with_its_figures(loaded, tmp_path):
    base, delta, texts, tokenizer = loaded
    before = {key: t.clone() for key, t in base.state_dict().items()}
    with pytest.raises(InexactExport, match=r"rank 2 loses .*% of what the adapter does.*1\.00% allowed.*--max-loss"):
        to_approximate_lora(delta, base, tmp_path / "lora", rank=2, texts=texts, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())


def test_an_adapter_without_effect_on_the_text_is_refused(loaded, tmp_path):
    base, delta, texts, tokenizer = loaded
    still = handmade(base, delta.selection, change=0.0)
    with pytest.raises(ValueError, match="the adapter changes nothing on it"):
        to_approximate_lora(still, base, tmp_path / "lora", rank=2, texts=texts, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "message"), [(Full(), "Embedding|tied weights|layernorm"), (BitFit(), "'bias' of Linear")])
def test_what_is_no_linear_weight_is_refused(tmp_path, method, message):
    base, delta = tuned("qkv_bias_qwen2", method)
    with pytest.raises(ValueError, match=message):
        to_approximate_lora(delta, base, tmp_path / "lora", rank=2, texts=["a"], tokenizer=None)


@pytest.mark.parametrize("rank", [0, 17])
def test_ranks_that_a_module_cannot_have_are_refused(loaded, tmp_path, rank):
    base, delta, texts, tokenizer = loaded
    with pytest.raises(ValueError, match=rf"rank={rank}: give 1 to 16, the most that .*[kv]_proj"):
        to_approximate_lora(delta, base, tmp_path / "lora", rank=rank, texts=texts, tokenizer=tokenizer)


def test_pefts_own_conversion_takes_our_adapters(tmp_path):
    """`save_as_lora` on a PeftModel of a Delta folder with targets; transposed layers too."""
    from intaglio.hf import DeltaConfig

    for name, targets in (("gqa_llama", ["o_proj", "up_proj"]), ("transposed_gpt2", ["c_fc"])):
        config = DeltaConfig(
            method={"name": "random", "budget": 0.02, "include": ["*weight"]}, target_modules=targets, init_weights=False
        )
        model = get_peft_model(tiny.build(name), config)
        save_as_lora(tmp_path / name, model, rank=32)
        rewrite(tmp_path / name, fan_in_fan_out=name == "transposed_gpt2")
        expected, found = model.merge_and_unload().state_dict(), merged(tiny.build(name), tmp_path / name)
        changed = 0
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)
            changed += not torch.equal(tensor, tiny.build(name).state_dict()[key])
        assert changed


# the command


def command(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_goes_there_and_back(base_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=BF16)
    delta = handmade(model, some_layers(model), change=None)
    delta.save(tmp_path / "adapter")
    for flag in ("--ragged", "--fill-layers"):
        out = tmp_path / flag
        done = command("export", tmp_path / "adapter", "--to", "lora", flag, "--output", out, "--base", base_folder)
        assert done.exit_code == 0, done.stderr
        assert "--max-lora-rank 8" in done.stdout
        back = tmp_path / f"back{flag}"
        done = command("export", out, "--to", "delta", "--output", back, "--base", base_folder)
        assert done.exit_code == 0, done.stderr
        assert same_delta(Delta.load(back), delta)  # in bfloat16, as the marker of the LoRA says
        assert "values in 2 parameters" in done.stdout
    again = command("export", back, "--to", "lora", "--output", tmp_path / "again", "--base", base_folder)
    assert again.exit_code == 0, again.stderr


def test_the_command_reports_the_loss(place, tmp_path):
    base, adapter, texts = place
    options = ["--to", "approximate-lora", "--text", texts, "--base", base, "--output", tmp_path / "lora"]
    done = command("export", adapter, *options, "--rank", 4)
    assert done.exit_code == 2
    assert "--max-loss" in done.stderr
    assert not (tmp_path / "lora").exists()
    done = command("export", adapter, *options, "--rank", 4, "--max-loss", 5, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["texts"] == 2
    assert json.loads((tmp_path / "lora" / MARKER).read_text())["loss"] == result["loss"]
    done = command("export", adapter, *options, "--rank", 16, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert "NOT EXACT" in done.stdout
    assert "nats per token" in done.stdout


MISTAKES = {
    "ragged and filled": (["--to", "lora", "--ragged", "--fill-layers"], "give one of them"),
    "ragged merged": (["--to", "merged", "--ragged"], "ragged='True': has no effect with --to merged; only with lora"),
    "rank of lora": (["--to", "lora", "--rank", "8"], "rank='8': has no effect with --to lora; only with approximate-lora"),
    "no rank": (["--to", "approximate-lora", "--text", "texts.txt"], "give --rank, and --text"),
    "no text": (["--to", "approximate-lora", "--rank", "4"], "give --rank, and --text"),
    "no such text": (["--to", "approximate-lora", "--rank", "4", "--text", "nowhere"], "cannot be read as UTF-8 text"),
    "no loss": (["--to", "approximate-lora", "--rank", "4", "--text", "x", "--max-loss", "0"], "give a share above 0"),
    "not a LoRA": (["--to", "delta"], "not a LoRA folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_before_the_base_is_loaded(place, tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    base = tiny.build("gqa_llama")
    adapter = place[1]
    if "--to" in arguments and arguments[1] == "lora" and "--ragged" in arguments:
        adapter = handmade(base, some_layers(base)).save(tmp_path / "adapter")
    done = command("export", adapter, *arguments, "--output", tmp_path / "never", "--base", "nobody/nothing")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "never").exists()


def test_empty_text_is_refused(place, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        export(place[1], "approximate-lora", tmp_path / "x", rank=4, text=tmp_path / "empty.txt", base=place[0])
