"""GGUF LoRA: read back by gguf's own reader, in the order that transformers' GGUF code knows, equal to the change."""

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from typer.testing import CliRunner

from intaglio import S2FT, Random
from intaglio.cli import app
from intaglio.core.entries import Slices
from intaglio.core.selection import Selection
from intaglio.export import gguf as gguf_lora
from intaglio.export.gguf import FILE, read_gguf, to_gguf
from intaglio.export.proof import InexactExport
from support import tiny
from support.exports import BF16, FP32, handmade, tuned

ALL = S2FT(q=0.5, k=0.5, v=0.5, o=0.5, up=0.25, gate=0.25, down=0.25)
KINDS = {"gqa_llama": "llama", "mistral": "llama", "qkv_bias_qwen2": "qwen2", "head_dim_qwen3": "qwen3"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def dense(delta, base, name):
    """The change of a whole weight."""
    entries, change = delta.selection[name], torch.zeros(delta.selection[name].shape)
    original = entries.gather(base.get_parameter(name))
    entries.scatter_(change, delta.values[name].float() - original.float())
    return change


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_the_file_holds_the_change(tmp_path, name, dtype):
    """Names by hand, rows in the order that transformers undoes when it loads a GGUF model, one scale of 1."""
    base, delta = tuned(name, ALL, dtype)
    result = to_gguf(delta, base, tmp_path / "gguf")
    assert result["architecture"] == KINDS[name]
    assert result["bytes"] > result["compact_bytes"]
    assert result["tokens"] > 50
    reader = gguf.GGUFReader(tmp_path / "gguf" / FILE)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 0.0
    assert fields["general.architecture"] == KINDS[name]
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    undo = LlamaTensorProcessor()._reverse_permute_weights
    for layer in range(2):
        for ours, theirs in NAMES.items():
            parameter = f"model.layers.{layer}.{ours}.weight"
            a = tensors.pop(f"blk.{layer}.{theirs}.weight.lora_a")
            b = tensors.pop(f"blk.{layer}.{theirs}.weight.lora_b")
            assert a.dtype == b.dtype == torch.float32
            assert len(a) == b.shape[1] == delta.selection[parameter].index.numel()
            product = (b @ a).numpy()
            if KINDS[name] == "llama" and theirs in ("attn_q", "attn_k"):
                product = undo(product, 4, 2 if theirs == "attn_k" else 4)
            torch.testing.assert_close(torch.from_numpy(product), dense(delta, base, parameter), rtol=1e-6, atol=1e-7)
    assert not tensors


def test_the_rotary_order_matters(tmp_path, monkeypatch):
    """The order is not its own inverse, and a file in the base's order is noticed by the check."""
    base, delta = tuned("gqa_llama", S2FT(q=0.5, o=None, down=None))
    order = gguf_lora._order(gguf_lora.ARCHITECTURES["llama"], "model.layers.0.self_attn.q_proj", base.config, 32)
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert not torch.equal(order[order], torch.arange(32))
    calls = []

    def forgetful(architecture, path, config, rows):
        calls.append(path)
        return order if len(calls) > 2 else torch.arange(rows)  # two layers are written, then read

    monkeypatch.setattr(gguf_lora, "_order", forgetful)
    with pytest.raises(InexactExport, match=r"q_proj\.weight differs by"):
        to_gguf(delta, base, tmp_path / "gguf")
    assert not list(tmp_path.iterdir())


def test_each_module_has_its_own_rank_and_no_ceiling(tmp_path):
    """Ragged ranks, with alpha 0 as the one scale; and more than vLLM takes."""
    base = tiny.build("gqa_llama")
    down, up = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
    places = {down: Slices((32, 48), 1, torch.arange(3)), up: Slices((48, 32), 0, torch.arange(40))}
    delta = handmade(base, Selection(places), change=None)
    result = to_gguf(delta, base, tmp_path / "gguf")
    fields, pairs = read_gguf(tmp_path / "gguf" / FILE)
    assert {name: len(a) for name, (a, _) in pairs.items()} == {"blk.0.ffn_down.weight": 3, "blk.1.ffn_up.weight": 40}
    assert result["rank"] == 40
    assert fields["adapter.lora.alpha"] == 0


def test_half_precision_is_kept_or_refused(tmp_path):
    base = tiny.build("gqa_llama", dtype=BF16)
    name = "model.layers.0.mlp.down_proj.weight"
    entries = Slices((32, 48), 1, torch.tensor([3, 40]))
    doubled = handmade(base, Selection({name: entries}), change=0.0)
    doubled.values[name] = doubled.values[name] * 2  # the change is the base's value: bfloat16 holds it
    to_gguf(doubled, base, tmp_path / "gguf", dtype=BF16)
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "gguf" / FILE).tensors}
    assert kinds == {"BF16"}
    _, pairs = read_gguf(tmp_path / "gguf" / FILE)
    a, b = pairs["blk.0.ffn_down.weight"]
    assert torch.equal(b @ a, dense(doubled, base, name))
    base, delta = tuned("gqa_llama", S2FT(o=0.5, down=0.25), lr=0.3)
    for dtype in (BF16, torch.float16):
        with pytest.raises(InexactExport, match="factors in float32 do not round"):
            to_gguf(delta, base, tmp_path / "other", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["gguf"]


@pytest.mark.parametrize("name", ["gemma", "transposed_gpt2", "fused_phi3", "opt"])
def test_other_architectures_are_refused_by_name(tmp_path, name):
    base, delta = tuned(name, S2FT(o=0.5, down=0.25))
    with pytest.raises(
        ValueError, match=rf"type '{base.config.model_type}'.*Known are llama, mistral, qwen2, qwen3.*--to merged"
    ):
        to_gguf(delta, base, tmp_path / "gguf")
    assert not list(tmp_path.iterdir())


def test_what_no_lora_holds_is_refused(tmp_path):
    base, delta = tuned("gqa_llama", Random(budget=0.05, include=("*proj.weight",)))
    with pytest.raises(ValueError, match=r"holds elements.*--to approximate-lora"):
        to_gguf(delta, base, tmp_path / "gguf")
    other = tiny.build("gqa_llama", seed=3)
    base, delta = tuned("gqa_llama", S2FT(o=0.5, down=0.25))
    before = {key: t.clone() for key, t in other.state_dict().items()}
    with pytest.raises(ValueError, match="fingerprint"):
        to_gguf(delta, other, tmp_path / "gguf")
    assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_gguf_lora_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="not a GGUF file, or damaged"):
        read_gguf(tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_tensor("output.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="no LoRA adapter"):
        read_gguf(tmp_path / "model.gguf")


def test_the_command_writes_it(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny.save_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.0.self_attn.k_proj.weight"
    shape = tuple(model.get_parameter(name).shape)
    handmade(model, Selection({name: Slices(shape, 0, torch.tensor([1, 9]))})).save(tmp_path / "adapter")
    arguments = ["export", tmp_path / "adapter", "--to", "gguf", "--output", tmp_path / "out", "--base", folder]
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.stderr
    assert "GGUF LoRA for llama" in done.stdout
    assert "greedy tokens the same" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "adapter.gguf", "intaglio_export.json"]
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
