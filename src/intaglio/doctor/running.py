"""The command line of a server, read for what decides which adapters it serves."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from dataclasses import dataclass, field

__all__ = ["Running", "parse"]

_VARIABLE = re.compile(r"([A-Z_][A-Z0-9_]*)=(.*)")


@dataclass(frozen=True)
class Running:
    """What a server was started with.

    Attributes:
        model: the base, as given.
        enabled: whether adapters are switched on.
        max_rank: its greatest rank; None where the engine finds it by itself.
        targets: projections that take adapters; None for all.
        adapters: name → path of those given at the start.
        resolver: folder that adapters are looked up in by name, or None.
        loads: whether adapters can be loaded while it runs.
        caches: whether prompts are cached.
    """

    model: str | None
    enabled: bool
    max_rank: int | None
    targets: frozenset[str] | None
    adapters: dict[str, str] = field(default_factory=dict)
    resolver: str | None = None
    loads: bool = False
    caches: bool = True


def parse(command: str, engine: str) -> Running:
    """Read the command line of a vLLM or SGLang server, with the variables set before it.

    Raises:
        ValueError: where it is no command line, or of an engine whose command line is not read.

    Example:
        >>> parse("vllm serve base --enable-lora --max-lora-rank 64", "vllm").max_rank
        64
    """
    if engine not in ("vllm", "sglang"):
        raise ValueError(f"command: the command line of {engine} is not read; give it with --engine vllm or sglang")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"command={command!r}: no command line ({error})") from error
    words = [re.sub(r"^--\w+", lambda flag: flag[0].replace("_", "-"), word) for word in words]  # the engines take either
    variables = {}
    while words and (match := _VARIABLE.fullmatch(words[0])):
        variables[match[1]] = match[2]
        words = words[1:]
    if not words:
        raise ValueError(f"command={command!r}: names no program")
    try:
        known, rest = _parser(engine).parse_known_args(words)
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"command={command!r}: {error}") from error
    positional = rest[rest.index("serve") + 1 :] if "serve" in rest else []
    model = known.model or next((word for word in positional if not word.startswith("-")), None)
    return Running(
        model,
        known.enable_lora or (engine == "sglang" and bool(known.adapters)),
        known.max_lora_rank if engine == "sglang" else known.max_lora_rank or 16,
        frozenset(known.targets) if known.targets else None,
        dict(_pair(given) for given in known.adapters),
        variables.get("VLLM_LORA_RESOLVER_CACHE_DIR") if engine == "vllm" else None,
        engine == "sglang" or variables.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() in ("1", "true"),
        known.caches,
    )


def _parser(engine: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model", "--model-path", dest="model")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int)
    parser.add_argument("--lora-target-modules", nargs="*", dest="targets")
    parser.add_argument("--lora-modules", "--lora-paths", nargs="*", default=[], dest="adapters")
    parser.add_argument("--no-enable-prefix-caching", "--disable-radix-cache", action="store_false", dest="caches")
    return parser


def _pair(given: str) -> tuple[str, str]:
    """Name and path of `name=path`, or of JSON with both, or of a path alone."""
    if given.startswith("{"):
        fields = json.loads(given)
        return fields.get("name") or fields.get("lora_name"), fields.get("path") or fields.get("lora_path")
    name, _, path = given.rpartition("=")
    return name or path, path
