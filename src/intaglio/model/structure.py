"""The layers, attention heads and FFN channels of a transformer, and where each sits in the weights.

Reads the rows of `families.FAMILIES`. Where no row fits, the FFN of a home-made stack is found by its shapes alone; what
cannot be described is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from .families import FAMILIES, Family, Role
from .units import Units

__all__ = ["Layer", "Projection", "describe", "is_linear", "is_transposed", "layer_matrices", "refuse_shared"]

_READS_UNITS = {"o", "down"}  # these consume heads or channels; the others produce them


@final
@dataclass(frozen=True)
class Projection:
    """The units of one role in one weight.

    A unit is an attention head (`width` = head_dim) or an FFN channel (`width` = 1). Unit u occupies positions
    `offset + u·stride … + width` along dimension `dim` of the parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    dim: int
    units: int
    width: int
    offset: int
    stride: int

    def index(self, units: Tensor) -> Tensor:
        """Positions along `dim` of the given units, int64 `[len(units)·width]`, sorted."""
        return self.places(units.sort().values).flatten()

    def places(self, units: Tensor) -> Tensor:
        """Positions along `dim` of the given units in their order, int64 `[len(units), width]`."""
        return (self.offset + units * self.stride)[:, None] + torch.arange(self.width)

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum of one value per position along `dim` over each unit: `[shape[dim]]` → `[units]`."""
        return values[self.index(torch.arange(self.units)).to(values.device)].view(self.units, self.width).sum(-1)

    def owners(self, index: Tensor) -> Tensor:
        """Units that own any of the positions `index` along `dim`; positions of other roles are passed over."""
        unit = torch.div(index - self.offset, self.stride, rounding_mode="floor")
        inside = (unit >= 0) & (unit < self.units) & ((index - self.offset) - unit * self.stride < self.width)
        return unit[inside].unique()


@final
@dataclass(frozen=True)
class Layer:
    """One layer of the stack.

    Attributes:
        name: its module path.
        projections: by role; a layer found by shape alone has only `up`, `gate` and `down`.
        followers: by role, parameters with one value (or row) per position of that role's heads, by full name.
    """

    name: str
    projections: Mapping[str, Projection]
    followers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def describe(model: nn.Module) -> list[Layer]:
    """Describe every layer of `model`'s stacks, in module order.

    Args:
        model: any module that holds its layers in an `nn.ModuleList`; heads are read from `model.config`.

    Returns:
        One `Layer` per layer.

    Raises:
        ValueError: naming the model class, where no stack of layers with known projections is found, or the layer of a
            stack that is not built like any known one.
    """
    families = {name: family for name, layer in _stacked(model) if (family := _family_of(layer)) is not None}
    if families:
        _refuse_unknown(model, set(families))
        return [_by_family(model, name, layer, families[name]) for name, layer in _stacked(model) if name in families]
    layers = [layer for name, module in _stacked(model) if (layer := _by_shape(name, module)) is not None]
    if layers:
        return layers
    raise ValueError(
        f"model {type(model).__name__}: no stack of layers with known projections found. "
        f"Known layouts: {', '.join(family.name for family in FAMILIES)}, or an nn.ModuleList whose layers hold an "
        "up/down pair of nn.Linear. Methods that need no structure (random, full) still work."
    )


def refuse_shared(model: nn.Module, layers: list[Layer]) -> None:
    """Refuse layers that share a weight, whose units cannot be told apart.

    Raises:
        ValueError: naming the weight.
    """
    own = dict(model.named_parameters())
    shared = [p.parameter for layer in layers for p in layer.projections.values() if p.parameter not in own]
    if shared:
        raise ValueError(f"{shared[0]} is shared between layers, so that heads and channels of one layer cannot be chosen alone")


def layer_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices inside the layers of `model`'s stacks: projections, experts and routers, whatever the family.

    What stands outside (embeddings, output head, pooler) and what is no matrix (norms, biases) is left out.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        f"{layer}.{name}"
        for layer, module in _stacked(model)
        for name, weight in module.named_parameters()
        if weight.dim() >= 2 and id(weight) not in tables
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one product with a 2-D weight, stored either way."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection stores its weight as [in, out] (GPT-2's Conv1D) instead of [out, in]."""
    return type(module).__name__ == "Conv1D"


