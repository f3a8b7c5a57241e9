"""Stacks of layers, and which layer each parameter belongs to: by structure, never by class or attribute names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from torch import nn

__all__ = ["Stack", "stacks"]


@final
@dataclass(frozen=True)
class Stack:
    """A model's layers, and the parameters in each.

    Attributes:
        paths: module path of each layer, in the model's order; of an encoder and a decoder, one after the other.
        groups: names of the parameters in each layer.
        outside: names of those in no layer (embeddings, final norm, head).
    """

    paths: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


def stacks(model: nn.Module, names: Iterable[str]) -> Stack:
    """Group parameters by the layers of the model's stacks.

    A stack is an outermost `nn.ModuleList`, or `nn.Sequential` of children of one type, in which at least two children hold
    parameters of `names`; layers that hold none are passed over. Lists inside a layer (experts, T5's sub-layers) are part
    of it.

    Args:
        model: any module, with PEFT's wrappers or without.
        names: of parameters, as `model.named_parameters()` gives them.

    Raises:
        ValueError: where there is no such stack.

    Example:
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]), "head": nn.Linear(1, 1)})
        >>> stacks(model, dict(model.named_parameters())).paths
        ('blocks.0', 'blocks.1')
    """
    names = list(names)
    found: dict[str, list[str]] = {}
    taken: list[str] = []
    for path, module in model.named_modules():
        if not _is_list(module) or any(path.startswith(f"{outer}.") or not outer for outer in taken):
            continue
        prefix = f"{path}." if path else ""
        held: dict[str, list[str]] = {f"{prefix}{child}": [] for child in module._modules}
        for name in names:
            child = f"{prefix}{name[len(prefix) :].partition('.')[0]}"
            if name.startswith(prefix) and child in held:
                held[child].append(name)
        held = {layer: inside for layer, inside in held.items() if inside}
        if len(held) > 1:
            taken.append(path)
            found |= held
    if not found:
        shown = (", ".join(names[:2]) or "nothing") + (" …" if len(names) > 2 else "")
        raise ValueError(
            f"model {type(model).__name__}: no stack of layers found, an nn.ModuleList of which at least two members hold "
            f"something to train; this does not fit methods that train a few layers at a time (trained: {shown})"
        )
    inside = {name for group in found.values() for name in group}
    return Stack(tuple(found), tuple(map(tuple, found.values())), tuple(name for name in names if name not in inside))


def _is_list(module: nn.Module) -> bool:
    children = list(module._modules.values())
    alike = len({type(child) for child in children}) == 1
    return len(children) > 1 and (isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike))
