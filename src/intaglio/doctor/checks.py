"""Checks of what goes wrong when an engine serves an adapter. Each gives reasons; none means that it is right."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapter.names import RANKS
from ..export.gguf import ARCHITECTURES, FILE
from ..hf.models import Outline
from .candidates import Candidate, projection
from .command_lines import Running
from .engines import FEATURES, Engine

__all__ = ["Plan", "exported", "reasons"]

_HARMLESS = (None, False, "none", [], {}, ())
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Plan:
    """The engine, base and server that adapters are checked against.

    Attributes:
        engine: the engine.
        base: name of the base model, or None.
        outline: its shapes, or None where its config is not at hand.
        running: the server that runs already, if its command line was given.
        reload: whether the adapters' weights changed since the server loaded them.
    """

    engine: Engine
    base: str | None
    outline: Outline | None
    running: Running | None = None
    reload: bool = False


def reasons(adapter: Candidate, plan: Plan) -> list[str]:
    """Why the engine would not serve this adapter rightly; empty where it would."""
    checks = _GGUF if plan.engine.form == "gguf" else _LORA
    return [f"{adapter.name}: {reason}" for check in checks for reason in check(adapter, plan)]


def exported(adapter: Candidate, plan: Plan) -> tuple[Candidate, list[str]]:
    """The adapter in the form that the engine loads, and the commands that write it; itself where there is none to run.

    What no export holds stays as it is; `reasons` says why.
    """
    base = ["--base", plan.base] if plan.base and plan.base != adapter.base else []
    if adapter.form == "delta" and not adapter.other:
        return _as_gguf(adapter, base) if plan.engine.form == "gguf" else _as_lora(adapter, plan, base)
    if adapter.form == "lora" and plan.engine.form == "gguf":
        return _converted(adapter, base)
    return adapter, []


def _as_gguf(adapter: Candidate, base: list[str]) -> tuple[Candidate, list[str]]:
    target = Path(f"{adapter.path}-gguf")
    step = ["intaglio", "export", str(adapter.path), "--to", "gguf", "--output", str(target), *base]
    return replace(adapter, form="gguf", path=target, config={}, planned=True), [shlex.join(step)]


def _as_lora(adapter: Candidate, plan: Plan, base: list[str]) -> tuple[Candidate, list[str]]:
    fitting = [rank for rank in RANKS if rank >= adapter.rank]
    if not fitting:
        return adapter, []
    fill = not plan.engine.partial and (plan.outline is None or bool(_lacking(adapter, plan.outline)))
    target = Path(f"{adapter.path}-lora")
    step = ["intaglio", "export", str(adapter.path), "--to", "lora", *(["--fill-layers"] if fill else [])]
    step += ["--output", str(target), *base]
    modules = {path: replace(module, rank=fitting[0]) for path, module in adapter.modules.items()}
    config = {"r": fitting[0], "lora_alpha": fitting[0]}
    return replace(adapter, form="lora", path=target, modules=modules, config=config, planned=True), [shlex.join(step)]


def _converted(adapter: Candidate, base: list[str]) -> tuple[Candidate, list[str]]:
    """Our own LoRA goes back through the adapter it came from; any other through llama.cpp's converter."""
    target = Path(f"{adapter.path}-gguf")
    if not adapter.exported:
        step = ["python", "convert_lora_to_gguf.py", str(adapter.path), "--outfile", f"{target}/{FILE}"]
        return replace(adapter, path=target), [shlex.join(step)]
    back = f"{adapter.path}-delta"
    steps = [["intaglio", "export", str(adapter.path), "--to", "delta", "--output", back, *base]]
    steps.append(["intaglio", "export", back, "--to", "gguf", "--output", str(target), *base])
    return replace(adapter, form="gguf", path=target, config={}, planned=True), [shlex.join(step) for step in steps]


