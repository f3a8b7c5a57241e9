"""What a transformer is made of: decoder layers, attention heads, FFN channels, and where each sits in the weights.

The only module that knows architectures. Each is a row of `FAMILIES` (data, not code) and is recognised by its module
paths, never by a class name, so that a new model which follows an old layout works unchanged. Where no row fits, the
FFN of a home-made stack is found by its shapes alone; what cannot be described is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "ROLES", "Family", "Layer", "Part", "Projection", "describe", "is_transposed"]

ROLES = ("q", "k", "v", "o", "up", "gate", "down")
_READS_UNITS = {"o", "down"}  # these consume heads or channels; the others produce them


@dataclass(frozen=True)
class Part:
    """Where one role lives inside a layer: a module path, and its place if several roles share one fused weight."""

    path: str
    fused: str = ""  # "": alone; "blocks": role after role (Phi-3); "heads": interleaved head by head (GPT-NeoX)
    order: tuple[str, ...] = ()  # the roles of a fused weight, in their order there


@dataclass(frozen=True)
class Family:
    """One row: the module paths of a decoder (or encoder) layer."""

    name: str
    parts: Mapping[str, Part]


def _separate(name: str, **paths: str) -> Family:
    return Family(name, {role: Part(path) for role, path in paths.items()})


def _fused(path: str, fused: str, *order: str) -> dict[str, Part]:
    return {role: Part(path, fused, order) for role in order}


def _llama_like(name: str, attention: str, **ffn: str) -> Family:
    qkv = {role: f"{attention}.{role}_proj" for role in "qkv"}
    return _separate(name, **qkv, **ffn)


FAMILIES: tuple[Family, ...] = (
    # Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo-2, SmolLM, Granite …
    _llama_like("llama", "self_attn", o="self_attn.o_proj", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
    _llama_like("opt", "self_attn", o="self_attn.out_proj", up="fc1", down="fc2"),
    Family(
        "phi3",
        {
            **_fused("self_attn.qkv_proj", "blocks", "q", "k", "v"),
            "o": Part("self_attn.o_proj"),
            **_fused("mlp.gate_up_proj", "blocks", "gate", "up"),
            "down": Part("mlp.down_proj"),
        },
    ),
    Family(
        "gpt2",
        {
            **_fused("attn.c_attn", "blocks", "q", "k", "v"),
            "o": Part("attn.c_proj"),
            "up": Part("mlp.c_fc"),
            "down": Part("mlp.c_proj"),
        },
    ),
    Family(
        "gpt_neox",
        {
            **_fused("attention.query_key_value", "heads", "q", "k", "v"),
            "o": Part("attention.dense"),
            "up": Part("mlp.dense_h_to_4h"),
            "down": Part("mlp.dense_4h_to_h"),
        },
    ),
    # BERT, RoBERTa, ELECTRA, XLM-R …
    _separate(
        "bert",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
    ),
    _separate(
        "deberta_v2",
        q="attention.self.query_proj",
        k="attention.self.key_proj",
        v="attention.self.value_proj",
        o="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
    ),
    Family(
        "deberta",
        {
            **_fused("attention.self.in_proj", "heads", "q", "k", "v"),
            "o": Part("attention.output.dense"),
            "up": Part("intermediate.dense"),
            "down": Part("output.dense"),
        },
    ),
)


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
        starts = self.offset + units.sort().values * self.stride
        return (starts[:, None] + torch.arange(self.width)).flatten()

    def owners(self, index: Tensor) -> Tensor:
        """Units that own any of the positions `index` along `dim`; positions of other roles are passed over."""
        unit = torch.div(index - self.offset, self.stride, rounding_mode="floor")
        inside = (unit >= 0) & (unit < self.units) & ((index - self.offset) - unit * self.stride < self.width)
        return unit[inside].unique()


@final
@dataclass(frozen=True)
class Layer:
    """One layer of the stack: its module path and its projections by role."""

    name: str
    projections: Mapping[str, Projection]


def describe(model: nn.Module) -> list[Layer]:
    """Describe every layer of `model`'s stacks, in module order.

    Args:
        model: any module that holds its layers in an `nn.ModuleList`; heads are read from `model.config`.

    Returns:
        One `Layer` per layer; a layer found by shape alone has only `up`, `gate` and `down`.

    Raises:
        ValueError: naming the model class, where no stack of layers with known projections is found.
    """
    for family in FAMILIES:
        fitting = [(name, module) for name, module in _stacked(model) if _fits(module, family)]
        _refuse_mixed(model, fitting)
        if fitting:
            return [_by_family(model, name, module, family) for name, module in fitting]
    layers = [layer for name, module in _stacked(model) if (layer := _by_shape(name, module)) is not None]
    if layers:
        return layers
    raise ValueError(
        f"model {type(model).__name__}: no stack of layers with known projections found. "
        f"Known layouts: {', '.join(family.name for family in FAMILIES)}, or an nn.ModuleList whose layers hold an "
        "up/down pair of nn.Linear. Methods that need no structure (random, full) still work."
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection stores its weight as [in, out] (GPT-2's Conv1D) instead of [out, in]."""
    return type(module).__name__ == "Conv1D"


