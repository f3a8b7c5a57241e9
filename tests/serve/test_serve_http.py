"""The server over loopback, as its callers use it: OpenAI's own client, plain HTTP, several at once, and everything wrong."""

import asyncio
import json
import threading
import time

import httpx
import openai
import pytest
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from intaglio.runtime.store import AdapterStore
from intaglio.serve.limits import Limits
from support import serving
from support.serving import Twin, make_adapter, running, wait_until

HELLO = [{"role": "user", "content": "Hello there"}]
KEY = "the-key"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return serving.folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def twin(base):
    return Twin(base)


@pytest.fixture(scope="module")
def root(tmp_path_factory, twin):
    """Six adapters, and folders that are none."""
    place = tmp_path_factory.mktemp("adapters")
    for seed in range(6):
        make_adapter(twin.model, place / f"a{seed}", seed)
    weights = (place / "a0/adapter_model.safetensors").read_bytes()
    for name in ("damaged", "truncated"):
        (place / name).mkdir()
        (place / name / "adapter_config.json").write_bytes((place / "a0/adapter_config.json").read_bytes())
    (place / "damaged/adapter_model.safetensors").write_bytes(weights[:-1] + b"\xff")
    (place / "truncated/adapter_model.safetensors").write_bytes(weights[:100])
    (place / "empty").mkdir()
    from support import tiny

    other = tiny.build("gqa_llama", seed=5)
    make_adapter(other, place / "foreign", 0)
    return place


@pytest.fixture(scope="module")
def server(base, root):
    with running(base, root, keys=[KEY]) as found:
        for name in ("a0", "a1"):
            found.service.store.load(name, root / name)
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as found:
        yield found


