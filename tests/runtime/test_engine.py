"""The engine: every request gets its own adapter's tokens, its own sampling, one end, and nobody else's keys and values."""

import queue
import shutil
import threading
import time
from functools import partial

import pytest
import torch
from peft import PeftModel
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from intaglio.export.lora import to_lora
from intaglio.runtime import batching
from intaglio.runtime.engine import Engine, Event, Sampling
from intaglio.runtime.sampling import Sampler
from intaglio.runtime.store import AdapterInUse, AdapterStore, UnknownAdapter
from support import requests as tools
from support import tiny

NAME = "gqa_llama"
PROMPT = [5, 17, 60, 33, 8, 71, 12]


def prompt(seed, length):
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Twenty-two deltas of the tiny Llama and their folders."""
    folder = tmp_path_factory.mktemp("adapters")
    deltas = {f"user{seed}": tools.columns(tiny.build(NAME), seed) for seed in range(22)}
    return deltas, {name: delta.save(folder / name) for name, delta in deltas.items()}


@pytest.fixture
def serve(adapters):
    """Starts engines with all adapters loaded; stops them after the test."""
    engines = []

    def start(model=None, **settings):
        model = tiny.build(NAME) if model is None else model
        store = settings.pop("store", None) or AdapterStore(model)
        if not store.infos():
            for name, path in adapters[1].items():
                store.load(name, path)
        engines.append(Engine(model, store, **({"eos": [], "max_batch": 32} | settings)))
        engines[-1].start()
        return engines[-1], tools.Answers(engines[-1])

    yield start
    for engine in engines:
        engine.stop(10)


# the right adapter


def test_tokens_are_those_of_merged_weights(serve, adapters):
    """22 adapters and the base in one batch, prompts of many lengths, greedy, fp32."""
    engine, answers = serve()
    asked = {(name, seed): prompt(seed, 3 + seed % 9) for seed, name in enumerate([None, *adapters[0]])}
    for (name, seed), tokens in asked.items():
        answers.ask((name, seed), tokens, 12, name)
    answers.wait()
    different = 0
    for (name, seed), tokens in asked.items():
        delta = None if name is None else adapters[0][name]
        expected = tools.merged_tokens(NAME, delta, tokens, 12)
        assert answers.tokens((name, seed)) == expected, name
        assert answers.end((name, seed)).finish == "length"
        different += expected != tools.merged_tokens(NAME, None, tokens, 12)
    assert different > 20
    assert (engine.running, engine.waiting) == (0, 0)


def test_tokens_are_those_of_peft_with_exported_loras(serve, adapters, tmp_path):
    """The same batch through PEFT's `adapter_names`."""
    _, answers = serve()
    names = list(adapters[0])[:20]
    model = None
    for name in names:
        to_lora(adapters[0][name], tiny.build(NAME), tmp_path / name)
        if model is None:
            model = PeftModel.from_pretrained(tiny.build(NAME), str(tmp_path / name), adapter_name=name).eval()
        else:
            model.load_adapter(str(tmp_path / name), adapter_name=name)
    ids = torch.tensor([PROMPT] * 21)
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=["__base__", *names],
        max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    for name in [None, *names]:
        answers.ask(name, PROMPT, 10, name)
    answers.wait()
    for name, row in zip([None, *names], generated[:, len(PROMPT) :].tolist(), strict=True):
        assert answers.tokens(name) == row, name


# transformers' continuous batching does not know Falcon's attention, nor caches whose keys and values differ in width.
UNKNOWN = ("grouped_falcon", "latent_deepseek_v3", "widths_gemma4")


@pytest.mark.parametrize("name", [name for name in tiny.CAUSAL if name not in (NAME, *UNKNOWN)])
def test_other_architectures(serve, tmp_path, name):
    model = tiny.build(name)
    store, deltas = AdapterStore(model), {}
    for seed in range(4):
        deltas[str(seed)] = tools.draw(model, seed)
        store.load(str(seed), deltas[str(seed)].save(tmp_path / str(seed)))
    _, answers = serve(model, store=store)
    for key in (None, *deltas):
        answers.ask(key, PROMPT, 8, key)
    answers.wait()
    for key in (None, *deltas):
        assert answers.tokens(key) == tools.merged_tokens(name, deltas.get(key), PROMPT, 8), key


