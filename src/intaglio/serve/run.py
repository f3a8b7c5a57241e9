"""The server's process: check everything, load the base and the adapters, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from ..adapter.names import check_name
from .limits import Keys, Limits

if TYPE_CHECKING:
    from .service import Service

__all__ = ["ENGINES", "Options", "parse_adapters", "serve"]

ENGINES = ("intaglio", "vllm")
# fields of `Options` that one engine has no use for, as the command line calls them
_OURS = {
    "adapter_root": "--adapter-root",
    "dtype": "--dtype",
    "memory": "--adapter-memory",
    "limits": "--max-batch, --max-queue, --max-tokens or --max-body",
    "shutdown_timeout": "--shutdown-timeout",
}
_VLLMS = {"export_dir": "--export-dir", "dry_run": "--dry-run"}
_LAST_BYTES = 5  # seconds for answers that are complete to reach their callers
_LISTED = 8  # adapters that the first line names


@dataclass(frozen=True)
class Options:
    """What `intaglio serve` takes.

    Attributes:
        base: as `load_model` takes it.
        adapters: name → adapter folder, or the folder of a finished run.
        name: what callers give as `model` for the base; default its hub name, or the last part of its folder.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        keys: bearer keys; none: open to everyone who can connect.
        adapter_root: folder that callers may load adapters from; default None, they may load none.
        dtype: of the base, e.g. "bfloat16"; default as its files have it.
        max_context: tokens of prompt and answer; default the model's.
        memory: bytes of adapters to keep in memory.
        limits: bounds on requests.
        shutdown_timeout: seconds that requests at work get after SIGTERM.
        engine: one of `ENGINES`.
        export_dir: for vLLM: the folder of exported LoRAs.
        dry_run: for vLLM: only say the command.
    """

    base: str
    adapters: dict[str, Path]
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[str] = ()
    adapter_root: Path | None = None
    dtype: str | None = None
    max_context: int | None = None
    memory: int = 4 << 30
    limits: Limits = field(default_factory=Limits)
    shutdown_timeout: float = 30.0
    engine: str = "intaglio"
    export_dir: Path = Path("exports/vllm")
    dry_run: bool = False

    @property
    def served_name(self) -> str:
        """The base's name for callers: no folder of this machine."""
        return self.name or (Path(self.base).resolve().name if Path(self.base).is_dir() else self.base)


def parse_adapters(given: Sequence[str]) -> dict[str, Path]:
    """`name=path` pairs of the command line.

    Raises:
        ValueError: for anything else, a folder that is not there, or a name given twice.
    """
    adapters: dict[str, Path] = {}
    for pair in given:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise ValueError(f"--adapter {pair!r}: give NAME=FOLDER")
        if check_name(name) in adapters:
            raise ValueError(f"--adapter {pair!r}: the name {name!r} is given twice")
        if not Path(path).is_dir():
            raise ValueError(f"--adapter {pair!r}: there is no folder {path!r}")
        adapters[name] = Path(path)
    return adapters


def serve(options: Options) -> str | None:
    """Serve until SIGTERM or SIGINT, then finish what runs and return.

    Returns:
        None; for a dry run the command that would serve.

    Raises:
        ValueError: for a mistake in `options`, most of them before the base's weights are read.
    """
    from ..hf.models import check_available

    _check(options)
    if options.engine == "vllm":
        return _vllm(options)
    check_available(options.base)
    with _bound(options.host, options.port) as listening:
        service = _start(options)
        try:
            asyncio.run(_listen(service, listening, options.shutdown_timeout))
        finally:
            service.engine.stop(timeout=_LAST_BYTES)
    return None


def _check(options: Options) -> None:
    if options.engine not in ENGINES:
        raise ValueError(f"--engine {options.engine!r}: give one of {', '.join(ENGINES)}")
    without_effect = _OURS if options.engine == "vllm" else _VLLMS
    default = Options(options.base, {})
    given = [name for name in without_effect if getattr(options, name) != getattr(default, name)]
    if given:
        raise ValueError(f"--engine {options.engine}: {', '.join(map(without_effect.__getitem__, given))} without effect there")
    Keys(options.keys)
    if options.served_name in options.adapters:
        raise ValueError(f"--adapter: {options.served_name!r} is the base's name; name the adapter differently, or give --name")
    if options.adapter_root is not None and not options.adapter_root.is_dir():
        raise ValueError(f"--adapter-root {str(options.adapter_root)!r}: there is no such folder")
    if options.memory < 1:
        raise ValueError("--adapter-memory: give more than 0 GiB")


def _vllm(options: Options) -> str:
    from .vllm_command import run

    return run(
        options.base,
        options.adapters,
        output=options.export_dir,
        dry_run=options.dry_run,
        keys=options.keys,
        served_name=options.served_name,
        host=options.host,
        port=options.port,
        max_context=options.max_context,
    )


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, not listening yet: whoever connects while the model is read is refused, not left waiting."""
    wrong = "--host {host} --port {port}: cannot listen there ({error})"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ValueError(wrong.format(host=host, port=port, error=error)) from error
    with socket.socket(family, kind, protocol) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
        except OSError as error:
            raise ValueError(wrong.format(host=host, port=port, error=error)) from error
        yield found


def _start(options: Options) -> Service:
    """The base, its adapters and the engine, which runs."""
    from ..hf.models import load_model, load_tokenizer
    from ..runs.folder import adapter_of
    from ..runtime.engine import Engine
    from ..runtime.store import AdapterStore
    from .service import Service

    tokenizer = load_tokenizer(options.base)
    model: Any = load_model(options.base, **({} if options.dtype is None else {"dtype": options.dtype})).eval()
    store = AdapterStore(model, base=options.served_name, capacity_bytes=options.memory)
    for name, path in options.adapters.items():
        store.load(name, adapter_of(path)[0])
    limits = options.limits
    engine = Engine(model, store, eos=_ends(model, tokenizer), max_batch=limits.max_running, max_context=options.max_context)
    engine.start()
    return Service(
        engine,
        tokenizer,
        options.served_name,
        vocabulary=model.get_input_embeddings().num_embeddings,
        limits=limits,
        keys=options.keys,
        adapter_root=options.adapter_root,
    )


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's own."""
    given = model.generation_config.eos_token_id
    listed = given if isinstance(given, list) else [given]
    return {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}


async def _listen(service: Service, listening: socket.socket, timeout: float) -> None:
    from .app import create_app

    host, port = listening.getsockname()[:2]
    names = [info.name for info in service.store.infos()]
    listed = ", ".join(names) if len(names) <= _LISTED else f"{len(names)} adapters"
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{service.name} with {listed or 'no adapters'} at {where} (process {os.getpid()})", flush=True)
    if not service.keys.needed and not ipaddress.ip_address(host).is_loopback:
        print("warning: everyone who reaches this address can use it; give --api-key or INTAGLIO_API_KEY", flush=True)
    config = uvicorn.Config(create_app(service), log_level="info", timeout_graceful_shutdown=_LAST_BYTES, server_header=False)
    await _Draining(config, lambda: service.drain(timeout)).serve([listening])


class _Draining(uvicorn.Server):
    """Uvicorn's server, which drains before it stops listening, and then returns instead of raising the signal again."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def asked(*_: object) -> None:
            loop.call_soon_threadsafe(self._asked)

        before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        else:  # asked twice: now
            self.should_exit = self.force_exit = True

    async def _end(self) -> None:
        await self._drain()
        self.should_exit = True