def _form(adapter: Candidate, plan: Plan) -> Iterator[str]:
    if adapter.form == "gguf" and plan.engine.form != "gguf":
        yield f"a GGUF LoRA, which {plan.engine.name} does not load; export the adapter with --to lora"
    if adapter.form == "delta" and adapter.other:
        first, more = adapter.other[0], len(adapter.other) - 1
        rest = f" and {more} more" if more else ""
        yield (
            f"holds {first}{rest}, which no LoRA holds exactly; intaglio export --to approximate-lora measures what "
            "is lost, --to merged makes a model of its own"
        )
    elif adapter.form == "delta":
        widest = max(adapter.modules, key=lambda path: adapter.modules[path].rank)
        yield (
            f"{widest} has {adapter.rank} chosen slices, which needs that rank; the export takes at most {RANKS[-1]}, as vLLM: "
            "train fewer units of it, or export with --to approximate-lora or --to merged"
        )


def _features(adapter: Candidate, plan: Plan) -> Iterator[str]:
    found = [name for name in FEATURES if _holds(adapter, name, plan.engine)]
    for name in found:
        value, verb = adapter.config[name], plan.engine.features[name]
        holds = f"{name}={value!r}: holds {FEATURES[name]}"
        yield f"{holds}, which {plan.engine.name} {verb}: it would not serve the trained model"
    if adapter.form == "lora" and adapter.other and not found:
        yield f"holds {adapter.other[0]}, which is no factor of a LoRA: {plan.engine.name} would serve something else"
    if adapter.config.get("use_rslora") and not plan.engine.rslora:
        yield f"use_rslora: {plan.engine.name} scales by alpha / r all the same, not by alpha / √r"


def _holds(adapter: Candidate, feature: str, engine: Engine) -> bool:
    """Whether an adapter has a feature that the engine does not compute."""
    value = adapter.config.get(feature)
    if feature not in engine.features or value in _HARMLESS:
        return False
    if feature == "init_lora_weights":
        return value is not True and value not in _PLAIN_STARTS
    return not (feature == "modules_to_save" and set(value) <= set(engine.heads))


def _patterns(adapter: Candidate, plan: Plan) -> Iterator[str]:
    config = adapter.config
    ranks = {k: v for k, v in (config.get("rank_pattern") or {}).items() if v != config.get("r")}
    alphas = {k: v for k, v in (config.get("alpha_pattern") or {}).items() if v != config.get("lora_alpha")}
    odd = [path for path, m in adapter.modules.items() if adapter.form == "lora" and m.rank != _configured(ranks, config, path)]
    if odd:
        found = adapter.modules[odd[0]].rank
        yield f"{odd[0]} has rank {found}, its config says {_configured(ranks, config, odd[0])}: damaged, PEFT refuses it too"
    if not plan.engine.patterns and (ranks or alphas):
        which = " and ".join(name for name, p in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if p)
        yield f"has {which}, which {plan.engine.name} does not read: it fails or scales wrongly; export without --ragged"


def _configured(ranks: Mapping[str, int], config: Mapping[str, Any], path: str) -> int:
    keys = (key for key in ranks if re.fullmatch(rf"(.*\.)?({key})", path))
    return next((ranks[key] for key in keys), config["r"])


def _ceiling(adapter: Candidate, plan: Plan) -> Iterator[str]:
    most = plan.engine.max_rank
    if adapter.form == "lora" and most is not None and adapter.rank > most:
        yield f"rank {adapter.rank} is above {most}, the most that {plan.engine.name} takes"


def _layers(adapter: Candidate, plan: Plan) -> Iterator[str]:
    if adapter.form != "lora" or plan.engine.partial or adapter.planned:  # the plan fills layers where it has to
        return
    if plan.outline is None:
        yield f"{plan.engine.name} drops a projection that any layer lacks, which the base's config would tell; give --base"
    elif missing := _lacking(adapter, plan.outline):
        yield (
            f"{len(missing)} layers lack a projection that others have (the first is {missing[0]}); {plan.engine.name} drops "
            "it in all layers, and serves the base: export with --fill-layers"
        )


def _lacking(adapter: Candidate, outline: Outline) -> list[str]:
    """Linear layers of the base that are called like the adapter's and that it has not."""
    return [path for path in outline.linear if projection(path) in adapter.projections and path not in adapter.modules]