def test_long_prompts_are_read_in_pieces(serve, adapters, monkeypatch):
    monkeypatch.setattr(batching, "_STEP", 16)
    _, answers = serve(max_batch=4)
    for seed, name in enumerate([None, "user0", "user1", None, "user2"]):
        answers.ask((name, seed), prompt(seed, 45), 8, name)
    answers.wait()
    for seed, name in enumerate([None, "user0", "user1", None, "user2"]):
        assert answers.tokens((name, seed)) == tools.merged_tokens(NAME, adapters[0].get(name), prompt(seed, 45), 8)


def test_a_short_cache_delays_but_changes_nothing(serve, adapters, monkeypatch):
    """Room for a few requests of full length: some are put off in the middle of their answer and read again."""
    put_off, again = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: put_off.append(state.request_id) or again(state)
    )
    _, answers = serve(max_batch=12, max_cache_tokens=64, max_context=64)
    names = list(adapters[0])[:12]
    for name in names:
        answers.ask(name, PROMPT, 50, name)
    answers.wait()
    for name in names:
        assert answers.tokens(name) == tools.merged_tokens(NAME, adapters[0][name], PROMPT, 50), name
    assert put_off


def test_a_cancel_while_the_cache_is_short_lets_the_others_go_on(serve, adapters, monkeypatch):
    """All that run are cancelled when one has been put off: transformers would then start none again."""
    put_off, again = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: put_off.append(state.request_id) or again(state)
    )
    engine, answers = serve(max_batch=12, max_cache_tokens=64, max_context=64)
    ids, over = {}, queue.Queue()

    def deliver(event, name):
        if event.finish:
            over.put((name, event.finish))
        if put_off:  # in the engine's thread: nothing else happens between
            for id_ in set(ids.values()) - {put_off[0]}:
                engine.cancel(id_)

    names = list(adapters[0])[:12]
    for name in names:
        ids[name] = engine.submit(PROMPT, Sampling(50, temperature=0), partial(deliver, name=name), name)
    ends = dict(over.get(timeout=60) for _ in names)
    (kept,) = (name for name in names if ids[name] == put_off[0])
    assert ends == dict.fromkeys(names, "cancelled") | {kept: "length"}
    answers.ask("later", PROMPT, 5, "user0")
    answers.wait()
    assert len(answers.tokens("later")) == 5


def test_files_that_become_unreadable_end_their_own_request(serve, adapters, tmp_path):
    for name, path in list(adapters[1].items())[:2]:
        shutil.copytree(path, tmp_path / name)
    store = AdapterStore(tiny.build(NAME), capacity_bytes=1)
    store.capacity_bytes = None
    for name in ("user0", "user1"):
        store.load(name, tmp_path / name)
    store.capacity_bytes = store.resident_bytes // 2
    store.fetch("user1")  # evicts the other
    config = tmp_path / "user0/adapter_config.json"
    config.write_text("[" * 100_000)
    engine, answers = serve(store=store)
    answers.ask("user0", PROMPT, 4, "user0")
    answers.ask("base", PROMPT, 4)
    answers.wait()
    assert answers.end("user0").finish == "error"
    assert answers.end("base").finish == "length"
    assert engine.alive


def test_no_prefix_is_shared_between_adapters(serve, adapters):
    """Two users, one long prompt: the second answer must come from the second adapter alone."""
    assert leak(serve) == [tools.merged_tokens(NAME, adapters[0][name], prompt(1, 50), 8) for name in ("user0", "user1")]


def test_the_planted_leak_is_seen(serve, adapters, monkeypatch):
    """With transformers' default the second user gets an answer from the first one's keys and values."""
    safe = batching.settings

    def unsafe(*arguments):
        config = safe(*arguments)
        config.allow_block_sharing = True
        return config

    monkeypatch.setattr("intaglio.runtime.engine.settings", unsafe)
    first, second = leak(serve)
    assert first == tools.merged_tokens(NAME, adapters[0]["user0"], prompt(1, 50), 8)
    assert second != tools.merged_tokens(NAME, adapters[0]["user1"], prompt(1, 50), 8)


def leak(serve):
    _, answers = serve()
    for name in ("user0", "user1"):
        answers.ask(name, prompt(1, 50), 8, name)
        answers.wait(1)
    return [answers.tokens("user0"), answers.tokens("user1")]


