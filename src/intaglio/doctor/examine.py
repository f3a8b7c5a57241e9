"""Say how an engine is to be started so that it serves given adapters rightly, or why it would not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

from ..hf.models import EMBEDDED, Outline, model_path, outline
from . import running as command_lines
from .candidates import Candidate, projection, read
from .checks import Plan, exported, reasons
from .engines import ENGINES, Engine

__all__ = ["DEVICES", "examine"]

DEVICES = ("gpu", "cpu")
_SLOTS = 8  # adapters in a batch, where there are more


def examine(
    adapters: Sequence[str],
    engine: str | None = None,
    *,
    base: str | None = None,
    slots: int | None = None,
    command: str | None = None,
    version: str | None = None,
    device: str | None = None,
    reload: bool = False,
) -> dict[str, Any]:
    """Check adapters against one engine, or all of `ENGINES`.

    Args:
        adapters: folders, or NAME=FOLDER: Delta folders, PEFT LoRA folders, folders of a GGUF LoRA, finished runs.
        engine: a key of `ENGINES`; default all of them.
        base: the base model; default the one that the adapters name.
        slots: how many adapters may be in one batch; default all of them, at most 8.
        command: the command line of a server that runs already, to check the adapters against.
        version: of the engine; default the installed one, if it is.
        device: "gpu" or "cpu"; default what the installed engine is built for.
        reload: whether the adapters' weights changed since the server loaded them.

    Returns:
        base, adapters (name, path, form, rank, modules, base), engines (by name: the reasons why it is `refused`; commands to
        run `first`; `command`, or the requests that `load` into a running server; rank, targets, slots, slot_bytes, bytes;
        cautions), refused (whether none of them serves all).

    Raises:
        ValueError: for a bad argument, or a folder that is no adapter.

    Example:
        >>> examine(["exports/demo-lora"], "vllm")["engines"]["vllm"]["rank"]
        64
    """
    _check(engine, slots, command, version, device, reload)
    candidates = read(adapters)
    named = base or next((adapter.base for adapter in candidates if adapter.base), None)
    shapes, missing = _outline(named, given=base is not None)
    chosen = [ENGINES[engine]] if engine else list(ENGINES.values())
    server = command_lines.parse(command, chosen[0].name) if command else None
    found = {}
    for one in chosen:
        plan = Plan(one, named, shapes, server, reload)
        found[one.name] = _one(candidates, plan, slots, version, device)
        found[one.name]["cautions"] += missing
    described = [_describe(adapter) for adapter in candidates]
    return {"base": named, "adapters": described, "engines": found, "refused": all(one["refused"] for one in found.values())}


def _check(
    engine: str | None, slots: int | None, command: str | None, version: str | None, device: str | None, reload: bool
) -> None:
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: give one of {', '.join(ENGINES)}, or none for all of them")
    given = {"command": command, "engine-version": version}
    if engine is None and (alone := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"{alone[0]}={given[alone[0]]!r}: say with --engine whose it is")
    if version is not None and engine is not None and ENGINES[engine].oldest is None:
        raise ValueError(f"engine-version={version!r}: has no effect with {engine}, of whose versions nothing is known to differ")
    if device is not None and engine not in (None, "vllm"):
        raise ValueError(f"device={device!r}: has no effect with {engine}, only with vllm")
    if slots is not None and slots < 1:
        raise ValueError(f"slots={slots}: give at least 1")
    if device is not None and device not in DEVICES:
        raise ValueError(f"device={device!r}: give one of {', '.join(DEVICES)}")
    if reload and command is None:
        raise ValueError("reload: has an effect only with --command, which says what is served already")


def _outline(base: str | None, *, given: bool) -> tuple[Outline | None, list[str]]:
    """The base's shapes, and a caution where its config is not at hand; one that was asked for must be."""
    if base is None:
        return None, ["the adapters name no base: give --base, to check their layers and to compute memory"]
    try:
        return outline(base), []
    except ValueError as error:
        if given:
            raise
        return None, [f"layers and memory are not checked: the base's config is not at hand ({error})"]