def _shapes(adapter: Candidate, plan: Plan) -> Iterator[str]:
    if plan.outline is None or adapter.form == "gguf" or plan.engine.form == "gguf":
        return
    either = adapter.planned or adapter.form == "delta"  # GPT-2's layers store [in, out]
    for path, module in adapter.modules.items():
        expected, found = plan.outline.linear.get(path), (module.inputs, module.outputs)
        if expected != found and not (either and expected == found[::-1]):
            is_there = "has no such layer" if expected is None else f"maps {expected[0]} to {expected[1]}"
            yield f"{path} maps {module.inputs} values to {module.outputs}, the base {plan.base!r} {is_there}: another base"
            return


def _names(adapter: Candidate, plan: Plan) -> Iterator[str]:
    if adapter.name == plan.base:
        yield f"is called like the base {plan.base!r}: requests for the one would get the other; give NAME=FOLDER"


def _server(adapter: Candidate, plan: Plan) -> Iterator[str]:
    running, name = plan.running, plan.engine.name
    if running is None:
        return
    if not running.enabled:
        yield f"the server has no --enable-lora: {name} would refuse it"
    if running.max_rank is not None and adapter.rank > running.max_rank:
        yield f"rank {adapter.rank} is above the server's --max-lora-rank {running.max_rank}: {name} answers with an error"
    outside = set() if running.targets is None else adapter.projections - _covered(running.targets, plan.engine)
    if outside:
        yield (
            f"the server's --lora-target-modules leave out {', '.join(sorted(outside))}, which it drops without an error: "
            "requests would get the base"
        )
    if running.model and adapter.base and running.model != adapter.base:
        yield f"is for the base {adapter.base!r}, the server runs {running.model!r}"
    yield from _resolver(adapter, plan, running)


def _covered(targets: frozenset[str], engine: Engine) -> set[str]:
    """Projections that the targets name, by themselves or by what the engine fuses them to."""
    names = {projection(target) for target in targets}
    return names.union(*(engine.fused.get(name, ()) for name in names))


def _resolver(adapter: Candidate, plan: Plan, running: Running) -> Iterator[str]:
    if running.resolver is not None and adapter.base != running.model:
        yield (
            f"its base_model_name_or_path {adapter.base!r} is not the server's --model {running.model!r} to the letter: the "
            "folder resolver would answer 404; put that name into its adapter_config.json"
        )
    served = {Path(path).resolve(): name for name, path in running.adapters.items()}
    again = Path(adapter.path).resolve() in served or running.loads or running.resolver is not None
    if plan.reload and plan.engine.cached_by_path and running.caches and again:
        yield (
            f"new weights at a path that is served already ({adapter.path}): {plan.engine.name} keeps the cached prompts of the "
            "old ones; write them to a new folder, e.g. with a version in its name"
        )


def _alpha(adapter: Candidate, plan: Plan) -> Iterator[str]:
    ranks = {module.rank for module in adapter.modules.values()}
    alpha = adapter.config.get("adapter.lora.alpha", 0.0)
    if adapter.form == "gguf" and alpha and len(ranks) > 1:
        yield (
            f"modules of ranks {min(ranks)} to {max(ranks)} with one alpha of {alpha:g}: {plan.engine.name} scales each by "
            "alpha / its own rank; write it with alpha 0, as intaglio export --to gguf does"
        )


def _architecture(adapter: Candidate, plan: Plan) -> Iterator[str]:
    if plan.outline is None or plan.engine.form != "gguf":
        return
    kind = ARCHITECTURES.get(plan.outline.kind)
    found = adapter.config.get("general.architecture")
    if kind is None:
        yield f"the base is a {plan.outline.kind}, whose GGUF layout is not known here; export with --to merged and convert that"
    elif found is not None and found != kind.name:
        yield f"is a GGUF LoRA for {found}, the base is a {kind.name}"


Check = Callable[[Candidate, Plan], Iterator[str]]
_LORA: tuple[Check, ...] = (_form, _features, _patterns, _ceiling, _layers, _shapes, _names, _server)
_GGUF: tuple[Check, ...] = (_form, _features, _patterns, _alpha, _architecture, _names)