def _stacked(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for position, layer in enumerate(module):
                yield f"{name}.{position}" if name else str(position), layer


@dataclass(frozen=True)
class _Found:
    """A projection's weight: path below the layer, tensor, and whether it is stored as [in, out]."""

    path: str
    weight: Tensor
    transposed: bool

    def dim(self, *, reads: bool) -> int:
        """Dimension of the inputs (reads) or outputs; experts, where there are any, come first."""
        return self.weight.dim() - 2 + int(reads != self.transposed)

    def width(self, *, reads: bool) -> int:
        return self.weight.shape[self.dim(reads=reads)]


def _find(layer: nn.Module, place: Role) -> _Found | None:
    """The weight of a role, below PEFT's wrapper where there is one."""
    module, path = layer, place.path
    for step in place.path.split("."):
        child = module._modules.get(step)
        if child is None:
            return None
        module = child
    base = module._modules.get("base_layer")
    if base is not None:
        module, path = base, f"{path}.base_layer"
    weight = module._parameters.get(place.parameter)
    expected = 2 if place.parameter == "weight" else 3
    if weight is None or weight.dim() != expected:
        return None
    return _Found(f"{path}.{place.parameter}", weight, is_transposed(module))


def _family_of(layer: nn.Module) -> Family | None:
    return next((f for f in FAMILIES if all(_find(layer, role) is not None for role in f.roles.values())), None)


def _refuse_unknown(model: nn.Module, known: set[str]) -> None:
    """Refuse a stack of which only some layers are understood: "the same in every layer" would be untrue."""
    stacks = {name.rpartition(".")[0] for name in known}
    for name, _ in _stacked(model):
        if name.rpartition(".")[0] in stacks and name not in known:
            raise ValueError(
                f"model {type(model).__name__}: {name} is not built like the other layers of its stack, nor like any known "
                f"layout ({', '.join(family.name for family in FAMILIES)})"
            )


def _by_family(model: nn.Module, name: str, layer: nn.Module, family: Family) -> Layer:
    found = {role: weight for role, part in family.roles.items() if (weight := _find(layer, part)) is not None}
    units = Units.of(model, found["o"].width(reads=True), found["down"].width(reads=True))
    projections = {}
    for role, part in family.roles.items():
        offset, stride = units.place(role, part)
        size = units.positions(part.order or (role,))
        projections[role] = _projection(name, found[role], role, units.count(role), units.width(role), offset, stride, size)
    below = dict(layer.named_parameters())
    followers = {role: tuple(f"{name}.{path}" for path in paths if path in below) for role, paths in family.followers.items()}
    return Layer(name, projections, followers)


def _projection(layer: str, found: _Found, role: str, units: int, width: int, offset: int, stride: int, size: int) -> Projection:
    dim, name = found.dim(reads=role in _READS_UNITS), f"{layer}.{found.path}"
    if found.weight.shape[dim] != size:
        raise ValueError(
            f"{name}: {units} {role} units of {width} need {size} positions along dimension {dim}, its shape is "
            f"{list(found.weight.shape)}: a layout not known here (an output gate? experts stored [in, out]?)"
        )
    return Projection(name, tuple(found.weight.shape), dim, units, width, offset, stride)


def _by_shape(name: str, layer: nn.Module) -> Layer | None:
    """Describe the one FFN of an unknown layer; None where there is none, or more than one (experts)."""
    attention = {part.path.rpartition(".")[0] for family in FAMILIES for part in family.roles.values() if _find(layer, part)} - {
        ""
    }
    found = []
    for path, parent in layer.named_modules():
        linears = {n: m for n, m in parent.named_children() if isinstance(m, nn.Linear)}
        roles = _ffn_roles(linears) if path not in attention else {}
        if roles:
            below = {role: f"{path}.{n}" if path else n for role, n in roles.items()}
            found.append({role: _Found(f"{below[role]}.weight", linears[n].weight, False) for role, n in roles.items()})
    if len(found) != 1:
        return None
    wide = found[0]["down"].width(reads=True)
    return Layer(name, {role: _projection(name, weight, role, wide, 1, 0, 1, wide) for role, weight in found[0].items()})


def _ffn_roles(linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Role → name among sibling Linears: d→c (the last of them up, one before it gate), then c→d, down."""
    for position, (down, module) in enumerate(linears.items()):
        narrow, wide = module.out_features, module.in_features
        before = list(linears.items())[:position]
        ups = [n for n, m in before if (m.in_features, m.out_features) == (narrow, wide) and narrow != wide]
        if ups:
            return dict(zip(("up", "gate"), reversed(ups), strict=False)) | {"down": down}
    return {}
