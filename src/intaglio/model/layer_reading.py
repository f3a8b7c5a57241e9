"""One layer, read: its attention by the first row of `families.FAMILIES` that fits, its FFN by a row or by its shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .families import FAMILIES, Family, Role
from .projection import Layer, Projection, is_transposed

__all__ = ["read", "row_fits"]

_READS_UNITS = {"o", "down"}  # these consume heads or channels; the others produce them
_ATTENTION, _FFN = ("q", "k", "v", "o"), ("up", "gate", "down")
# What attention modules call the number of their heads, and the width of one
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def read(model: nn.Module, name: str, layer: nn.Module) -> Layer | None:
    """The heads and channels of a layer.

    Args:
        model: the whole model, whose config says what the layer's own modules do not.
        name: the layer's path.
        layer: the module there.

    Returns:
        The layer, without projections where it has no FFN because all its weights mix tokens; None where its FFN cannot be
        found, or is one of several.
    """
    attention, reason = _attention(model, name, layer)
    ffn = _ffn_by_row(name, layer) or _ffn_by_shape(name, layer)
    if ffn is None:
        return Layer(name, {}) if _only_mixes(layer) else None
    if attention is None:
        return Layer(name, ffn, unread=reason)
    return Layer(name, attention.projections | ffn, attention.followers, attention.per_head)


def row_fits(layer: nn.Module) -> bool:
    """Whether any row describes the layer's attention or its FFN."""
    return any(_found(layer, family, roles) for family in FAMILIES for roles in (_ATTENTION, _FFN))


@dataclass(frozen=True)
class _Weight:
    """A projection's weight: path below the layer, tensor, and whether it is stored as [in, out]."""

    path: str
    weight: Tensor
    transposed: bool

    def dim(self, role: str) -> int:
        """Dimension along which the units of a role lie; experts, where there are any, come first."""
        return self.weight.dim() - 2 + int((role in _READS_UNITS) != self.transposed)

    def size(self, role: str) -> int:
        return self.weight.shape[self.dim(role)]


@dataclass(frozen=True)
class _Units:
    count: int
    width: int = 1


@dataclass(frozen=True)
class _Attention:
    projections: dict[str, Projection]
    followers: dict[str, tuple[str, ...]]
    per_head: tuple[str, ...]


def _weight(layer: nn.Module, role: Role) -> _Weight | None:
    """The weight of a role, below PEFT's wrapper where there is one."""
    module, path = _below(layer, role.path), role.path
    if module is None:
        return None
    base = module._modules.get("base_layer")
    if base is not None:
        module, path = base, f"{path}.base_layer"
    weight = module._parameters.get(role.parameter)
    stacked = role.parameter != "weight"
    if weight is None or weight.dim() != (3 if stacked else 2):
        return None
    if stacked and not _stored_as(module, role):
        return None
    return _Weight(f"{path}.{role.parameter}", weight, role.transposed or is_transposed(module))


def _stored_as(experts: nn.Module, role: Role) -> bool:
    """Whether stacked experts are stored as a row has it, so far as they say so themselves."""
    transposed = getattr(experts, "is_transposed", role.transposed)
    blocks = getattr(experts, "is_concatenated", role.fused == "blocks")
    return transposed == role.transposed and (not role.fused or blocks == (role.fused == "blocks"))