def _one(candidates: list[Candidate], plan: Plan, slots: int | None, version: str | None, device: str | None) -> dict[str, Any]:
    """What one engine makes of the adapters."""
    refused, first, ready = _refused_engine(plan.engine, version, device), [], []
    for adapter in candidates:
        served, steps = exported(adapter, plan)
        refused += reasons(served, plan)
        ready.append(served)
        first += [step for step in steps if step not in first]  # two names of one folder
    refused += _together(candidates)
    cautions = [*plan.engine.cautions, *_cautions(ready, plan)]
    if refused:
        return {"refused": refused, "first": [], "command": None, "cautions": []}
    return {"refused": [], "first": first, **_settings(ready, plan, slots), "cautions": cautions}


def _refused_engine(engine: Engine, version: str | None, device: str | None) -> list[str]:
    """Why no adapter is served rightly by this engine, as it is installed or said to be."""
    from packaging.version import InvalidVersion, Version

    package, installed = _installed(engine)
    found = version or installed
    refused = []
    try:
        if engine.oldest and found and Version(found) < Version(engine.oldest):
            refused.append(
                f"{engine.name} {found}: before {engine.oldest} it may answer a running request with another adapter when one is "
                "loaded, and does not read rank patterns; upgrade it"
            )
    except InvalidVersion as error:
        raise ValueError(f"engine-version={version!r}: no version number, such as {engine.oldest or '1.0'}") from error
    cpu = device == "cpu" or (device is None and ((package or "").endswith("-cpu") or "+cpu" in (installed or "")))
    if engine.name == "vllm" and cpu and not _has_plugin(found):
        refused.append(
            "vllm on a CPU answers requests for the base with the adapter in its last slot where both are in one batch "
            "(vllm#48421); install Intaglio beside a vLLM that its plugin is made for (docs/vllm.md), or use a GPU"
        )
    return refused


def _installed(engine: Engine) -> tuple[str | None, str | None]:
    """(package, version) of the installed engine; None where it is not."""
    for package in engine.packages:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None, None


def _has_plugin(version: str | None) -> bool:
    """Whether our plugin is among vLLM's, and acts with this version."""
    from ..vllm_plugin.plugin import SWITCH, TESTED, refusal

    setting = os.environ.get(SWITCH, "1")
    there = any(point.value.startswith("intaglio") for point in importlib.metadata.entry_points(group="vllm.general_plugins"))
    return there and setting != "0" and refusal(setting, version or TESTED[0]) is None


def _together(candidates: list[Candidate]) -> list[str]:
    """Why the adapters cannot be served by one server."""
    bases = sorted({adapter.base for adapter in candidates if adapter.base})
    if len(bases) > 1:
        return [f"the adapters are for different bases ({', '.join(bases)}): one server has one; start one for each"]
    dtypes = sorted({adapter.dtype for adapter in candidates if adapter.dtype})
    if len(dtypes) > 1:
        return [f"the adapters need the base in different types ({', '.join(dtypes)}): one server has one; start one for each"]
    return []


