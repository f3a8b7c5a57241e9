"""`intaglio serve` as a process: it starts, serves, drains on SIGTERM; mistakes end before weights are read; vLLM's command."""

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import torch
from typer.testing import CliRunner

from intaglio.adapter.folder import read_config
from intaglio.cli import app
from intaglio.export.lora import to_lora
from support import serving
from support.serving import Twin, make_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    twin = Twin(serving.folder(folder / "base"))
    adapters = [make_adapter(twin.model, folder / f"adapters/a{seed}", seed) for seed in range(3)]
    from intaglio import Delta

    to_lora(Delta.load(adapters[2]), twin.model, folder / "lora")
    (folder / "run").mkdir()
    (folder / "run/run.json").write_text(json.dumps({"config": {}}))
    (folder / "run/adapter").symlink_to(adapters[1])
    return folder, twin


class Process:
    """The command, running, once it has said where."""

    def __init__(self, *arguments, cwd, **environment):
        command = [sys.executable, "-m", "intaglio", "serve", *map(str, arguments), "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if "Uvicorn running" in line or "startup complete" in line:
                break
        said = next(line for line in self.lines if " at http://" in line)
        self.url = said.split(" at ")[1].split()[0]
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        self.process.stdout.close()
        self.process.stderr.close()

    def end(self):
        code = self.process.wait(timeout=30)
        self.reader.join()
        return code


def test_it_serves_and_drains(place):
    """On SIGTERM: what runs is finished, what comes is refused with 503, /health says so, and the process ends with 0."""
    folder, twin = place
    adapters = ["--adapter", "one=adapters/a0", "--adapter", "two=run", "--adapter", "three=lora"]
    with Process("base", *adapters, "--adapter-root", "adapters", cwd=folder, INTAGLIO_API_KEY="k1 k2") as server:
        http = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer k2"})
        assert httpx.get(server.url + "/v1/models").status_code == 401
        names = [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert names == ["base", "one", "three", "two"]
        for name, path in (("base", None), ("one", "adapters/a0"), ("two", "adapters/a1"), ("three", "adapters/a2")):
            body = {"model": name, "prompt": "Once", "max_tokens": 12, "temperature": 0}
            answer = http.post("/v1/completions", json=body).json()["choices"][0]
            assert answer["text"] == twin.complete("Once", 12, path and folder / path)
        load = {"lora_name": "four", "lora_path": "a2"}
        assert http.post("/v1/load_lora_adapter", json=load).status_code == 200

        body = {"model": "two", "prompt": "Go on", "max_tokens": 240, "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            text = json.loads(next(lines)[6:])["choices"][0]["text"]
            server.process.send_signal(signal.SIGTERM)
            serving.wait_until(lambda: http.get("/health").status_code == 503)
            refused = http.post("/v1/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert "retry-after" in refused.headers
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert text + "".join(chunk["choices"][0]["text"] for chunk in rest) == twin.complete(
            "Go on", 240, folder / "adapters/a1"
        )
        http.close()
        assert server.end() == 0
    log = "".join(server.lines)
    assert "Traceback" not in log
    assert "k1" not in log
    assert "warning" not in log


def serve(*arguments, **environment):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200", **environment})


MISTAKES = {
    "no base": (["nobody/nothing"], "'nobody/nothing'"),
    "no path": (["base", "--adapter", "a"], "give NAME=FOLDER"),
    "no folder": (["base", "--adapter", "a=nowhere"], "there is no folder 'nowhere'"),
    "bad name": (["base", "--adapter", "../a=adapters/a0"], "adapter name '../a'"),
    "twice": (["base", "--adapter", "a=adapters/a0", "--adapter", "a=adapters/a1"], "given twice"),
    "the base's name": (["base", "--adapter", "base=adapters/a0"], "is the base's name"),
    "not an adapter": (["base", "--adapter", "a=base"], "not an adapter folder"),
    "no root": (["base", "--adapter-root", "nowhere"], "--adapter-root 'nowhere'"),
    "empty key": (["base", "--api-key", " "], "empty key"),
    "no memory": (["base", "--adapter-memory", "0"], "--adapter-memory"),
    "engine": (["base", "--engine", "tgi"], "give one of intaglio, vllm"),
    "no effect": (["base", "--dry-run"], "--dry-run without effect"),
    "no effect on vLLM": (["base", "--engine", "vllm", "--max-queue", "1", "--dtype", "float16"], "--dtype, --max-queue without"),
    "vLLM without adapters": (["base", "--engine", "vllm"], "at least one --adapter"),
    "vLLM is not there": (["base", "--engine", "vllm", "--adapter", "a=adapters/a0"], "vLLM is not installed"),
    "two keys": (["base", "--engine", "vllm", "--adapter", "a=lora", "--api-key", "a", "--api-key", "b"], "one key, 2 given"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_clear_line(place, monkeypatch, mistake):
    monkeypatch.chdir(place[0])
    arguments, message = MISTAKES[mistake]
    done = serve(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_an_empty_key_in_the_environment_opens_nothing(place, monkeypatch):
    monkeypatch.chdir(place[0])
    done = serve("base", INTAGLIO_API_KEY="")
    assert done.exit_code == 2
    assert "INTAGLIO_API_KEY is set but empty" in done.stderr


def test_a_port_that_is_taken(place, monkeypatch):
    monkeypatch.chdir(place[0])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve("base", "--port", taken.getsockname()[1])
    assert done.exit_code == 2
    assert "cannot listen there" in done.stderr


def test_vllms_command(place, monkeypatch):
    """A dry run exports nothing and needs no vLLM: the rank, modules and slots are read from the adapters."""
    monkeypatch.chdir(place[0])
    options = ["--engine", "vllm", "--dry-run", "--adapter", "x=run", "--adapter", "y=lora", "--max-context", "128"]
    done = serve("base", *options, INTAGLIO_API_KEY="hidden")
    assert done.exit_code == 0, done.stderr
    command = done.stdout.split()
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    text = " ".join(command)
    for part in (
        "--model base --served-model-name base",
        "--max-model-len 128",
        "--enable-lora --max-loras 2 --max-lora-rank 8",
        "--lora-target-modules down_proj o_proj --lora-modules x=exports/vllm/x y=lora",
        "--dtype float32",
    ):
        assert part in text
    assert "hidden" not in text
    assert not (place[0] / "exports").exists()


def test_vllm_keeps_more_adapters_than_it_has_slots(place, monkeypatch):
    """Eight in a batch; the ninth waits in vLLM's own memory instead of being refused."""
    monkeypatch.chdir(place[0])
    given = [word for i in range(9) for word in ("--adapter", f"a{i}=lora")]
    done = serve("base", "--engine", "vllm", "--dry-run", *given)
    assert done.exit_code == 0, done.stderr
    assert "--max-loras 8 --max-cpu-loras 9" in done.stdout


def test_vllm_runs_what_was_exported(place, monkeypatch, tmp_path):
    """Up to the moment where this process becomes vLLM's."""
    from intaglio.serve import vllm_command

    seen = {}

    def become(program, command, environment):
        seen.update(command=command, key=environment.get("VLLM_API_KEY"))
        raise SystemExit(0)

    monkeypatch.chdir(place[0])
    monkeypatch.setattr(vllm_command.os, "execvpe", become)
    monkeypatch.setattr(vllm_command.importlib.util, "find_spec", lambda name: name)
    for _ in range(2):  # a second start replaces the exports of the first
        out = tmp_path / "out"
        serve("base", "--engine", "vllm", "--adapter", "x=run", "--adapter", "y=lora", "--export-dir", out, "--api-key", "k")
        assert seen.pop("key") == "k"
        assert f"x={out}/x" in seen["command"]
    assert set(read_config(out / "x")["target_modules"]) == {"down_proj", "o_proj"}
    assert (out / "x/intaglio_export.json").is_file()
    assert sorted(path.name for path in out.iterdir()) == ["x"]


def test_vllm_on_a_cpu_is_started_with_our_plugin(place, monkeypatch, tmp_path):
    """Doctor says that it needs it there; the variable is in the printed command, and in the environment of the server."""
    from intaglio.serve import vllm_command

    monkeypatch.chdir(place[0])
    versions, points = importlib.metadata.version, importlib.metadata.entry_points
    point = importlib.metadata.EntryPoint("intaglio", "intaglio.vllm_plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0+cpu" if name == "vllm" else versions(name))
    ours = {"group": "vllm.general_plugins"}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **given: (point,) if given == ours else points(**given))
    monkeypatch.delenv("INTAGLIO_VLLM", raising=False)
    options = ["base", "--engine", "vllm", "--adapter", "y=lora"]
    assert serve(*options, "--dry-run").stdout.startswith(f"INTAGLIO_VLLM=1 {sys.executable} -m vllm.")

    seen = []
    monkeypatch.setattr(vllm_command.os, "execvpe", lambda program, command, environment: seen.append(environment))
    monkeypatch.setattr(vllm_command.importlib.util, "find_spec", lambda name: name)
    serve(*options)
    assert seen[0]["INTAGLIO_VLLM"] == "1"
    monkeypatch.setenv("INTAGLIO_VLLM", "0")
    done = serve(*options)
    assert done.exit_code == 2
    assert "INTAGLIO_VLLM=1" in done.stderr


def test_adapters_that_need_different_bases(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place[0])
    half = serving.tiny.build("gqa_llama", dtype=torch.bfloat16)
    make_adapter(half, tmp_path / "half", 0)
    done = serve("base", "--engine", "vllm", "--dry-run", "--adapter", "a=run", "--adapter", f"b={tmp_path / 'half'}")
    assert done.exit_code == 2
    assert "different types (bfloat16, float32)" in done.stderr
