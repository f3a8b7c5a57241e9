"""Where a PEFT adapter goes in a base model: restrictions by module, and the modules that own the parameters."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..core.entries import Entries, Slices, Whole
from ..core.scores import stable_seed
from ..core.selection import Selection
from ..methods.s2ft import S2FT
from ..model.families import ROLES
from ..model.structure import describe, is_linear, is_transposed

if TYPE_CHECKING:
    from .delta_config import DeltaConfig

__all__ = ["excluded", "matched", "other_layers", "owner", "restrict", "targeted", "unwrapped"]


def owner(parameter: str) -> str:
    """Path of the module that owns a parameter."""
    return parameter.rpartition(".")[0]


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The base model as it was before any adapter, for the length of a `with` block."""
    wrappers: dict[str, tuple[nn.Module, nn.Module]] = {}
    for path, module in model.named_modules():
        inner = _inside(module)
        if inner is not None and not any(outer in wrappers for outer in _ancestors(path)):
            wrappers[path] = module, inner
    parents = {path: (model.get_submodule(owner(path)), path.rpartition(".")[2]) for path in wrappers}
    try:
        for path, (_, inner) in wrappers.items():
            parent, name = parents[path]
            parent._modules[name] = inner
        yield model
    finally:
        for path, (wrapper, _) in wrappers.items():
            parent, name = parents[path]
            parent._modules[name] = wrapper


def matched(model: nn.Module, config: DeltaConfig) -> list[str]:
    """Modules that `target_modules` and the other restrictions name."""
    view = _view(config, config.target_modules)
    if config.target_modules == "all-linear":
        get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        names = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
        view.target_modules = sorted({name.rpartition(".")[2] for name in names})
        return [name for name in names if check_target_module_exists(view, name)]
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(view, name)]


def excluded(config: DeltaConfig, path: str) -> Any:
    """PEFT's marker where `exclude_modules` or `modules_to_save` names a module, else False."""
    return check_target_module_exists(_view(config, []), path)


def restrict(selection: Selection, config: DeltaConfig) -> Selection:
    """What `config`'s restrictions leave of a selection.

    Raises:
        ValueError: where they leave nothing although they name no target.
    """
    ends = sorted({owner(name).rpartition(".")[2] for name in selection})
    view = _view(config, ends if config.target_modules is None else config.target_modules)
    kept = {name: e for name, e in selection.items() if not owner(name) or check_target_module_exists(view, owner(name))}
    if not kept and config.target_modules is None:
        raise ValueError(
            f"exclude_modules={config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r} and "
            f"modules_to_save={config.modules_to_save!r} leave nothing of what {config.method} chooses"
        )
    return Selection(kept)


def other_layers(model: nn.Module, config: DeltaConfig) -> Selection:
    """Every parameter outside `layers_to_transform`; nothing where that is not given.

    Raises:
        ValueError: where no parameter is inside.
    """
    if config.layers_to_transform is None:
        return Selection()
    ends = sorted({owner(name).rpartition(".")[2] for name, _ in model.named_parameters()})
    view = _view(config, ends)
    view.exclude_modules = view.modules_to_save = None
    parameters = dict(model.named_parameters())
    # A path without a dot is in no layer, yet equals its own end, which PEFT takes for a match.
    inside = {name for name in parameters if "." in owner(name) and check_target_module_exists(view, owner(name))}
    if not inside:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} and layers_pattern={config.layers_pattern!r} leave nothing"
        )
    return Selection({name: Whole(tuple(p.shape)) for name, p in parameters.items() if name not in inside})


def targeted(model: nn.Module, config: DeltaConfig, method: S2FT, exclude: Selection) -> Selection:
    """S2FT in explicit modules: its units where they are projections, a share of input columns elsewhere.

    Raises:
        ValueError: for targets that match nothing, a projection without a share, or a module that is not linear.
    """
    targets = matched(model, config)
    if not targets:
        ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)})
        raise ValueError(
            f"Target modules {config.target_modules} not found in the base model; its linear layers are called {', '.join(ends)}"
        )
    roles = _roles(model, targets)
    shares = {role: getattr(method, role) if any(role in r for r in roles.values()) else None for role in ROLES}
    for path, own in roles.items():
        if all(shares[role] is None for role in own):
            wanted = " or ".join(f"{role}=…" for role in own)
            raise ValueError(f"target_modules: {path} is a projection without a share; give {wanted}, or leave it out")
    chosen: dict[str, Entries] = {}
    if roles:
        narrowed = dataclasses.replace(method, **shares)
        untouched = [
            layer for layer in describe(model) if not any(owner(p.parameter) in roles for p in layer.projections.values())
        ]
        others = {p.parameter: Whole(p.shape) for layer in untouched for p in layer.projections.values()}
        found = narrowed.choose(model, config.probe, exclude.union(others))
        chosen.update({name: entries for name, entries in found.items() if owner(name) in roles})
    for path in targets:
        if path not in roles:
            chosen |= _columns(path, model.get_submodule(path), method, exclude)
    return Selection(chosen)


def _view(config: DeltaConfig, targets: Any) -> SimpleNamespace:
    """The fields of a config that PEFT's matching reads."""
    return SimpleNamespace(
        target_modules=targets,
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )


def _inside(module: nn.Module) -> nn.Module | None:
    """The base's module inside one of PEFT's wrappers."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else None


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = owner(path)
        yield path


def _roles(model: nn.Module, targets: list[str]) -> dict[str, list[str]]:
    """Target → the roles of the projections it holds; a model that cannot be described has none."""
    try:
        layers = describe(model)
    except ValueError:
        return {}
    found: dict[str, list[str]] = {}
    for layer in layers:
        for role, projection in layer.projections.items():
            if owner(projection.parameter) in targets:
                found.setdefault(owner(projection.parameter), []).append(role)
    return found


def _columns(path: str, module: nn.Module, method: S2FT, exclude: Selection) -> Mapping[str, Entries]:
    """A random share of a linear layer's input columns, at least one."""
    if not is_linear(module):
        raise ValueError(
            f"target_modules: {path} is a {type(module).__name__}; S2FT trains input columns of linear layers only. Other "
            'parameters: DeltaConfig(method={"name": "random", …})'
        )
    if not isinstance(method.down, float):
        raise ValueError(f"target_modules: {path} is no projection of a transformer; give its share of columns as a float down=…")
    if method.needs_probe or method.select != "random":
        raise ValueError(f"target_modules: {path} is no projection of a transformer; only select='random' works there")
    name, weight = f"{path}.weight", module._parameters["weight"]
    assert weight is not None
    dim = 0 if is_transposed(module) else 1
    taken = exclude.get(name)
    used = set() if taken is None else set(torch.unravel_index(taken.flat(), taken.shape)[dim].tolist())
    free = [column for column in range(weight.shape[dim]) if column not in used]
    if not free:
        raise ValueError(f"exclude: it holds entries of every column of {path}; leave the module out of target_modules")
    count = max(1, math.floor(method.down * len(free) + 0.5))
    columns = sorted(random.Random(stable_seed(method.seed, path)).sample(free, count))
    return {name: Slices(tuple(weight.shape), dim, torch.tensor(columns))}