def _cautions(ready: list[Candidate], plan: Plan) -> list[str]:
    found = []
    fast = plan.engine.fast_rank
    if fast is not None and max(adapter.rank for adapter in ready) > fast:
        found.append(f"ranks above {fast} leave {plan.engine.name}'s fast kernels")
    others = sorted({adapter.base or "none" for adapter in ready if adapter.base != plan.base and not adapter.planned})
    if plan.base and others:
        found.append(f"adapters name {', '.join(others)} as their base: see that {plan.base!r} holds the same weights")
    running = plan.running
    if (
        running is not None
        and not running.loads
        and running.resolver is None
        and {a.name for a in ready} - running.adapters.keys()
    ):
        found.append("the server loads no adapters while it runs: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
    if not plan.engine.mixes and len(ready) > 1:
        found.append('adapters are off until a request names one: "lora": [{"id": 0, "scale": 1}] is the first of them')
    return found


def _settings(ready: list[Candidate], plan: Plan, slots: int | None) -> dict[str, Any]:
    """The engine's command line, and what its slots take."""
    engine = plan.engine
    needed = max(adapter.rank for adapter in ready)
    rank = needed if engine.ranks is None else next(known for known in engine.ranks if known >= needed)
    wanted = (slots or min(len(ready), _SLOTS)) + engine.base_slots
    targets = sorted({name for adapter in ready for name in adapter.projections}) if engine.form == "lora" else []
    dtype = next((adapter.dtype for adapter in ready if adapter.dtype), None)
    figures: dict[str, Any] = {"rank": rank, "targets": targets, "slots": wanted, "dtype": dtype}
    if plan.outline is not None and engine.name in ("vllm", "sglang"):
        figures["slot_bytes"] = slot_bytes(plan.outline, set(targets), rank, engine)
        figures["bytes"] = figures["slot_bytes"] * wanted
    if plan.running is not None:
        return {"command": None, "load": [_load(adapter, engine) for adapter in ready], **figures}
    base = model_path(plan.base) if plan.base in EMBEDDED else plan.base or "BASE"  # a name of ours means nothing to engines
    return {"command": _COMMANDS[engine.name](ready, base, figures), **figures}


def _load(adapter: Candidate, engine: Engine) -> str:
    """The request with which a running server loads an adapter."""
    body = json.dumps({"lora_name": adapter.name, "lora_path": str(adapter.path.resolve())})
    path = "/v1/load_lora_adapter" if engine.name == "vllm" else "/load_lora_adapter"
    return shlex.join(["curl", f"http://localhost:PORT{path}", "-H", "Content-Type: application/json", "-d", body])


def slot_bytes(base: Outline, targets: set[str], rank: int, engine: Engine) -> int:
    """Memory of one adapter slot: rank · (inputs + outputs) of every layer that takes adapters, in the base's type."""
    wrapped = targets | {name for group in engine.fused if targets & set(group) for name in group}
    widths = sum(sum(shape) for path, shape in base.linear.items() if projection(path) in wrapped)
    return rank * widths * base.bytes_per_weight


def _vllm(ready: list[Candidate], base: str, figures: dict[str, Any]) -> str:
    words = ["vllm", "serve", base, *_typed(figures), "--enable-lora", "--max-loras", str(figures["slots"])]
    if len(ready) > figures["slots"]:
        words += ["--max-cpu-loras", str(len(ready))]
    words += ["--max-lora-rank", str(figures["rank"]), "--lora-target-modules", *figures["targets"]]
    return shlex.join([*words, "--lora-modules", *_named(ready)])


def _typed(figures: dict[str, Any]) -> list[str]:
    # Left to themselves, engines cast a float32 base to 16 bits.
    return ["--dtype", figures["dtype"]] if figures["dtype"] else []


def _sglang(ready: list[Candidate], base: str, figures: dict[str, Any]) -> str:
    words = ["python", "-m", "sglang.launch_server", "--model-path", base, *_typed(figures), "--enable-lora"]
    words += ["--max-loras-per-batch", str(figures["slots"]), "--max-lora-rank", str(figures["rank"])]
    return shlex.join([*words, "--lora-target-modules", *figures["targets"], "--lora-paths", *_named(ready)])


def _llama_cpp(ready: list[Candidate], base: str, figures: dict[str, Any]) -> str:
    # Without the first flag all adapters given are added at once.
    words = ["llama-server", "-m", "BASE.gguf", *(["--lora-init-without-apply"] if len(ready) > 1 else [])]
    return shlex.join([*words, *(word for adapter in ready for word in ("--lora", f"{adapter.path}/adapter.gguf"))])


def _lorax(ready: list[Candidate], base: str, figures: dict[str, Any]) -> str:
    return shlex.join(["lorax-launcher", "--model-id", base, "--adapter-source", "local"])


def _named(ready: list[Candidate]) -> list[str]:
    return [f"{adapter.name}={adapter.path}" for adapter in ready]


_COMMANDS = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "lorax": _lorax}


def _describe(adapter: Candidate) -> dict[str, Any]:
    rank = adapter.rank if adapter.modules else None
    names = sorted(adapter.projections) if adapter.form != "gguf" else sorted(adapter.modules)
    shown = {"name": adapter.name, "path": str(adapter.path), "form": adapter.form, "base": adapter.base, "rank": rank}
    return {**shown, "modules": len(adapter.modules), "projections": names}
