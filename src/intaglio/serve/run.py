"""`intaglio serve`: its options, the engines that can serve, and what is checked before one of them starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..adapter.names import check_name

if TYPE_CHECKING:
    from .service import Service

__all__ = ["ENGINES", "Options", "Server", "parse_adapters", "serve"]


@dataclass(frozen=True)
class Server:
    """A server that `intaglio serve` can become.

    Attributes:
        help: what it does, for --help.
        run: serves with options that were checked; returns a command where it is only to be printed.
        no_effect: options that have no effect with it.
    """

    help: str
    run: Callable[[Options, Mapping[str, Path]], str | None]
    no_effect: tuple[str, ...]


def _ours(options: Options, adapters: Mapping[str, Path]) -> None:
    from .process import run

    run(options, lambda: _start(options))


def _vllms(options: Options, adapters: Mapping[str, Path]) -> str:
    from .vllm_command import run

    return run(options, adapters)


_BATCHING = ("max_batch", "max_queue", "max_tokens", "max_body", "allowed_host", "max_connections", "header_timeout")
ENGINES = {
    "intaglio": Server("this process", _ours, ("export_dir", "dry_run")),
    "vllm": Server(
        "vLLM's server, with the adapters exported to LoRA",
        _vllms,
        ("adapter_root", "dtype", "adapter_memory", *_BATCHING, "shutdown_timeout"),
    ),
}


@dataclass(frozen=True)
class Options:
    """The options of `intaglio serve`, each a field with its type, its default and what --help says of it."""

    base: Annotated[str, typer.Argument(help="base model: a folder, a hub name, or smollm2-135m", metavar="BASE")]
    adapter: Annotated[
        list[str] | None, typer.Option(help="an adapter folder or finished run; may be repeated", metavar="NAME=PATH")
    ] = None
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="port to listen on; 0: a free one", min=0, max=65535)] = 8000
    name: Annotated[str | None, typer.Option(help="the base's name for callers; default its own")] = None
    dtype: Annotated[str | None, typer.Option(help="of the base: float32, bfloat16, float16; default as its files have it")] = (
        None
    )
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="a key that callers must send; may be repeated", metavar="KEY", envvar="INTAGLIO_API_KEY"),
    ] = None
    adapter_root: Annotated[
        Path | None, typer.Option(help="folder that callers may load adapters from; without it they may load and unload none")
    ] = None
    adapter_memory: Annotated[
        float, typer.Option(help="GiB of adapters in memory; others are read again when asked for", min=0)
    ] = 4.0
    max_batch: Annotated[int, typer.Option(help="requests that run at once", min=1)] = 64
    max_queue: Annotated[int, typer.Option(help="requests that wait beyond those; more get 429", min=0)] = 64
    max_context: Annotated[int | None, typer.Option(help="tokens of prompt and answer; default the model's", min=2)] = None
    max_tokens: Annotated[int | None, typer.Option(help="longest answer; default what the context leaves", min=1)] = None
    max_body: Annotated[int, typer.Option(help="bytes of a request", min=1)] = 1 << 20
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="name that callers may use for the server; on loopback no others", metavar="NAME"),
    ] = None
    max_connections: Annotated[int, typer.Option(help="connections at once, idle ones too", min=1)] = 1024
    header_timeout: Annotated[float, typer.Option(help="seconds for the head of a request to come", min=0.1)] = 10.0
    shutdown_timeout: Annotated[float, typer.Option(help="seconds for requests at work after SIGTERM", min=0)] = 30.0
    engine: Annotated[
        str, typer.Option(help="who serves: " + "; ".join(f"{name}, {engine.help}" for name, engine in ENGINES.items()))
    ] = "intaglio"
    export_dir: Annotated[Path, typer.Option(help="for another engine: folder of the exported LoRAs")] = Path("exports/vllm")
    dry_run: Annotated[bool, typer.Option("--dry-run", help="for another engine: print the command only")] = False

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that callers may address the server by; none: any, as behind a proxy that looks at them."""
        local = ("localhost", "127.0.0.1", "[::1]") if self.host in ("localhost", "127.0.0.1", "::1") else ()
        return (*local, *(self.allowed_host or ()))

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
    adapters = parse_adapters(options.adapter or ())
    _check(options, adapters)
    return ENGINES[options.engine].run(options, adapters)


def _start(options: Options) -> Service:
    """The base, its adapters and the engine, which runs."""
    adapters = parse_adapters(options.adapter or ())
    from ..hf.models import end_tokens, load_model, load_tokenizer
    from ..runs.folder import adapter_of
    from ..runs.load import template_of
    from ..runtime.engine import Engine
    from ..runtime.store import AdapterStore
    from .limits import Limits
    from .service import Service

    tokenizer = load_tokenizer(options.base)
    model: Any = load_model(options.base, **({} if options.dtype is None else {"dtype": options.dtype})).eval()
    store = AdapterStore(model, base=options.served_name, capacity_bytes=int(options.adapter_memory * 2**30))
    ends = end_tokens(model, tokenizer)
    engine = Engine(model, store, eos=ends, max_batch=options.max_batch, max_context=options.max_context)
    limits = Limits(options.max_tokens, max_running=options.max_batch, max_queue=options.max_queue, max_body=options.max_body)
    service = Service(
        engine,
        tokenizer,
        options.served_name,
        vocabulary=model.get_input_embeddings().num_embeddings,
        limits=limits,
        keys=options.api_key or (),
        adapter_root=options.adapter_root,
    )
    for name, path in adapters.items():
        service.add(name, adapter_of(path)[0], template_of(path))
    engine.start()
    return service


def _check(options: Options, adapters: Mapping[str, Path]) -> None:
    from .limits import Keys

    if options.engine not in ENGINES:
        raise ValueError(f"--engine {options.engine!r}: give one of {', '.join(ENGINES)}")
    default = Options(options.base)
    given = [name for name in ENGINES[options.engine].no_effect if getattr(options, name) != getattr(default, name)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--engine {options.engine}: {flags} without effect there")
    Keys(options.api_key or ())
    if options.served_name in adapters:
        raise ValueError(f"--adapter: {options.served_name!r} is the base's name; name the adapter differently, or give --name")
    if options.adapter_root is not None and not options.adapter_root.is_dir():
        raise ValueError(f"--adapter-root {str(options.adapter_root)!r}: there is no such folder")
    if options.adapter_memory <= 0:
        raise ValueError("--adapter-memory: give more than 0 GiB")
