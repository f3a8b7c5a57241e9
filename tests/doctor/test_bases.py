"""Adapters and their base: damaged, of another base, or of one that is not at hand."""

import json
import shutil

import pytest

from intaglio.doctor.examine import examine
from support import tiny
from support.doctor import foreign, one, refused
from support.exports import rewrite


def test_damaged_configs_are_one_clear_line(shelf, tmp_path):
    changes = {"r": 0}, {"r": True}, {"base_model_name_or_path": ["x"]}, {"rank_pattern": {"(": 4}}, {"modules_to_save": 5}
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(shelf / "plain", folder)
        rewrite(folder, **change)
        with pytest.raises(ValueError, match="damaged"):
            examine([str(folder)], "vllm")


def test_the_note_of_an_export_is_checked(shelf, tmp_path):
    shutil.copytree(shelf / "plain", tmp_path / "lora")
    note = tmp_path / "lora/intaglio_export.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"base_dtype": {"a": 1}}))
    with pytest.raises(ValueError, match=r"intaglio_export\.json: damaged, base_dtype="):
        examine([str(tmp_path / "lora")])


def test_damaged_adapters_are_refused(shelf, tmp_path):
    folder = foreign(tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="missing or damaged"):
        examine([str(folder)])


def test_ragged_tensors_that_the_config_does_not_tell_are_refused(tmp_path):
    folder = foreign(tmp_path / "lora", rank_pattern={"o_proj": 4}, alpha_pattern={"o_proj": 4})
    assert not one("vllm", folder)["refused"]
    assert "has rank 4, its config says 8" in refused("vllm", rewrite(folder, rank_pattern={}))


def test_an_adapter_called_like_the_base_is_refused(shelf, tmp_path):
    folder = rewrite(foreign(tmp_path / "lora"), base_model_name_or_path="llama")
    assert "called like the base" in refused("vllm", f"llama={folder}")


def test_adapters_of_two_bases_are_refused(shelf, tmp_path):
    other = rewrite(foreign(tmp_path / "lora"), base_model_name_or_path="some/other")
    assert "for different bases" in refused("vllm", shelf / "plain", other)


def test_another_base_is_refused(shelf, tmp_path):
    tiny.build("head_dim_qwen3").save_pretrained(tmp_path / "wide")
    reason = refused("vllm", shelf / "plain", base=str(tmp_path / "wide"))
    assert "o_proj maps 32 values to 32" in reason
    assert "maps 64 to 32: another base" in reason
    assert "another base" in refused("vllm", shelf / "delta", base=str(tmp_path / "wide"))
    tiny.build("transposed_gpt2").save_pretrained(tmp_path / "gpt2")
    assert "has no such layer" in refused("sglang", shelf / "plain", base=str(tmp_path / "gpt2"))


def test_a_base_that_is_not_at_hand_leaves_a_note(shelf, tmp_path):
    folder = rewrite(foreign(tmp_path / "lora"), base_model_name_or_path="nobody/nothing")
    result = one("vllm", folder)
    assert "vllm serve nobody/nothing" in result["command"]
    assert "bytes" not in result
    assert any("not checked" in caution for caution in result["cautions"])
    assert any("name no base" in caution for caution in one("vllm", foreign(tmp_path / "nameless"))["cautions"])


def test_partial_layers_cannot_be_told_without_the_base(shelf):
    assert "give --base" in refused("lorax", shelf / "nameless")
    assert not one("lorax", shelf / "plain")["refused"]
