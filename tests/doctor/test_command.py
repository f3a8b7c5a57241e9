"""`intaglio doctor`, the command: mistakes, exit codes, what it prints."""

import json

import pytest
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.doctor.examine import examine
from support.doctor import one

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