# sampling


def test_requests_keep_their_own_sampling(serve):
    """Greedy and seeded requests in one batch: a seed gives the same tokens in any company; greedy stays greedy."""
    _, answers = serve()
    answers.ask("alone", PROMPT, 20, "user1", temperature=1.2, top_p=0.9, seed=7)
    answers.wait()
    for i in range(4):
        answers.ask(("greedy", i), PROMPT, 20, "user1")
        answers.ask(("seed", i), PROMPT, 20, "user1", temperature=1.2, top_p=0.9, seed=7)
        answers.ask(("other", i), PROMPT, 20, "user1", temperature=1.2, top_p=0.9, seed=i)
        answers.ask(("free", i), PROMPT, 20, "user1", temperature=1.2)
    answers.wait(16)
    greedy = {tuple(answers.tokens(("greedy", i))) for i in range(4)}
    assert len(greedy) == 1
    assert {tuple(answers.tokens(("seed", i))) for i in range(4)} == {tuple(answers.tokens("alone"))}
    assert len({tuple(answers.tokens(("other", i))) for i in range(4)}) == 4
    assert len({tuple(answers.tokens(("free", i))) for i in range(4)} | greedy) == 5


@pytest.mark.parametrize("vocabulary", [96, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.97, 0.5])
@pytest.mark.parametrize("top_k", [None, 1, 20])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 40.0])
def test_candidates_are_those_of_transformers(vocabulary, top_p, top_k, temperature):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 4
    ids, weights = Sampler(Sampling(1, temperature, top_p, top_k))._candidates((logits - logits.max()) / temperature)
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    expected = TopPLogitsWarper(top_p)(None, scores)[0].softmax(0) if top_p < 1 else scores[0].softmax(0)
    found = torch.zeros(vocabulary)
    found[torch.arange(vocabulary) if ids is None else ids] = weights / weights.sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampler = Sampler(Sampling(1, seed=0))
    shares = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(shares, logits.exp(), rtol=0, atol=0.03)
    sampler = Sampler(Sampling(1, top_p=0.7, seed=0))
    assert {sampler(logits) for _ in range(200)} == {0, 1}


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}]
)
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**({"max_tokens": 1} | wrong))


def test_the_end_token_ends_an_answer(serve):
    _, answers = serve()
    answers.ask("whole", PROMPT, 20)
    tokens = answers.wait().tokens("whole")
    stop = tokens[-1] if tokens[-1] not in tokens[:-1] else tokens[0]
    _, answers = serve(eos=[95 if stop != 95 else 94, stop])
    answers.ask("cut", PROMPT, 20)
    answers.wait()
    assert answers.tokens("cut") == tokens[: tokens.index(stop) + 1]
    assert answers.end("cut").finish == "stop"


# one request's trouble is its own


class Gate(torch.nn.Module):
    """Stands before the head: holds the loop in the middle of a step, or breaks it."""

    def __init__(self, head):
        super().__init__()
        self.head, self.open, self.error = head, threading.Event(), None
        self.open.set()

    def forward(self, x):
        self.open.wait(60)
        if self.error is not None:
            raise self.error
        return self.head(x)


def gated(serve, **settings):
    model = tiny.build(NAME)
    store = AdapterStore(model)
    gate = model.lm_head = Gate(model.lm_head)
    return gate, *serve(model, store=store, **settings)


def test_cancel(serve, adapters):
    gate, engine, answers = gated(serve, max_batch=2)
    gate.open.clear()
    ids = {name: answers.ask(name, PROMPT, 40, name) for name in ("user0", "user1", "user2", "user3")}
    engine.cancel(ids["user0"])
    engine.cancel(ids["user3"])  # waits still
    engine.cancel(ids["user3"])
    engine.cancel("no such request")
    gate.open.set()
    answers.wait()
    for name in ("user0", "user3"):
        assert answers.end(name) == Event([], "cancelled")
        assert len(answers.tokens(name)) <= 1
    for name in ("user1", "user2"):
        assert answers.tokens(name) == tools.merged_tokens(NAME, adapters[0][name], PROMPT, 40)
    engine.cancel(ids["user1"])  # over already
    for name in ids:
        engine.store.unload(name)  # nobody uses it any more


