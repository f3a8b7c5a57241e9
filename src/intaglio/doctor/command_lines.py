"""Command lines of serving engines: how each is written, read, and told of a new adapter while it runs."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..vllm_plugin.plugin import NAME, PLUGINS, SWITCH, TESTED, refusal, setting

__all__ = ["LLAMA_CPP", "LORAX", "SGLANG", "VLLM", "Dialect", "OnCpu", "Running", "Start", "shell"]

_VARIABLE = re.compile(r"([A-Z_][A-Z0-9_]*)=(.*)")


@dataclass(frozen=True)
class Start:
    """A server that is to be started: its base, its adapters, and what they need of it.

    Attributes:
        base: folder or hub name of the base.
        adapters: name → folder or file of each, as the engine loads it.
        rank: the greatest rank of a slot.
        targets: projections that take adapters.
        slots: adapters in one batch.
        dtype: of the base; None leaves it to the engine, and engines cast a float32 base to 16 bits.
        python: the interpreter that runs the engine; None for the engine's own command.
        served_name: what callers give as `model` for the base; default the base.
        host: address to listen on; default the engine's.
        port: port to listen on; default the engine's.
        max_context: tokens of prompt and answer; default the model's.
    """

    base: str
    adapters: Mapping[str, Path]
    rank: int
    targets: tuple[str, ...]
    slots: int
    dtype: str | None = None
    python: str | None = None
    served_name: str | None = None
    host: str | None = None
    port: int | None = None
    max_context: int | None = None

    @property
    def named(self) -> list[str]:
        """The adapters as NAME=FOLDER."""
        return [f"{name}={path}" for name, path in self.adapters.items()]


@dataclass(frozen=True)
class Running:
    """A server that runs, by what it was started with.

    Attributes:
        model: the base, as given.
        enabled: whether adapters are switched on.
        max_rank: its greatest rank; None where the engine finds it by itself.
        targets: projections that take adapters; None for all.
        adapters: name → path of those given at the start.
        variables: of its environment, set before the command.
        resolver: folder that adapters are looked up in by name, or None.
        loads: whether adapters can be loaded while it runs.
        caches: whether prompts are cached.
    """

    model: str | None
    enabled: bool
    max_rank: int | None
    targets: frozenset[str] | None
    adapters: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    resolver: str | None = None
    loads: bool = False
    caches: bool = True


@dataclass(frozen=True)
class OnCpu:
    """A fault that an engine has on a CPU, and what mends it.

    Attributes:
        fault: what it gets wrong there, and what to do.
        remedy: (version or None, environment) → the variables to start it with so that it is right; None where there are none.
    """

    fault: str
    remedy: Callable[[str | None, Mapping[str, str]], dict[str, str] | None]


@dataclass(frozen=True)
class Dialect:
    """The language in which one engine is told what to serve.

    Attributes:
        write: the words of the command line of a server that is to be started.
        parse: (words of a command line, variables before it) → the server that it starts; None where nobody reads it.
        load_path: where a running server takes new adapters; None where it takes none.
        load_switch: variable that has to be 1 before it takes them, or None.
        on_cpu: what is wrong with it on a CPU, or None.
    """

    write: Callable[[Start], list[str]]
    parse: Callable[[list[str], Mapping[str, str]], Running] | None = None
    load_path: str | None = None
    load_switch: str | None = None
    on_cpu: OnCpu | None = None

    def read(self, command: str) -> Running:
        """The server that a command line starts, with the variables set before it.

        Raises:
            ValueError: where it is no command line.

        Example:
            >>> VLLM.read("vllm serve base --enable-lora --max-lora-rank 64").max_rank
            64
        """
        assert self.parse is not None
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"command={command!r}: no command line ({error})") from error
        variables = {}
        while words and (match := _VARIABLE.fullmatch(words[0])):
            variables[match[1]] = match[2]
            words = words[1:]
        if not words:
            raise ValueError(f"command={command!r}: names no program")
        try:
            return self.parse(words, variables)
        except (argparse.ArgumentError, ValueError) as error:
            raise ValueError(f"command={command!r}: {error}") from error

    def load(self, name: str, path: Path) -> str:
        """The request with which a running server loads an adapter."""
        body = json.dumps({"lora_name": name, "lora_path": str(path.resolve())})
        url = f"http://localhost:PORT{self.load_path}"
        return shlex.join(["curl", url, "-H", "Content-Type: application/json", "-d", body])


def shell(words: list[str], variables: Mapping[str, str]) -> str:
    """A command as a shell takes it, with the variables of its environment before it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(words)])


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Flags with their values, without those that are None."""
    return [word for flag, value in values.items() if value is not None for word in (flag, str(value))]


def _vllm(start: Start) -> list[str]:
    """Source: vLLM 0.32, `python -m vllm.entrypoints.openai.api_server --help`."""
    own = ["vllm", "serve", start.base]
    words = own if start.python is None else [start.python, "-m", "vllm.entrypoints.openai.api_server", "--model", start.base]
    words += _flags({"--served-model-name": start.served_name, "--host": start.host, "--port": start.port})
    words += _flags({"--dtype": start.dtype, "--max-model-len": start.max_context})
    kept = len(start.adapters) if len(start.adapters) > start.slots else None
    words += ["--enable-lora", *_flags({"--max-loras": start.slots, "--max-cpu-loras": kept, "--max-lora-rank": start.rank})]
    return [*words, "--lora-target-modules", *start.targets, "--lora-modules", *start.named]


def _sglang(start: Start) -> list[str]:
    words = ["python", "-m", "sglang.launch_server", *_flags({"--model-path": start.base, "--dtype": start.dtype})]
    words += ["--enable-lora", *_flags({"--max-loras-per-batch": start.slots, "--max-lora-rank": start.rank})]
    return [*words, "--lora-target-modules", *start.targets, "--lora-paths", *start.named]


def _llama_cpp(start: Start) -> list[str]:
    # Without the first flag all adapters given are added at once.
    words = ["llama-server", "-m", "BASE.gguf", *(["--lora-init-without-apply"] if len(start.adapters) > 1 else [])]
    return [*words, *(word for path in start.adapters.values() for word in ("--lora", str(path)))]


def _known(words: list[str]) -> dict[str, Any]:
    """What vLLM's and SGLang's flags say alike of a server, by field of `Running`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model", "--model-path", dest="model")
    parser.add_argument("--enable-lora", action="store_true", dest="enabled")
    parser.add_argument("--max-lora-rank", type=int, dest="max_rank")
    parser.add_argument("--lora-target-modules", nargs="*", dest="targets")
    parser.add_argument("--lora-modules", "--lora-paths", nargs="*", default=[], dest="adapters")
    parser.add_argument("--no-enable-prefix-caching", "--disable-radix-cache", action="store_false", dest="caches")
    words = [re.sub(r"^--\w+", lambda flag: flag[0].replace("_", "-"), word) for word in words]  # the engines take either
    known, rest = parser.parse_known_args(words)
    positional = rest[rest.index("serve") + 1 :] if "serve" in rest else []
    known.model = known.model or next((word for word in positional if not word.startswith("-")), None)
    known.targets = frozenset(known.targets) if known.targets else None
    known.adapters = dict(_pair(given) for given in known.adapters)
    return vars(known)