def wrong(response, status, message="", **fields):
    """Check the shape of an error."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    for name, value in fields.items():
        assert error[name] == value
    return error


# OpenAI's client


def test_chat(client, twin, root):
    for model, adapter in (("tiny", None), ("a0", root / "a0"), ("a1", root / "a1")):
        answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12, temperature=0)
        assert isinstance(answer, ChatCompletion)
        assert answer.choices[0].message.content == twin.chat("Hello there", 12, adapter)
        assert answer.model == model
        assert answer.choices[0].finish_reason in ("stop", "length")
        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens == len(twin.tokenizer.encode("<s>user: Hello there</s><s>assistant: "))
    answers = {twin.chat("Hello there", 12, adapter) for adapter in (None, root / "a0", root / "a1")}
    assert len(answers) == 3  # or nothing would be proved


def test_chat_streamed(client, twin, root):
    stream = client.chat.completions.create(
        model="a0", messages=HELLO, max_completion_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert all(isinstance(chunk, ChatCompletionChunk) and chunk.id == chunks[0].id for chunk in chunks)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == twin.chat("Hello there", 12, root / "a0")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][:-1] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert isinstance(chunks[-1].usage, CompletionUsage)
    assert chunks[-1].usage.completion_tokens == 12
    without = list(client.chat.completions.create(model="a0", messages=HELLO, max_tokens=3, temperature=0, stream=True))
    assert without[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in without)


def test_completions(client, twin, root):
    text = twin.complete("Once upon", 10, root / "a1")
    for prompt in ("Once upon", ["Once upon"], twin.tokenizer.encode("Once upon")):
        answer = client.completions.create(model="a1", prompt=prompt, max_tokens=10, temperature=0)
        assert isinstance(answer, Completion)
        assert answer.choices[0].text == text
    stream = client.completions.create(model="a1", prompt="Once upon", max_tokens=10, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text
    assert client.completions.create(model="a1", prompt="Once upon", temperature=0).usage.completion_tokens == 16


def test_stop_strings_end_the_answer(client, twin, root):
    text = twin.complete("Once upon", 30, root / "a1")
    stop = text[6:8]
    cut = text[: text.index(stop)]
    answer = client.completions.create(model="a1", prompt="Once upon", max_tokens=30, temperature=0, stop=[stop, "never"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    assert answer.usage.completion_tokens < 30
    stream = client.completions.create(model="a1", prompt="Once upon", max_tokens=30, temperature=0, stop=stop, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_sampling_is_each_requests_own(client):
    def draw(seed, **more):
        request = {"model": "tiny", "prompt": "x", "max_tokens": 20, "temperature": 1.5, "seed": seed} | more
        return client.completions.create(**request).choices[0].text

    assert draw(1) == draw(1) != draw(2)
    greedy = draw(None, temperature=0)
    assert draw(3, extra_body={"top_k": 1}) == greedy
    assert draw(3, top_p=1e-6) == greedy


def test_models(client, server):
    models = client.models.list().data
    assert [(m.id, m.parent) for m in models] == [("tiny", None), ("a0", "tiny"), ("a1", "tiny")]
    assert all(isinstance(m, Model) and m.object == "model" and 0 <= time.time() - m.created < 600 for m in models)
    assert client.models.retrieve("a1").id == "a1"
    assert str(server.root) not in client.models.list().to_json()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("nobody/nothing")


def test_many_callers_at_once_get_their_own(server, twin, root):
    """Twelve callers, four models in one batch, streamed and not: each the answer of its own merged weights."""
    for name in ("a2", "a3"):
        server.service.store.load(name, root / name)
    found = {}

    def call(i):
        name, text = f"a{i % 4}", f"Say {i}"
        with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
            request = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0}
            if i % 3:
                found[i] = client.chat.completions.create(**request).choices[0].message.content
            else:
                chunks = client.chat.completions.create(**request, stream=True)
                found[i] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: twin.chat(f"Say {i}", 16, root / f"a{i % 4}") for i in range(12)}
    for name in ("a2", "a3"):
        server.service.store.unload(name)


# what is refused


def test_keys(server, http):
    for path in ("/v1/models", "/v1/nothing"):
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": KEY}):
            response = httpx.get(server.url + path, headers=headers)
            wrong(response, 401, "valid key", type="authentication_error", code="invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    big = httpx.post(server.url + "/v1/completions", content=b"x" * 3_000_000)
    wrong(big, 401)
    for path in ("/health", "/metrics", "/"):
        assert httpx.get(server.url + path).status_code == 200
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=server.url + "/v1", api_key="x") as stranger:
        stranger.models.list()


def test_fastapis_own_errors_have_the_shape(http):
    wrong(http.get("/nothing"), 404)
    wrong(http.get("/v1/nothing"), 404)
    assert http.get("/v1/completions").headers["allow"] == "POST"
    wrong(http.get("/v1/completions"), 405)
    wrong(http.get("/docs"), 404)
    wrong(http.get("/openapi.json"), 404)


CHAT = {"model": "tiny", "messages": HELLO}
BODIES = {
    "no JSON": (b"{", "not valid JSON"),
    "nothing": (b"", "JSON object"),
    "a list": (b"[]", "JSON object"),
    "a number": (b"7", "JSON object"),
    "no UTF-8": (b'{"model": "\xff"}', "error parsing"),
    "deep": (b"[" * 100_000, "error parsing"),
    "a huge number": (b'{"model": "tiny", "messages": [], "seed": 1' + b"0" * 5000 + b"}", "error parsing"),
    "no messages": (b'{"model": "tiny"}', "messages: Field required"),
    "half a pair": (json.dumps({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}).encode(), "messages.0.content"),
    "half a pair as field": (json.dumps({**CHAT, "\ud800": 1}).encode(), "unicode"),
    "not a number": (json.dumps({**CHAT, "temperature": float("nan")}).encode(), "temperature"),
    "two answers": (json.dumps({**CHAT, "n": 2}).encode(), "n: not offered"),
    "no name": (json.dumps({**CHAT, "model": ""}).encode(), "model"),
}


@pytest.mark.parametrize("body", BODIES)
def test_bad_bodies(http, body):
    content, message = BODIES[body]
    wrong(http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}), 400, message)


def test_a_body_must_say_that_it_is_json(http):
    """Or any web page could send one from its visitor's browser."""
    response = http.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": "text/plain"})
    wrong(response, 400, "application/json")


def test_unknown_models(http, client):
    for name in ("nobody", "a0/", "../a0", "a9", "TINY", "a" * 500):
        error = wrong(http.post("/v1/chat/completions", json={**CHAT, "model": name}), 404, param="model", code="model_not_found")
        assert len(error["message"]) < 200
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=HELLO)


def test_too_long(http):
    long = [{"role": "user", "content": "x" * 300}]
    for more in ({}, {"max_tokens": 10}, {"stream": True}):
        body = {"model": "a0", "messages": long, **more}
        wrong(http.post("/v1/chat/completions", json=body), 400, "context is 256", code="context_length_exceeded")
    body = {"model": "a0", "prompt": "abc", "max_tokens": 254}
    wrong(http.post("/v1/completions", json=body), 400, "context is 256", param="max_tokens", code="context_length_exceeded")
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "temperature": 0}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_prompts_of_no_tokens_or_foreign_ones(http):
    for prompt in ("", [], [259], [-1], [10**9]):
        wrong(http.post("/v1/completions", json={"model": "tiny", "prompt": prompt}), 400, "prompt")


