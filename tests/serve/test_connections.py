"""Connections that send nothing harm nobody; only known names reach a server of this machine; templates follow adapters."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from intaglio.runs.load import template_of
from intaglio.runs.train import train
from support import tiny

OTHER = "{% for m in messages %}[{{ m['role'] }}] ### {{ m['content'] }} ### {% endfor %}[assistant] ### "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and a run that was trained with a chat template of its own."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny.save_folder(folder / "model")
    (folder / "other.jinja").write_text(OTHER)
    rows = [{"prompt": f"{i}", "completion": "a"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "max_steps": 1,
        "use_cpu": True,
        "output_dir": str(folder / "run"),
        "chat_template_path": str(folder / "other.jinja"),
    }
    data = {"train": str(folder / "rows.jsonl"), "chat": True}
    train({"model": {"name": str(model)}, "method": {"name": "s2ft", "o": 0.25, "down": 0.25}, "data": data, "train": settings})
    return folder


@pytest.fixture(scope="module")
def server(place):
    """`intaglio serve` with short patience and few connections: its port."""
    command = [sys.executable, "-m", "intaglio", "serve", str(place / "model"), "--name", "tiny", "--port", "0"]
    command += ["--adapter", f"own={place / 'run'}", "--max-connections", "20", "--header-timeout", "2"]
    command += ["--allowed-host", "known.example"]
    log = place / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(600):
            found = re.search(r"127\.0\.0\.1:(\d+)", log.read_text())
            if found and "startup complete" in log.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ask(port, method="GET", path="/health", body=None, **headers):
    caller = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        caller.request(method, path, None if body is None else json.dumps(body), headers | {"Content-Type": "application/json"})
        answer = caller.getresponse()
        return answer.status, answer.read()
    finally:
        caller.close()


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: lo"])
def test_idle_and_slow_connections_are_closed(server, sent):
    with socket.create_connection(("127.0.0.1", server), timeout=20) as idle:
        idle.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert idle.recv(1) == b""


def test_connections_beyond_the_bound_are_closed_and_others_answered(server):
    held = []
    try:
        for _ in range(40):
            held.append(socket.create_connection(("127.0.0.1", server), timeout=20))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                assert ask(server)[0] == 200
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("never answered")
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:80", 200), ("[::1]", 200), ("known.example", 200), ("evil.example", 400), ("", 400)],
)
def test_only_known_names_reach_a_server_of_this_machine(server, host, status):
    assert ask(server, Host=host)[0] == status


def test_each_adapter_is_asked_with_its_own_template(server, place):
    import transformers as tf

    turns = [{"role": "user", "content": "What is 2 + 2?"}]
    tokenizer = tf.AutoTokenizer.from_pretrained(place / "model")
    for model, template in (("own", OTHER), ("tiny", None)):
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        body = {"model": model, "messages": turns, "max_tokens": 1, "temperature": 0}
        status, answer = ask(server, "POST", "/v1/chat/completions", body)
        assert status == 200
        assert json.loads(answer)["usage"]["prompt_tokens"] == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_what_is_not_offered_counts_under_its_model(server):
    body = {"model": "own", "messages": [{"role": "user", "content": "x"}], "n": 2}
    status, answer = ask(server, "POST", "/v1/chat/completions", body)
    assert (status, json.loads(answer)["error"]["param"]) == (400, "n")
    assert b'intaglio_requests_total{model="own",status="400"}' in ask(server, path="/metrics")[1]


def test_a_template_travels_with_the_adapter(place, tmp_path):
    assert template_of(place / "run") == OTHER
    assert (place / "run/adapter/chat_template.jinja").read_text() == OTHER
    (place / "run/adapter/chat_template.jinja").rename(tmp_path / "kept")
    (place / "other.jinja").rename(tmp_path / "other.jinja")
    try:
        with pytest.raises(ValueError, match=r"was trained with the chat template .*other\.jinja, which is not there"):
            template_of(place / "run")
    finally:
        (tmp_path / "kept").rename(place / "run/adapter/chat_template.jinja")
        (tmp_path / "other.jinja").rename(place / "other.jinja")
