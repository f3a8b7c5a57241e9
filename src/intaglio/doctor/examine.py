"""The examination: how an engine is to be started so that it serves given adapters rightly, or why it would not."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

from ..export.gguf import FILE
from ..hf.models import EMBEDDED, Outline, model_path, outline
from .candidates import Candidate, projection, read
from .checks import Plan, exported, reasons
from .command_lines import Start, shell
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
        run `first`; `command`, or the requests that `load` into a running server; the `environment` that the command needs;
        rank, targets, slots, slot_bytes, bytes; cautions), refused (whether none of them serves all).

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
    server = chosen[0].dialect.read(command) if command else None
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
    chosen = [ENGINES[engine]] if engine else list(ENGINES.values())
    if version is not None and chosen[0].oldest is None:
        raise ValueError(f"engine-version={version!r}: has no effect with {engine}, of whose versions nothing is known to differ")
    if device is not None and not any(one.dialect.on_cpu for one in chosen):
        able = " or ".join(name for name, one in ENGINES.items() if one.dialect.on_cpu)
        raise ValueError(f"device={device!r}: has no effect with {engine}, only with {able}")
    if command is not None and chosen[0].dialect.parse is None:
        able = " or ".join(name for name, one in ENGINES.items() if one.dialect.parse)
        raise ValueError(f"command: the command line of {engine} is not read; give it with --engine {able}")
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
    refused, environment = _installation(plan, version, device)
    first, ready = [], []
    for adapter in candidates:
        served, steps = exported(adapter, plan)
        refused += reasons(served, plan)
        ready.append(served)
        first += [step for step in steps if step not in first]  # two names of one folder
    refused += _together(candidates)
    if refused:
        return {"refused": refused, "first": [], "command": None, "cautions": []}
    cautions = [*plan.engine.cautions, *_cautions(ready, plan)]
    return {"refused": [], "first": first, **_settings(ready, plan, slots, environment), "cautions": cautions}


def _installation(plan: Plan, version: str | None, device: str | None) -> tuple[list[str], dict[str, str]]:
    """Why the engine, as it is installed or said to be, serves no adapter rightly; and the variables that it has to be given."""
    from packaging.version import InvalidVersion, Version

    engine, running, (package, installed) = plan.engine, plan.running, _installed(plan.engine)
    found, trouble, refused = version or installed, engine.dialect.on_cpu, []
    try:
        if engine.oldest and found and Version(found) < Version(engine.oldest):
            refused.append(f"{engine.name} {found}: before {engine.oldest} it {engine.older}; upgrade it")
    except InvalidVersion as error:
        raise ValueError(f"engine-version={version!r}: no version number, such as {engine.oldest or '1.0'}") from error
    cpu = device == "cpu" or (device is None and ((package or "").endswith("-cpu") or "+cpu" in (installed or "")))
    if trouble is None or not cpu:
        return refused, {}
    variables = trouble.remedy(found, os.environ if running is None else running.variables)
    if variables is None or (running is not None and not variables.items() <= running.variables.items()):
        return [*refused, f"{engine.name} on a CPU {trouble.fault}"], {}
    return refused, variables


def _installed(engine: Engine) -> tuple[str | None, str | None]:
    """(package, version) of the installed engine; None where it is not."""
    for package in engine.packages:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None, None


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
    engine, running, found = plan.engine, plan.running, []
    if engine.fast_rank is not None and max(adapter.rank for adapter in ready) > engine.fast_rank:
        found.append(f"ranks above {engine.fast_rank} leave {engine.name}'s fast kernels")
    others = sorted({adapter.base or "none" for adapter in ready if adapter.base != plan.base and not adapter.planned})
    if plan.base and others:
        found.append(f"adapters name {', '.join(others)} as their base: see that {plan.base!r} holds the same weights")
    loads = running is None or running.loads or running.resolver is not None
    if running is not None and not loads and {adapter.name for adapter in ready} - running.adapters.keys():
        switch = engine.dialect.load_switch
        found.append(f"the server loads no adapters while it runs: start it with {f'{switch}=1' if switch else 'all of them'}")
    return [*found, *(engine.cautions_for_several if len(ready) > 1 else ())]


def _settings(ready: list[Candidate], plan: Plan, slots: int | None, environment: dict[str, str]) -> dict[str, Any]:
    """The engine's command line, and what its slots take."""
    engine = plan.engine
    needed = max(adapter.rank for adapter in ready)
    rank = needed if engine.ranks is None else next(known for known in engine.ranks if known >= needed)
    wanted = (slots or min(len(ready), _SLOTS)) + engine.base_slots
    targets = sorted({name for adapter in ready for name in adapter.projections}) if engine.form == "lora" else []
    dtype = next((adapter.dtype for adapter in ready if adapter.dtype), None)
    figures: dict[str, Any] = {"environment": environment, "rank": rank, "targets": targets, "slots": wanted, "dtype": dtype}
    if plan.outline is not None and engine.equal_slots:
        figures["slot_bytes"] = slot_bytes(plan.outline, set(targets), rank, engine)
        figures["bytes"] = figures["slot_bytes"] * wanted
    if plan.running is not None:
        requests = [engine.dialect.load(adapter.name, adapter.path) for adapter in ready if engine.dialect.load_path]
        return {"command": None, "load": requests, **figures}
    base = model_path(plan.base) if plan.base in EMBEDDED else plan.base or "BASE"  # a name of ours means nothing to engines
    loaded = {adapter.name: adapter.path / FILE if engine.form == "gguf" else adapter.path for adapter in ready}
    start = Start(base, loaded, rank, tuple(targets), wanted, dtype)
    return {"command": shell(engine.dialect.write(start), environment), **figures}


def slot_bytes(base: Outline, targets: set[str], rank: int, engine: Engine) -> int:
    """Memory of one adapter slot: rank · (inputs + outputs) of every layer that takes adapters, in the base's type."""
    wrapped = targets | {name for group in engine.fused.values() if targets & set(group) for name in group}
    widths = sum(sum(shape) for path, shape in base.linear.items() if projection(path) in wrapped)
    return rank * widths * base.bytes_per_weight


def _describe(adapter: Candidate) -> dict[str, Any]:
    rank = adapter.rank if adapter.modules else None
    names = sorted(adapter.projections) if adapter.form != "gguf" else sorted(adapter.modules)
    shown = {"name": adapter.name, "path": str(adapter.path), "form": adapter.form, "base": adapter.base, "rank": rank}
    return {**shown, "modules": len(adapter.modules), "projections": names}
