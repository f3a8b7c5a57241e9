"""Random traffic for a server whose every right answer is known: asks, streams, leaves, loads, unloads, and sends rubbish.

An adapter's name may mean another folder later on. An answer is right if it is what some folder says that the name meant
at a moment between the request and its end.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

Texts = dict[tuple[str, int], list[str]]  # (folder, prompt) → what n tokens say, n = 0, 1, …
LONGEST = 12  # tokens of an answer that is checked
# What only the tokenizer can refuse needs a place in the queue first, so 429 may come before.
BAD: list[tuple[str, bytes, set[int]]] = [
    ("/v1/completions", b"{", {400}),
    ("/v1/completions", b'{"model": "base", "prompt": ""}', {400, 429}),
    ("/v1/completions", b'{"model": "nobody", "prompt": "x"}', {404}),
    ("/v1/completions", b'{"model": "base", "prompt": [99999]}', {400, 429}),
    ("/v1/completions", b'{"model": "base", "prompt": "x", "n": 3}', {400}),
    ("/v1/completions", b'{"model": "base", "prompt": "x", "temperature": NaN}', {400}),
    ("/v1/completions", json.dumps({"model": "base", "prompt": "x" * 4000}).encode(), {400, 429}),
    ("/v1/completions", b'{"model": "base", "prompt": "\\ud800"}', {400}),
    ("/v1/completions", b" " * 1_100_000, {413}),
    ("/v1/chat/completions", b'{"model": "base", "messages": "hi"}', {400}),
    ("/v1/load_lora_adapter", b'{"lora_name": "evil", "lora_path": "../../etc"}', {400}),
    ("/v1/load_lora_adapter", b'{"lora_name": "../evil", "lora_path": "f0"}', {400}),
    ("/v1/load_lora_adapter", b'{"lora_name": "broken", "lora_path": "damaged"}', {400}),
    ("/v1/unload_lora_adapter", b'{"lora_name": "nobody"}', {404}),
    ("/v1/nothing", b"{}", {404}),
]


@dataclass
class Report:
    """What happened."""

    kinds: Counter = field(default_factory=Counter)
    statuses: Counter = field(default_factory=Counter)
    right: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Meaning:
    """What a name may mean, from when that is asked for."""

    folder: str
    until: float = float("inf")
    sure: bool = False  # the server has said so


class Traffic:
    """Callers that do one thing after the other, each a random one.

    Args:
        url: of the server; its adapter root holds the folders, and "damaged", which is none. The base is called "base".
        texts: what each folder (and "" for the base) says to each prompt, by number of tokens.
        prompts: the prompts.
        names: adapter names to load and unload.
        key: bearer key; requests without it must be refused.
        seed: of all choices.
    """

    def __init__(self, url: str, texts: Texts, prompts: list[str], names: list[str], *, key: str, seed: int = 0) -> None:
        self._url, self._texts, self._prompts, self._names, self._key = url, texts, prompts, names, key
        self._folders = sorted({folder for folder, _ in texts if folder})
        self._random = random.Random(seed)
        self._meant: dict[str, list[_Meaning]] = {name: [] for name in names}
        self.report = Report()

    def run(self, requests: int, callers: int, every: Callable[[int], None] = lambda done: None) -> Report:
        """Send that many, from so many callers at once, and wait for the last answer; `every` hears of each 500."""
        asyncio.run(self._run(requests, callers, every))
        return self.report

    async def _run(self, requests: int, callers: int, every: Callable[[int], None]) -> None:
        left = iter(range(requests))
        headers = {"Authorization": f"Bearer {self._key}"}
        limits = httpx.Limits(max_connections=callers, max_keepalive_connections=callers)
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=60, limits=limits, trust_env=False) as http:

            async def caller() -> None:
                for i in left:
                    await self._one(http)
                    if (i + 1) % 500 == 0:
                        every(i + 1)

            await asyncio.gather(*(caller() for _ in range(callers)))

    async def _one(self, http: httpx.AsyncClient) -> None:
        kinds = {"ask": 40, "stream": 20, "leave": 12, "load": 13, "unload": 5, "bad": 8, "stranger": 2}
        kind = self._random.choices(list(kinds), list(kinds.values()))[0]
        self.report.kinds[kind] += 1
        try:
            await getattr(self, f"_{kind}")(http)
        except httpx.HTTPError as error:
            self.report.faults.append(f"{kind}: {error!r}")

    def _check(self, kind: str, status: int, allowed: set[int], text: str = "") -> None:
        self.report.statuses[kind, status] += 1
        if status not in allowed:
            self.report.faults.append(f"{kind}: status {status}, {text[:200]}")
        elif status != 200 and status != 499:
            error = json.loads(text)["error"]
            if set(error) != {"message", "type", "param", "code"}:
                self.report.faults.append(f"{kind}: shape of {text[:200]}")

    def _question(self) -> tuple[dict, int]:
        prompt, model = self._random.randrange(len(self._prompts)), self._random.choice(["base", *self._names])
        tokens = self._random.randint(1, LONGEST)
        return {"model": model, "prompt": self._prompts[prompt], "max_tokens": tokens, "temperature": 0}, prompt

    def _judge(self, kind: str, body: dict, prompt: int, text: str, start: float) -> None:
        """Right, if some folder that the name meant since `start` says so."""
        meant = [""] if body["model"] == "base" else [m.folder for m in self._meant[body["model"]] if m.until >= start]
        if text in [self._texts[folder, prompt][body["max_tokens"]] for folder in meant]:
            self.report.right += 1
        else:
            whose = [folder for (folder, p), said in self._texts.items() if p == prompt and said[body["max_tokens"]] == text]
            self.report.faults.append(f"{kind}: {body['model']} (meant {meant}) said {text!r}, which is {whose}")

    async def _ask(self, http: httpx.AsyncClient) -> None:
        (body, prompt), start = self._question(), time.monotonic()
        response = await http.post("/v1/completions", json=body)
        self._check("ask", response.status_code, {200, 404, 429}, response.text)
        if response.status_code == 200:
            self._judge("ask", body, prompt, response.json()["choices"][0]["text"], start)

    async def _stream(self, http: httpx.AsyncClient) -> None:
        (body, prompt), start = self._question(), time.monotonic()
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            lines = [line async for line in response.aiter_lines() if line]
        self._check("stream", response.status_code, {200, 404, 429}, lines[0])
        if response.status_code == 200:
            chunks = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
            if "error" in chunks[-1]:
                self.report.faults.append(f"stream: {lines[-1]}")
            else:
                self._judge("stream", body, prompt, "".join(chunk["choices"][0]["text"] for chunk in chunks), start)

    async def _leave(self, http: httpx.AsyncClient) -> None:
        """Ask for much and go: after the first line, or before any."""
        body = {**self._question()[0], "max_tokens": 150}
        if self._random.random() < 0.5:
            async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                async for line in response.aiter_lines():
                    self._check("leave", response.status_code, {200, 404, 429}, line)
                    break
            return
        try:
            response = await http.post("/v1/completions", json=body, timeout=self._random.uniform(0.005, 0.1))
            self._check("leave", response.status_code, {200, 404, 429}, response.text)
        except httpx.TimeoutException:
            self.report.statuses["leave", 499] += 1

    async def _load(self, http: httpx.AsyncClient) -> None:
        name, meaning = self._random.choice(self._names), _Meaning(self._random.choice(self._folders))
        self._meant[name].append(meaning)
        response = await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": meaning.folder})
        self._check("load", response.status_code, {200, 400}, response.text)
        meaning.sure = response.status_code == 200
        if not meaning.sure:
            self._meant[name].remove(meaning)
            if "unload it first" not in response.text:
                self.report.faults.append(f"load: {response.text}")

    async def _unload(self, http: httpx.AsyncClient) -> None:
        """What the name surely meant when this was asked for, it means no more once the server says so."""
        name = self._random.choice(self._names)
        before = [meaning for meaning in self._meant[name] if meaning.sure]
        response = await http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        self._check("unload", response.status_code, {200, 404, 409}, response.text)
        if response.status_code == 200:
            now = time.monotonic()
            for meaning in before:
                meaning.until = min(meaning.until, now)
            self._meant[name] = [meaning for meaning in self._meant[name] if meaning.until > now - 60]

    async def _bad(self, http: httpx.AsyncClient) -> None:
        path, content, allowed = self._random.choice(BAD)
        response = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        self._check("bad", response.status_code, allowed, response.text)

    async def _stranger(self, http: httpx.AsyncClient) -> None:
        response = await http.post("/v1/completions", json=self._question()[0], headers={"Authorization": "Bearer guess"})
        self._check("stranger", response.status_code, {401}, response.text)


def right_answers(twin: Any, folders: dict[str, Path], prompts: list[str]) -> Texts:
    """What the base and each adapter, merged into it, say to each prompt.

    Args:
        twin: a `serving.Twin` of the base.
        folders: name → adapter folder.
        prompts: the prompts.
    """
    return {
        (name, i): [twin.complete(prompt, n, folder) if n else "" for n in range(LONGEST + 1)]
        for name, folder in {"": None, **folders}.items()
        for i, prompt in enumerate(prompts)
    }