def test_counts_and_unloading_in_use(serve):
    gate, engine, answers = gated(serve, max_batch=2)
    gate.open.clear()
    for name in ("user0", "user1", "user2"):
        answers.ask(name, PROMPT, 4, name)
    deadline = time.monotonic() + 30
    while (engine.running, engine.waiting) != (2, 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.running, engine.waiting) == (2, 1)
    for name in ("user0", "user2"):
        with pytest.raises(AdapterInUse):
            engine.store.unload(name)
    gate.open.set()
    answers.wait()
    engine.store.unload("user0")
    with pytest.raises(UnknownAdapter):
        answers.ask("gone", PROMPT, 4, "user0")


def test_a_receiver_that_raises_is_cancelled_alone(serve, adapters):
    engine, answers = serve()
    seen = []

    def broken(event):
        seen.append(event)
        raise OSError("gone")

    engine.submit(PROMPT, Sampling(40, temperature=0), broken, "user0")
    answers.ask("user1", PROMPT, 40, "user1")
    answers.wait()
    assert [event.finish for event in seen] == [None, "cancelled"]
    assert answers.tokens("user1") == tools.merged_tokens(NAME, adapters[0]["user1"], PROMPT, 40)
    engine.store.unload("user0", wait=5)


def test_an_adapter_that_vanished_ends_its_request_alone(serve, adapters, tmp_path):
    model = tiny.build(NAME)
    shutil.copytree(adapters[1]["user0"], tmp_path / "a")
    store = AdapterStore(model, capacity_bytes=AdapterStore(model).load("b", adapters[1]["user1"]).bytes + 1000)
    store.load("a", tmp_path / "a")
    store.load("b", adapters[1]["user1"])  # evicts "a"
    shutil.rmtree(tmp_path / "a")
    engine, answers = serve(model, store=store)
    answers.ask("a", PROMPT, 10, "a")
    answers.ask("b", PROMPT, 10, "b")
    answers.wait()
    assert answers.end("a").finish == "error"
    assert "not an adapter folder" in answers.end("a").error
    assert answers.tokens("a") == []
    assert answers.tokens("b") == tools.merged_tokens(NAME, adapters[0]["user1"], PROMPT, 10)
    assert engine.alive


