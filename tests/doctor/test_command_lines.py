"""Command lines that serve adapters rightly, and those of servers that run already; what to export first."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.doctor.engines import ENGINES
from intaglio.doctor.examine import slot_bytes
from intaglio.export.lora import RANKS
from intaglio.hf.models import Outline, outline
from support import tiny
from support.doctor import SERVER, foreign, one, refused


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


def test_printed_commands_survive_a_shell(base, shelf, tmp_path):
    odd = tmp_path / "a b;c"
    (shelf / "delta").rename(odd)
    try:
        first = one("vllm", f"x={odd}", f"y={odd}")["first"]
    finally:
        odd.rename(shelf / "delta")
    assert len(first) == 1
    assert shlex.split(first[0])[2] == str(odd)


def test_the_bases_type_is_in_the_command(shelf):
    """Engines cast a float32 base to 16 bits by themselves."""
    for name in ("delta", "plain"):
        assert "--dtype float32" in one("vllm", shelf / name)["command"]


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


def test_a_base_that_is_given_is_the_one_that_the_export_checks(base, shelf, tmp_path):
    other = tiny.save_folder(tmp_path / "other")
    assert shlex.split(one("vllm", shelf / "delta", base=str(other))["first"][0])[-2:] == ["--base", str(other)]


def test_a_finished_run_is_an_adapter(shelf, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"config": {}}')
    (run / "adapter").symlink_to(Path(shelf / "delta"))
    result = one("vllm", run)
    assert "--lora-modules run=" in result["command"]


def parse(command, engine):
    return ENGINES[engine].dialect.read(command)


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


def test_flags_with_underscores_are_read(shelf):
    """vLLM takes either."""
    running = parse("vllm serve base --enable_lora --lora_target_modules o_proj --max_lora_rank 8", "vllm")
    assert (running.enabled, running.max_rank, running.targets) == (True, 8, {"o_proj"})


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