def test_too_large(server, http):
    wrong(http.post("/v1/completions", content=b" " * (1 << 20) + b"x"), 413, "1048576 bytes")
    headers = {"Content-Type": "application/json"}
    chunked = http.post("/v1/completions", content=iter([b" " * 600_000] * 2), headers=headers)
    wrong(chunked, 413, "1048576 bytes")
    assert http.get("/health").status_code == 200


def test_no_chat_template(server, http, monkeypatch):
    monkeypatch.setattr(server.service.answerer._prompter._tokenizer, "chat_template", None)
    wrong(http.post("/v1/chat/completions", json=CHAT), 400, "/v1/completions", param="messages")
    refusing = "{{ raise_exception('turns must alternate') }}"
    monkeypatch.setattr(server.service.answerer._prompter._tokenizer, "chat_template", refusing)
    wrong(http.post("/v1/chat/completions", json=CHAT), 400, "turns must alternate", param="messages")


# adapters that come and go


def load(http, name, path):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})


def unload(http, name):
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_load_and_unload(http, client, twin, root):
    assert load(http, "new", "a4").text == "Success: LoRA adapter 'new' added successfully."
    ask = {"model": "new", "messages": HELLO, "max_tokens": 10, "temperature": 0}
    assert client.chat.completions.create(**ask).choices[0].message.content == twin.chat("Hello there", 10, root / "a4")
    assert "new" in [m.id for m in client.models.list()]
    wrong(load(http, "new", "a5"), 400, "unload it first")
    assert 'model="new"' in http.get("/metrics").text
    assert unload(http, "new").text == "Success: LoRA adapter 'new' removed successfully."
    assert 'model="new"' not in http.get("/metrics").text
    wrong(unload(http, "new"), 404)
    wrong(http.post("/v1/chat/completions", json=ask), 404)
    assert load(http, "new", root / "a5").status_code == 200  # the same name, another adapter
    assert client.chat.completions.create(**ask).choices[0].message.content == twin.chat("Hello there", 10, root / "a5")
    assert unload(http, "new").status_code == 200


@pytest.mark.parametrize("path", ["damaged", "truncated", "empty", "foreign", "nowhere", "../a0", "/etc", "\0", "a0/../.."])
def test_adapters_that_are_refused(server, http, root, path):
    before = server.service.store.infos()
    error = wrong(load(http, "bad", path), 400)
    assert str(root) not in error["message"]
    assert server.service.store.infos() == before
    assert http.get("/health").status_code == 200


def test_names_that_are_refused(server, http):
    for name in ("../x", "a b", "x" * 200, ".."):
        wrong(load(http, name, "a4"), 400, "name")
    wrong(load(http, "tiny", "a4"), 400, "base model's name")
    wrong(load(http, "a0", "a4"), 400, "a0")
    assert [info.name for info in server.service.store.infos()] == ["a0", "a1"]


def test_an_adapter_in_use_stays(server, http, root, twin):
    assert load(http, "busy", "a4").status_code == 200
    body = {"model": "busy", "prompt": "Go", "max_tokens": 200, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.service.store.acquire("busy")  # as one more request would, and one that does not end
        try:
            wrong(unload(http, "busy"), 409, "are using this adapter")
        finally:
            server.service.store.release("busy")
        text = "".join(json.loads(x[6:])["choices"][0]["text"] for x in lines if x.startswith("data: {"))
    assert twin.complete("Go", 200, root / "a4").endswith(text)
    assert unload(http, "busy").status_code == 200


def test_loading_can_be_off(base, root):
    with running(base, root, loading=False) as server:
        for call in (lambda: load(http, "x", "a4"), lambda: unload(http, "x")):
            with httpx.Client(base_url=server.url) as http:
                wrong(call(), 403, "--adapter-root", code="loading_off")


def test_evicted_adapters_come_back(base, root, twin):
    """Memory for two of five: each answers as itself all the same, and the counters tell."""
    size = (root / "a0/adapter_model.safetensors").stat().st_size
    with running(base, root, capacity=int(size * 2.5)) as server, httpx.Client(base_url=server.url) as http:
        for _ in range(2):
            for i in range(5):
                if f"a{i}" not in server.service.store:
                    assert load(http, f"a{i}", f"a{i}").status_code == 200
                body = {"model": f"a{i}", "prompt": "Once", "max_tokens": 6, "temperature": 0}
                answer = http.post("/v1/completions", json=body).json()
                assert answer["choices"][0]["text"] == twin.complete("Once", 6, root / f"a{i}")
        metrics = http.get("/metrics").text
        assert "intaglio_adapters 5.0" in metrics
        assert value(metrics, "intaglio_adapter_evictions_total") >= 3
        assert value(metrics, "intaglio_adapter_loads_total") >= 8
        wrong(load(http, "again", "a0/../foreign"), 400)
    with running(base, root, capacity=size // 2) as server, httpx.Client(base_url=server.url) as http:
        wrong(load(http, "large", "a0"), 400)
        assert server.service.store.infos() == []


# many, gone, dead, ending


def value(metrics, name):
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name))


