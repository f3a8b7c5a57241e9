"""Explicit targets of a method of heads and channels: projections by their units, other linear layers by their columns."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping

import torch
from torch import nn

from ..core.entries import Entries, Slices, Whole
from ..core.probe import Probe
from ..core.scores import stable_seed
from ..core.selection import Selection
from ..method_kinds.unit_method import UnitMethod
from ..model.families import ROLES
from ..model.structure import describe, is_linear, is_transposed
from .base_config import TargetedConfig
from .targets import matched, owner

__all__ = ["columns", "split", "units"]


def split(model: nn.Module, config: TargetedConfig) -> tuple[dict[str, list[str]], list[str]]:
    """The projections among a config's targets, with the roles each plays, and the other targets.

    Raises:
        ValueError: for targets that match nothing.
    """
    targets = matched(model, config)
    if not targets:
        ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)})
        raise ValueError(
            f"Target modules {config.target_modules} not found in the base model; its linear layers are called {', '.join(ends)}"
        )
    try:
        layers = describe(model)
    except ValueError:  # a model that cannot be described has no projections
        layers = []
    roles: dict[str, list[str]] = {}
    for layer in layers:
        for role, projection in layer.projections.items():
            if owner(projection.parameter) in targets:
                roles.setdefault(owner(projection.parameter), []).append(role)
    return roles, [path for path in targets if path not in roles]


def units(
    model: nn.Module, roles: Mapping[str, list[str]], method: UnitMethod, probe: Probe | None, exclude: Selection
) -> Selection:
    """The units that a method chooses in some projections of a model.

    Args:
        model: the base.
        roles: path of a projection → the roles it plays, as `split` gives them.
        method: says how units rank.
        probe: calibration data, for a method that needs it.
        exclude: entries the method must leave alone.

    Raises:
        ValueError: for a projection without a share.
    """
    shares = {role: getattr(method, role) if any(role in own for own in roles.values()) else None for role in ROLES}
    for path, own in roles.items():
        if all(shares[role] is None for role in own):
            wanted = " or ".join(f"{role}=…" for role in own)
            raise ValueError(f"target_modules: {path} is a projection without a share; give {wanted}, or leave it out")
    layers = [[*layer.projections.values()] for layer in describe(model)]
    untouched = [layer for layer in layers if not any(owner(p.parameter) in roles for p in layer)]
    others = Selection({p.parameter: Whole(p.shape) for layer in untouched for p in layer})
    narrowed = dataclasses.replace(method, **shares)
    chosen = narrowed.choose(model, probe, exclude.union(others))
    return Selection({name: entries for name, entries in chosen.items() if owner(name) in roles})


def columns(path: str, module: nn.Module, share: float, seed: int, exclude: Selection) -> dict[str, Entries]:
    """A random share of a linear layer's input columns, at least one.

    Raises:
        ValueError: for another kind of module, or where no column is free.
    """
    if not is_linear(module):
        raise ValueError(
            f"target_modules: {path} is a {type(module).__name__}; S2FT trains input columns of linear layers only. Other "
            'parameters: DeltaConfig(method={"name": "random", …})'
        )
    name, weight = f"{path}.weight", module.get_parameter("weight")
    dim = 0 if is_transposed(module) else 1
    taken = exclude.get(name)
    used = set() if taken is None else set(taken.positions(dim).tolist())
    free = [column for column in range(weight.shape[dim]) if column not in used]
    if not free:
        raise ValueError(f"exclude: it holds entries of every column of {path}; leave the module out of target_modules")
    count = max(1, math.floor(share * len(free) + 0.5))
    drawn = sorted(random.Random(stable_seed(seed, path)).sample(free, count))
    return {name: Slices(tuple(weight.shape), dim, torch.tensor(drawn))}
