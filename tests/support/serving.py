"""A real server on a tiny model: its adapters, the engine, HTTP over loopback, and what each adapter must answer."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from intaglio import Delta
from intaglio.core.entries import Slices
from intaglio.core.fingerprint import fingerprint
from intaglio.core.selection import Selection
from intaglio.export.proof import applied
from intaglio.runtime.engine import Engine
from intaglio.runtime.store import AdapterStore
from intaglio.serve.app import create_app
from intaglio.serve.limits import Limits
from intaglio.serve.service import Service
from support import tiny


def make_adapter(model: torch.nn.Module, folder: Path, seed: int) -> Path:
    """An adapter that changes four columns of each down_proj and o_proj so much that its answers are its own."""
    generator = torch.Generator().manual_seed(seed)
    chosen, values, prints = {}, {}, {}
    for name, parameter in model.named_parameters():
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            index = torch.randperm(parameter.shape[1], generator=generator)[:4].sort().values
            entries = Slices(tuple(parameter.shape), 1, index)
            base = entries.gather(parameter)
            chosen[name], prints[name] = entries, fingerprint(base)
            values[name] = base + torch.randn(base.shape, generator=generator).to(base)
    return Delta(Selection(chosen), values, prints, {"name": "test"}).save(folder)


class Twin:
    """A second copy of the base, which says what the base or an adapter merged into it answers."""

    def __init__(self, base: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self._known: dict[tuple, list[int]] = {}

    def chat(self, text: str, tokens: int, adapter: Path | None = None) -> str:
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return self.complete(prompt, tokens, adapter)

    def complete(self, prompt: str, tokens: int, adapter: Path | None = None) -> str:
        """Greedy; what is longer begins with what is shorter, so that one run answers for all lengths."""
        key = (prompt, adapter)
        if len(self._known.get(key, ())) < tokens:
            with contextlib.nullcontext() if adapter is None else applied(Delta.load(adapter), self.model):
                self._known[key] = self._greedy(prompt, max(tokens, 16))
        return self.tokenizer.decode(self._known[key][:tokens], skip_special_tokens=True)

    @torch.no_grad()
    def _greedy(self, prompt: str, tokens: int) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = self.model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        return out + [self.tokenizer.pad_token_id] * (tokens - len(out))  # ended early: special tokens say nothing


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    service: Service
    root: Path


@contextlib.contextmanager
def running(
    base: str, root: Path, *, limits: Limits | None = None, keys=(), capacity=None, max_batch=8, loading=True, name="tiny"
):
    """Serve `base` from a thread of this process, with `root` as the folder that callers may load from."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    limits = limits or Limits(max_running=max_batch, unload_wait=0.2)
    engine = Engine(model, AdapterStore(model, capacity_bytes=capacity), eos=[2], max_batch=max_batch)
    engine.start()
    service = Service(
        engine,
        AutoTokenizer.from_pretrained(base),
        name,
        vocabulary=model.config.vocab_size,
        limits=limits,
        keys=keys,
        adapter_root=root if loading else None,
    )
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", timeout_graceful_shutdown=2))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, root)
        finally:
            server.should_exit = True
            thread.join()
            engine.stop(timeout=5)


def wait_until(true, seconds: float = 20.0) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def folder(path: Path) -> str:
    """A tiny model with a tokenizer and chat template."""
    return tiny.save_folder(path)