def test_metrics(http, client):
    def read(name):
        return value(http.get("/metrics").text, name)

    requests, tokens = (
        read('intaglio_requests_total{model="a0",status="200"}'),
        read('intaglio_generated_tokens_total{model="a0"}'),
    )
    unknown = read('intaglio_requests_total{model="",status="404"}')
    client.completions.create(model="a0", prompt="abcd", max_tokens=7, temperature=0)
    http.post("/v1/completions", json={"model": "stranger", "prompt": "x"})
    assert read('intaglio_requests_total{model="a0",status="200"}') == requests + 1
    assert read('intaglio_generated_tokens_total{model="a0"}') == tokens + 7
    assert read('intaglio_requests_total{model="",status="404"}') == unknown + 1
    assert "stranger" not in http.get("/metrics").text
    for name in ("intaglio_time_to_first_token_seconds_count", "intaglio_request_seconds_bucket", "intaglio_prompt_tokens_total"):
        assert read(name) > 0
    wait_until(lambda: not any(read(f"intaglio_requests_{what}") for what in ("running", "waiting", "open")))
    assert read("intaglio_healthy") == 1


def test_a_full_queue_is_429(base, root):
    limits = Limits(max_running=1, max_queue=1)
    with running(base, root, limits=limits, max_batch=1) as server, httpx.Client(base_url=server.url) as http:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 250, "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            second = threading.Thread(
                target=lambda: httpx.post(server.url + "/v1/completions", json={**body, "stream": False}, timeout=60)
            )
            second.start()
            wait_until(lambda: server.service.admission.taken == 2 or not second.is_alive())
            assert server.service.admission.taken == 2
            third = http.post("/v1/completions", json=body)
            wrong(third, 429, "too many", type="rate_limit_error", code="queue_full")
            assert int(third.headers["retry-after"]) >= 1
            assert sum(1 for _ in lines) > 1
        second.join()
        assert http.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_leaves_frees_the_place(server, http, stream):
    """The request ends at the engine long before its 240 tokens are there."""
    service = server.service
    before = value(http.get("/metrics").text, "intaglio_generated_tokens_total")
    for _ in range(4):
        body = {"model": "a0", "prompt": "Go on", "max_tokens": 240, "temperature": 0, "stream": stream}
        if stream:
            with httpx.stream("POST", server.url + "/v1/completions", json=body, headers=http.headers) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + "/v1/completions", json=body, headers=http.headers, timeout=httpx.Timeout(30, read=0.05))
        wait_until(lambda: service.admission.taken == 0 and service.engine.running == service.engine.waiting == 0)
    made = value(http.get("/metrics").text, "intaglio_generated_tokens_total") - before
    assert made < 4 * 240
    if not stream:
        assert value(http.get("/metrics").text, 'intaglio_requests_total{model="a0",status="499"}') == 4


def test_a_dead_worker_is_unhealthy(base, root, monkeypatch):
    with running(base, root) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/health").status_code == 200
        body = {"model": "tiny", "prompt": "a", "max_tokens": 250, "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)

            def broken(*_, **__):
                raise RuntimeError("planted failure")

            monkeypatch.setattr(server.service.engine._manager, "_generation_step", broken)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
        assert "planted" not in last
        wait_until(lambda: not server.service.engine.alive)
        wrong(http.get("/health"), 503)
        wrong(http.post("/v1/completions", json={**body, "stream": False}), 503, code="engine_dead")
        assert value(http.get("/metrics").text, "intaglio_healthy") == 0
        assert value(http.get("/metrics").text, 'intaglio_requests_total{model="tiny",status="500"}') == 1


def test_what_takes_too_long_at_the_end_is_ended(base, root):
    with running(base, root) as server, httpx.Client(base_url=server.url) as http:
        body = {"model": "tiny", "prompt": "Go on", "max_tokens": 250, "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            asyncio.run(server.service.drain(0))
            last = [line for line in lines if line][-1]
        assert json.loads(last[6:])["error"]["code"] == "shutting_down"
        wrong(http.post("/v1/completions", json=body), 503, code="shutting_down")
        wrong(http.get("/health"), 503, "shutting down")
        assert http.get("/metrics").status_code == 200


def test_a_bug_is_a_500_of_the_same_shape(server, http, monkeypatch, caplog):
    monkeypatch.setattr(AdapterStore, "infos", lambda self: 1 / 0)
    wrong(http.get("/v1/models"), 500, "internal error", type="server_error")