def test_logits_that_are_no_numbers_end_their_request_alone(serve, adapters):
    """One row of the head's output is NaN."""

    class Spoil(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            y = self.head(x)
            return torch.where((y.argmax(-1, keepdim=True) == poison), torch.nan, y)

    expected = tools.merged_tokens(NAME, adapters[0]["user1"], PROMPT, 10)
    poison = next(t for t in tools.merged_tokens(NAME, adapters[0]["user0"], PROMPT, 10) if t not in expected)
    model = tiny.build(NAME)
    store = AdapterStore(model)
    model.lm_head = Spoil(model.lm_head)
    engine, answers = serve(model, store=store)
    answers.ask("user0", PROMPT, 10, "user0")
    answers.ask("sampled", PROMPT, 10, "user0", temperature=1e-3, seed=1)
    answers.ask("user1", PROMPT, 10, "user1")
    answers.wait()
    for key in ("user0", "sampled"):
        assert answers.end(key) == Event([], "error", "the model's output is not finite")
    assert answers.tokens("user1") == expected
    assert engine.alive


def test_random_traffic(serve, adapters, tmp_path):
    """Requests, cancels, loads, unloads and evictions at random: each gets its own adapter's tokens, or as many as it lived."""
    model = tiny.build(NAME)
    names = list(adapters[0])[:6]
    sizes = [AdapterStore(model).load(name, adapters[1][name]).bytes for name in names]
    store = AdapterStore(model, capacity_bytes=2 * max(sizes))
    expected = {
        (name, seed): tools.merged_tokens(NAME, adapters[0].get(name), prompt(seed, 4 + 9 * seed), 12)
        for name in (None, *names)
        for seed in range(3)
    }
    for name in names:
        store.load(name, adapters[1][name])
    engine, answers = serve(model, store=store, max_batch=8)
    generator = torch.Generator().manual_seed(0)
    ids = {}
    for number in range(250):
        pick, seed, action = torch.randint(60, (3,), generator=generator).tolist()
        name, key = (None, *names)[pick % 7], (number, (None, *names)[pick % 7], seed % 3)
        try:
            ids[key] = answers.ask(key, prompt(seed % 3, 4 + 9 * (seed % 3)), 12, name)
            if action < 10:
                engine.cancel(ids[list(ids)[-1 - action]] if len(ids) > action else "none")
            elif action < 14:
                store.unload(names[action % 6])
            elif action < 20:
                store.load(names[action % 6], adapters[1][names[action % 6]])
        except UnknownAdapter:
            answers.events.pop(key, None)
        except ValueError:  # in use, or there already
            pass
        if number % 25 == 24:
            time.sleep(0.02)
    answers.wait()
    ends = [answers.end(key).finish for key in answers.events]
    assert {"length", "cancelled"} == set(ends)
    for number, name, seed in answers.events:
        tokens = answers.tokens((number, name, seed))
        assert tokens == expected[name, seed][: len(tokens)]
        assert len(tokens) == 12 or answers.end((number, name, seed)).finish == "cancelled"
    assert (engine.running, engine.waiting) == (0, 0)
    assert engine.alive
    assert store.resident_bytes <= store.capacity_bytes
    for info in store.infos():
        store.unload(info.name)  # nobody has been forgotten


def test_bad_requests_are_refused_before_they_are_queued(serve):
    engine, _ = serve()
    for bad, message in (
        ([], "empty"),
        ([3, 96], r"\[0, 96\)"),
        ([-1], r"\[0, 96\)"),
        ([3] * 60, "more than the context of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(bad, Sampling(8), print)
    with pytest.raises(UnknownAdapter):
        engine.submit(PROMPT, Sampling(8), print, "nobody")
    assert (engine.running, engine.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_context": 65}, "max_context=65"),
        ({"max_cache_tokens": 10}, "max_cache_tokens=10"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    model = tiny.build(NAME)
    with pytest.raises(ValueError, match=message):
        Engine(model, AdapterStore(model), eos=[2], **wrong)


# the thread


def test_a_broken_model_ends_the_engine_and_says_so(serve):
    gate, engine, answers = gated(serve, max_batch=2)
    assert engine.alive
    gate.open.clear()
    for name in ("user0", "user1", "user2"):
        answers.ask(name, PROMPT, 4, name)
    gate.error = RuntimeError("the head broke")
    gate.open.set()
    answers.wait()
    assert {answers.end(name).finish for name in ("user0", "user1", "user2")} == {"error"}
    assert "the head broke" in answers.end("user0").error
    deadline = time.monotonic() + 30
    while engine.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.alive
    assert (engine.running, engine.waiting) == (0, 0)
    with pytest.raises(RuntimeError, match="does not run"):
        engine.submit(PROMPT, Sampling(4), print)
    engine.store.unload("user0")
    engine.stop()


def test_stop_lets_requests_end(serve):
    gate, engine, answers = gated(serve, max_batch=2)
    gate.open.clear()
    for name in ("user0", "user1", "user2"):
        answers.ask(name, PROMPT, 4, name)
    threading.Timer(0.2, gate.open.set).start()
    engine.stop(60)
    answers.wait()
    assert {answers.end(name).finish for name in ("user0", "user1", "user2")} == {"length"}
    assert not engine.alive
    with pytest.raises(RuntimeError, match="does not run"):
        engine.submit(PROMPT, Sampling(4), print)


def test_stop_ends_what_takes_too_long(serve):
    gate, engine, answers = gated(serve, max_batch=1)
    gate.open.clear()
    for name in ("user0", "user1"):
        answers.ask(name, PROMPT, 50, name)
    threading.Timer(0.5, gate.open.set).start()
    engine.stop(0.1)
    answers.wait()
    assert {answers.end(name).finish for name in ("user0", "user1")} == {"error"}
    assert not engine.alive


def test_an_engine_that_was_not_started_takes_nothing():
    model = tiny.build(NAME)
    with pytest.raises(RuntimeError, match="does not run"):
        Engine(model, AdapterStore(model), eos=[2]).submit(PROMPT, Sampling(4), print)


def test_the_model_is_left_as_it_was(serve):
    model = tiny.build(NAME)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention, random = model.config._attn_implementation, torch.get_rng_state()
    engine, answers = serve(model)
    answers.ask("user0", PROMPT, 4, "user0")
    answers.wait()
    engine.stop()
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