def _stacked(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for position, layer in enumerate(module):
                yield f"{name}.{position}" if name else str(position), layer


def _find(module: nn.Module, path: str) -> nn.Module | None:
    """The projection at `path`, below PEFT's wrapper where there is one."""
    for step in path.split("."):
        child = module._modules.get(step)
        if child is None:
            return None
        module = child
    base = module._modules.get("base_layer", module)
    weight = base._parameters.get("weight") if base is not None else None
    return base if weight is not None and weight.dim() == 2 else None


def _fits(layer: nn.Module, family: Family) -> bool:
    return all(_find(layer, part.path) is not None for part in family.parts.values())


def _refuse_mixed(model: nn.Module, fitting: list[tuple[str, nn.Module]]) -> None:
    """Refuse a stack of which only some layers fit (mixtures of experts): "the same in every layer" would be untrue."""
    stacks, names = {name.rpartition(".")[0] for name, _ in fitting}, {name for name, _ in fitting}
    for name, _ in _stacked(model):
        if name.rpartition(".")[0] in stacks and name not in names:
            raise ValueError(
                f"model {type(model).__name__}: {name} is not built like {fitting[0][0]}; mixed stacks are not supported yet"
            )


@dataclass(frozen=True)
class _Heads:
    query: int
    key_value: int
    width: int

    def units(self, role: str) -> int:
        return self.key_value if role in ("k", "v") else self.query


def _heads(model: nn.Module, reads: int) -> _Heads:
    """Head counts from the config; `reads` is the input width of the attention output projection."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    query = getattr(config, "num_attention_heads", None)
    if not isinstance(query, int):
        raise ValueError(f"model {type(model).__name__}: its config names no num_attention_heads")
    key_value = getattr(config, "num_key_value_heads", None) or query
    width = getattr(config, "head_dim", None) or reads // query
    if query * width != reads:
        raise ValueError(
            f"model {type(model).__name__}: {query} heads of {width} do not give the {reads} inputs of its attention output"
        )
    return _Heads(query, key_value, width)


def _by_family(model: nn.Module, name: str, layer: nn.Module, family: Family) -> Layer:
    output = _find(layer, family.parts["o"].path)
    down = _find(layer, family.parts["down"].path)
    assert output is not None  # _fits has seen them
    assert down is not None
    heads, channels = _heads(model, _width(output, reads=True)), _width(down, reads=True)
    projections = {}
    for role, part in family.parts.items():
        module = _find(layer, part.path)
        assert module is not None
        is_ffn = role in ("up", "gate", "down")
        units, width = (channels, 1) if is_ffn else (heads.units(role), heads.width)
        offset, stride = _place(role, part, heads, channels)
        where = _path_of(layer, module)
        projections[role] = _projection(f"{name}.{where}", module, role, units, width, offset, stride)
    return Layer(name, projections)


def _place(role: str, part: Part, heads: _Heads, channels: int) -> tuple[int, int]:
    """(offset, stride) of a role's units inside its weight."""
    width = 1 if role in ("up", "gate", "down") else heads.width
    position = part.order.index(role) if part.fused else 0
    if part.fused == "heads":
        return position * width, len(part.order) * width
    before = part.order[:position]
    return sum(channels if r in ("up", "gate") else heads.units(r) * heads.width for r in before), width


def _path_of(layer: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in layer.named_modules() if candidate is module)


def _width(module: nn.Module, *, reads: bool) -> int:
    """Number of inputs (reads=True) or outputs of a projection."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.shape[int(reads) if not is_transposed(module) else int(not reads)]


def _projection(path: str, module: nn.Module, role: str, units: int, width: int, offset: int, stride: int) -> Projection:
    reads = role in _READS_UNITS
    weight = module._parameters["weight"]
    assert weight is not None
    dim = int(reads != is_transposed(module))
    last = offset + (units - 1) * stride + width
    if last > weight.shape[dim]:
        raise ValueError(f"{path}: {units} units of {width} need {last} positions, its weight has {list(weight.shape)}")
    return Projection(f"{path}.weight", tuple(weight.shape), dim, units, width, offset, stride)


def _by_shape(name: str, layer: nn.Module) -> Layer | None:
    """Describe the one FFN of an unknown layer; None where there is none, or more than one (experts)."""
    attention = {
        part.path.rpartition(".")[0] for family in FAMILIES for part in family.parts.values() if _find(layer, part.path)
    } - {""}
    found = []
    for path, parent in layer.named_modules():
        linears = {n: m for n, m in parent.named_children() if isinstance(m, nn.Linear)}
        roles = _ffn_roles(linears) if path not in attention else {}
        if roles:
            prefix = f"{name}.{path}" if path else name
            found.append({role: (f"{prefix}.{n}", linears[n]) for role, n in roles.items()})
    if len(found) != 1:
        return None
    wide = found[0]["down"][1].in_features
    return Layer(name, {role: _projection(path, m, role, wide, 1, 0, 1) for role, (path, m) in found[0].items()})


def _ffn_roles(linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Role → name among sibling Linears: d→c (the last of them up, one before it gate), then c→d, down."""
    for position, (down, module) in enumerate(linears.items()):
        narrow, wide = module.out_features, module.in_features
        before = list(linears.items())[:position]
        ups = [n for n, m in before if (m.in_features, m.out_features) == (narrow, wide) and narrow != wide]
        if ups:
            return dict(zip(("up", "gate"), reversed(ups), strict=False)) | {"down": down}
    return {}
