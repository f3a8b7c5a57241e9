"""The layers, attention heads and FFN channels of a transformer, and where each sits in the weights.

Layers are read one by one (`layer_reading`), by the rows of `families.FAMILIES`. Where no row fits, the FFN of a home-made
stack is found by its shapes alone; what cannot be described is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .families import FAMILIES
from .layer_reading import read, row_fits
from .projection import Layer, Projection, is_linear, is_transposed

__all__ = ["Layer", "Projection", "describe", "is_linear", "is_transposed", "layer_matrices", "refuse_shared"]


def describe(model: nn.Module) -> list[Layer]:
    """Describe every layer of `model`'s stacks, in module order.

    A stack is an outermost `nn.ModuleList` with a layer whose attention or FFN is found. Left out are towers of a model for
    text that read no text (images, sound), stacks found by shape alone beside others that rows describe (connectors, heads),
    and layers that have no FFN because they only mix tokens (Nemotron-H).

    Args:
        model: any module that holds its layers in an `nn.ModuleList`; heads are read from each layer's attention module, or
            from `model.config`.

    Returns:
        One `Layer` per layer.

    Raises:
        ValueError: naming the model class, where no stack of layers with known projections is found, or the layer of a
            stack whose FFN cannot be found.
    """
    stacks, rows = [], []
    for path, members in _lists(model):
        if any(path.startswith(f"{outer}.") for outer, _ in stacks) or _reads_no_text(model, path):
            continue
        layers = {name: read(model, name, layer) for name, layer in members.items()}
        fits = any(map(row_fits, members.values()))
        if fits or any(layer is not None and layer.projections for layer in layers.values()):
            stacks.append((path, layers))
            rows += [path] if fits else []
    found = [layer for path, layers in stacks if path in rows or not rows for layer in _complete(model, layers)]
    if found:
        return found
    raise ValueError(
        f"model {type(model).__name__}: no stack of layers with known projections found. "
        f"Known layouts: {_known()}, or an nn.ModuleList whose layers hold an "
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
        for layer, module in (item for _, members in _lists(model) for item in members.items())
        for name, weight in module.named_parameters()
        if weight.dim() >= 2 and id(weight) not in tables
    }


def _lists(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """(path, its members by their own paths) of every `nn.ModuleList`, the outer ones first."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            yield path, {f"{path}.{position}" if path else str(position): layer for position, layer in enumerate(module)}


def _reads_no_text(model: nn.Module, path: str) -> bool:
    """Whether a list lies in a tower for images or sound of a model that has a text model inside."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return False
    steps = path.split(".")
    around = [model.get_submodule(".".join(steps[:count])) for count in range(len(steps))]
    reads: list[Any] = [module.input_modalities for module in around if hasattr(module, "input_modalities")]
    return bool(reads) and "text" not in reads[-1]


def _complete(model: nn.Module, layers: dict[str, Layer | None]) -> list[Layer]:
    """The layers of a stack, all of them: with some left out, "the same in every layer" would be untrue."""
    for name, layer in layers.items():
        if layer is None:
            raise ValueError(
                f"model {type(model).__name__}: {name} is not built like the other layers of its stack, nor like any known "
                f"layout ({_known()}): its FFN cannot be found. Methods that need no structure (id3, random, lora …) still work"
            )
    return [layer for layer in layers.values() if layer is not None and layer.projections]


def _known() -> str:
    return ", ".join(family.name for family in FAMILIES)