def _pair(given: str) -> tuple[str, str]:
    """Name and path of `name=path`, or of JSON with both, or of a path alone."""
    if given.startswith("{"):
        fields = json.loads(given)
        return fields.get("name") or fields.get("lora_name"), fields.get("path") or fields.get("lora_path")
    name, _, path = given.rpartition("=")
    return name or path, path


_VLLM_LOADS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def _read_vllm(words: list[str], variables: Mapping[str, str]) -> Running:
    known = _known(words)
    known["max_rank"] = known["max_rank"] or 16
    loads = variables.get(_VLLM_LOADS, "").lower() in ("1", "true")
    return Running(**known, variables=variables, resolver=variables.get("VLLM_LORA_RESOLVER_CACHE_DIR"), loads=loads)


def _read_sglang(words: list[str], variables: Mapping[str, str]) -> Running:
    known = _known(words)
    known["enabled"] = known["enabled"] or bool(known["adapters"])
    return Running(**known, variables=variables, loads=True)


def _vllm_plugin(version: str | None, environment: Mapping[str, str]) -> dict[str, str] | None:
    """The variables with which our plugin acts in this vLLM: those that ask for it already, else ours; None where it cannot."""
    import importlib.metadata  # here, since --help reads this file

    asked = {name: environment[name] for name in (SWITCH, PLUGINS) if name in environment} or {SWITCH: "1"}
    installed = any(point.value.startswith("intaglio") for point in importlib.metadata.entry_points(group="vllm.general_plugins"))
    named = PLUGINS not in asked or NAME in asked[PLUGINS].split(",")  # else vLLM does not even call it
    acts = installed and named and setting(asked) != "0" and refusal(setting(asked), version or TESTED[0]) is None
    return asked if acts else None


VLLM = Dialect(
    _vllm,
    _read_vllm,
    load_path="/v1/load_lora_adapter",
    load_switch=_VLLM_LOADS,
    on_cpu=OnCpu(
        "answers requests for the base with the adapter in its last slot where both are in one batch (vllm#48421); install "
        f"Intaglio beside a vLLM that its plugin is made for and start that with {SWITCH}=1 (docs/vllm.md), or use a GPU",
        _vllm_plugin,
    ),
)
SGLANG = Dialect(_sglang, _read_sglang, load_path="/load_lora_adapter")
LLAMA_CPP = Dialect(_llama_cpp)
LORAX = Dialect(lambda start: ["lorax-launcher", "--model-id", start.base, "--adapter-source", "local"])