def _below(layer: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = layer
    for step in path.split("."):
        module = module._modules.get(step) if module is not None else None
    return module


def _found(layer: nn.Module, family: Family, roles: Collection[str]) -> dict[str, _Weight]:
    """The weights of those roles that a row has; none where one of them is missing."""
    where, _, marker = family.marker.rpartition(".")
    if marker and not hasattr(_below(layer, where), marker):
        return {}
    found = {role: _weight(layer, part) for role, part in family.roles.items() if role in roles}
    weights = {role: weight for role, weight in found.items() if weight is not None}
    return weights if len(weights) == len(found) else {}


def _attention(model: nn.Module, name: str, layer: nn.Module) -> tuple[_Attention | None, str]:
    """The heads of a layer, by the first row that fits; else why none does."""
    reason = "its attention is not built like any known one"
    misfits = []
    for family in FAMILIES:
        found = _found(layer, family, _ATTENTION)
        if not found:
            continue
        try:
            projections = _projections(name, family, found, _heads(model, layer, family, found))
        except ValueError as error:
            misfits.append(str(error))
            continue
        own = dict(layer.named_parameters())
        followers = {role: tuple(f"{name}.{p}" for p in paths if p in own) for role, paths in family.followers.items()}
        return _Attention(projections, followers, tuple(f"{name}.{p}" for p in family.per_head if p in own)), ""
    return None, misfits[0] if misfits else reason


def _heads(model: nn.Module, layer: nn.Module, family: Family, found: Mapping[str, _Weight]) -> dict[str, _Units]:
    """How many heads each role has and how wide they are, as the layer's own attention module says; else the config.

    The number of key-value heads is what their weight has room for.
    """
    module = _below(layer, family.roles["q"].path.rpartition(".")[0])
    config = getattr(module, "config", None) or _text_config(model)
    count = _number(module, *_COUNTS) or _number(config, "num_attention_heads")
    if count is None:
        raise ValueError("neither its attention nor the config names a number of heads (num_attention_heads)")
    reads = found["o"].size("o")
    common = _number(module, *_WIDTHS) or _number(config, "head_dim") or reads // count
    width = {role: (_number(module, family.widths.get(role, "")) or common) * family.roles[role].parts for role in found}
    if count * width["o"] != reads:
        raise ValueError(f"{count} heads of {width['o']} do not give the {reads} inputs of its attention output")
    heads = {role: _Units(count, width[role]) for role in ("q", "o")}
    if "k" in found:
        order = family.roles["k"].order or ("k",)
        room = found["k"].size("k") - (count * width["q"] if "q" in order else 0)
        shared = max(room // sum(width[role] for role in order if role in ("k", "v")), 1)
        if count % shared:
            raise ValueError(f"{count} query heads cannot share {shared} key-value heads")
        heads |= {role: _Units(shared, width[role]) for role in ("k", "v") if role in found}
    return heads


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _number(owner: Any, *names: str) -> int | None:
    """The first of some attributes that is a positive number."""
    for name in names:
        with suppress(RuntimeError):  # a config whose layers differ refuses to name one number for all
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _projections(layer: str, family: Family, found: Mapping[str, _Weight], units: Mapping[str, _Units]) -> dict[str, Projection]:
    """Where the units of each role lie in its weight.

    Raises:
        ValueError: where a weight has another size than its units need.
    """
    projections = {}
    for role, weight in found.items():
        part = family.roles[role]
        order = part.order or (role,)
        groups = min(units[r].count for r in order) if part.fused == "units" else 1
        size = {r: units[r].count // groups * units[r].width for r in order}  # of a role, in each group of units
        dim, shape = weight.dim(role), tuple(weight.weight.shape)
        if shape[dim] != groups * sum(size.values()):
            raise ValueError(
                f"{layer}.{weight.path}: {units[role].count} {role} units of {units[role].width} need "
                f"{groups * sum(size.values())} positions along dimension {dim}, its shape is {list(shape)}: a layout not known "
                "here (experts stored [in, out]?)"
            )
        before = sum(size[r] for r in order[: order.index(role)])
        together, stride = units[role].count // groups, sum(size.values())
        if groups == 1:  # one run of units
            together, stride = 1, units[role].width
        name = f"{layer}.{weight.path}"
        projections[role] = Projection(name, shape, dim, units[role].count, units[role].width, before, stride, together)
    return projections


def _ffn_by_row(name: str, layer: nn.Module) -> dict[str, Projection] | None:
    for family in FAMILIES:
        found = _found(layer, family, _FFN)
        if found:
            with suppress(ValueError):  # the paths of this row, with other sizes
                return _projections(name, family, found, dict.fromkeys(found, _Units(found["down"].size("down"))))
    return None


def _ffn_by_shape(name: str, layer: nn.Module) -> dict[str, Projection] | None:
    """The one FFN of a layer that no row describes; None where there is none, or more than one (experts)."""
    found = []
    for path, parent in layer.named_modules():
        linears = {n: m for n, m in parent.named_children() if isinstance(m, nn.Linear)}
        roles = {} if _is_attention(parent) else _ffn_roles(linears)
        if roles:
            found.append({role: Role(f"{path}.{n}" if path else n) for role, n in roles.items()})
    if len(found) != 1 or _beside_experts(layer, found[0]["down"].path):
        return None
    weights = _found(layer, Family(name, found[0]), _FFN)
    return _projections(name, Family(name, found[0]), weights, dict.fromkeys(weights, _Units(weights["down"].size("down"))))


def _is_attention(module: nn.Module) -> bool:
    """Whether a module holds projections by the names that some row has for those of queries, keys and values."""
    names = [{family.roles[role].path.rpartition(".")[2] for role in "qkv" if role in family.roles} for family in FAMILIES]
    return any(own and own <= module._modules.keys() for own in names)


def _ffn_roles(linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Role → name among sibling Linears: d→c (the last of them up, one before it gate), then c→d, down."""
    for position, (down, module) in enumerate(linears.items()):
        narrow, wide = module.out_features, module.in_features
        before = list(linears.items())[:position]
        ups = [n for n, m in before if (m.in_features, m.out_features) == (narrow, wide) and narrow != wide]
        if ups:
            return dict(zip(("up", "gate"), reversed(ups), strict=False)) | {"down": down}
    return {}


def _beside_experts(layer: nn.Module, path: str) -> bool:
    """Whether an FFN is the shared expert of a mixture whose experts are stacked in weights that no row describes."""
    top, _, rest = path.partition(".")
    return "." in rest and any(weight.dim() == 3 for name, weight in _matrices(layer) if name.startswith(f"{top}."))


def _only_mixes(layer: nn.Module) -> bool:
    """Whether every matrix of a layer belongs to attention or to a state-space mixer, as in a stack that alternates them."""
    mixers = [path for path, module in layer.named_modules() if any(isinstance(m, nn.Conv1d) for m in module.children())]
    mixers += [path for path, module in layer.named_modules() if _is_attention(module)]
    matrices = [name for name, _ in _matrices(layer)]
    return bool(matrices) and all(any(name.startswith(f"{mixer}.") for mixer in mixers) for name in matrices)


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of two dimensions and more, but for those of convolutions."""
    for path, child in module.named_modules():
        if not isinstance(child, nn.Conv1d):
            for name, weight in child.named_parameters(path, recurse=False):
                if weight.dim() >= 2:
                    yield name, weight
