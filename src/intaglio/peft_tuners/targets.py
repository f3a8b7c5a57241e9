"""Places of a PEFT adapter in a base model: modules that own parameters, and restrictions by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..core.entries import Whole
from ..core.selection import Selection
from ..model.structure import is_linear
from .base_config import TargetedConfig

__all__ = ["around", "excluded", "matched", "other_layers", "owner", "restrict", "unwrapped"]


def owner(parameter: str) -> str:
    """Path of the module that owns a parameter."""
    return parameter.rpartition(".")[0]


def around(path: str) -> Iterator[str]:
    """Paths of the modules that a module lies in, the nearest first."""
    while path:
        path = owner(path)
        yield path


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The base model as it was before any adapter, for the length of a `with` block."""
    wrappers: dict[str, tuple[nn.Module, nn.Module]] = {}
    for path, module in model.named_modules():
        inner = _inside(module)
        if inner is not None and not any(outer in wrappers for outer in around(path)):
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


def matched(model: nn.Module, config: TargetedConfig) -> list[str]:
    """Modules that `target_modules` and the other restrictions name."""
    view = _view(config, config.target_modules)
    if config.target_modules == "all-linear":
        get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        names = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
        view.target_modules = sorted({name.rpartition(".")[2] for name in names})
        return [name for name in names if check_target_module_exists(view, name)]
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(view, name)]


def excluded(config: TargetedConfig, path: str) -> Any:
    """PEFT's marker where `exclude_modules` or `modules_to_save` names a module, else False."""
    return check_target_module_exists(_view(config, []), path)


def restrict(selection: Selection, config: TargetedConfig) -> Selection:
    """The part of a selection that a config's restrictions leave.

    Raises:
        ValueError: where they leave nothing although they name no target.
    """
    ends = sorted({owner(name).rpartition(".")[2] for name in selection})
    view = _view(config, ends if config.target_modules is None else config.target_modules)
    kept = {name: e for name, e in selection.items() if not owner(name) or check_target_module_exists(view, owner(name))}
    if not kept and config.target_modules is None:
        raise ValueError(
            f"exclude_modules={config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r} and "
            f"modules_to_save={config.modules_to_save!r} leave nothing of what the method chooses"
        )
    return Selection(kept)


def other_layers(model: nn.Module, config: TargetedConfig) -> Selection:
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


def _view(config: TargetedConfig, targets: Any) -> SimpleNamespace:
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
