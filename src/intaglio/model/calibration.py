"""Norms and means of what a calibration set makes of a model: how strongly each head, channel or weight acts.

Norms of heads and channels are taken on the reading side of a structure: the columns of `down` for an FFN channel, of `o`
for a query head and, under grouped-query attention, of `o` for all query heads that a key-value head serves (S2FT, arXiv
2412.06289, section 3.2, leaves the tensor open). Looking leaves no trace: weights, gradients, train and eval flags,
`requires_grad` and the random state are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..core.probe import IGNORED, Probe, batch_on, rows_of
from .structure import Layer, Projection

__all__ = [
    "STRUCTURES",
    "activation_norms",
    "decoder_of",
    "gradient_means",
    "gradient_norms",
    "inputs_of",
    "quiet",
    "units_of",
    "weight_norms",
]

# structure → (role that reads it, roles that share its units)
STRUCTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "channels": ("down", ("up", "gate", "down")),
    "heads": ("o", ("q", "o")),
    "kv_heads": ("o", ("k", "v")),
}

Norms = dict[tuple[str, str], Tensor]  # (layer name, structure) → one norm per unit, fp64 `[units]` on the CPU


def units_of(layer: Layer, structure: str) -> int:
    """Number of units of a structure in a layer; 0 where it has none."""
    return next((layer.projections[role].units for role in STRUCTURES[structure][1] if role in layer.projections), 0)


def weight_norms(model: nn.Module, layers: list[Layer], structures: Collection[str] = tuple(STRUCTURES)) -> Norms:
    """L2 norm of the weights that read each unit of the given structures."""
    parameters = dict(model.named_parameters())
    squares = {p.parameter: _squares(parameters[p.parameter].detach(), p.dim) for p in _readers(layers, structures)}
    return _norms(layers, squares)


@torch.no_grad()
def activation_norms(
    model: nn.Module, layers: list[Layer], probe: Probe, structures: Collection[str] = tuple(STRUCTURES)
) -> Norms:
    """L2 norm of each unit's activations, the inputs of `o` and `down`, over all tokens but padding. Forward only.

    Raises:
        ValueError: where a unit has no layer of its own whose inputs could be seen (fused experts), where tokens and
            attention mask do not agree, or for activations that are not finite.
    """
    squares: dict[str, Tensor] = {}
    handles, mask, targets = [], _Mask(), _Mask()
    modules, decoder = dict(model.named_modules()), decoder_of(model)
    decoding = set() if decoder is None else set(decoder.modules())

    def observe(parameter: str, own: _Mask, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        _add(squares, parameter, own.select(inputs[0], parameter).double().square().sum(0))

    for projection in _readers(layers, structures):
        name, _, leaf = projection.parameter.rpartition(".")
        if leaf != "weight":
            raise ValueError(
                f"{projection.parameter}: holds all experts in one weight, so that the inputs of one channel cannot be seen; "
                "select by 'weight', 'gradient' or 'random'"
            )
        own = targets if modules[name] in decoding else mask
        handles.append(modules[name].register_forward_pre_hook(partial(observe, projection.parameter, own)))
    try:
        with quiet(model):
            for batch in _on_device(model, probe):
                mask.tokens, labels = batch.get("attention_mask"), batch.get("labels")
                targets.tokens = batch.get("decoder_attention_mask", None if labels is None else labels != IGNORED)
                model(**inputs_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return _norms(layers, squares)


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of an encoder-decoder model, which has a batch's targets for tokens; None for other models."""
    config: Any = getattr(model, "config", None)
    return model.get_decoder() if getattr(config, "is_encoder_decoder", False) else None  # type: ignore[operator]


def inputs_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward pass without a loss takes: all but the labels, unless a decoder's inputs are made of them."""
    made = decoder_of(model) is not None and "decoder_input_ids" not in batch
    return {key: value for key, value in batch.items() if key != "labels" or made}


def gradient_norms(model: nn.Module, layers: list[Layer], probe: Probe, structures: Collection[str] = tuple(STRUCTURES)) -> Norms:
    """Root of the summed squared gradients of each unit's reading weights, the gradient taken example by example.

    Example by example makes the result independent of how the set is split into batches. A weight's gradient is reduced
    and freed before the next layer's is formed, so the peak is one layer's gradient above the forward pass.

    Raises:
        ValueError: where the loss is missing or a gradient is not finite.
    """
    squares: dict[str, Tensor] = {}
    dims = {p.parameter: p.dim for p in _readers(layers, structures)}
    _visit_gradients(model, dims, probe, lambda name, gradient: _add(squares, name, _squares(gradient, dims[name])))
    return _norms(layers, squares)


def gradient_means(
    model: nn.Module, names: Collection[str], probe: Probe, term: Callable[[Tensor], Tensor], *, samples: int | None = None
) -> dict[str, Tensor]:
    """Mean over examples of `term(gradient)` for every single weight, the gradient taken example by example.

    Example by example makes the result independent of how the set is split into batches. It costs 4 bytes per weight of
    `names`, on the weight's device; a gradient is added and freed before the next one is formed.

    Args:
        model: the model, at its current weights.
        names: parameters to look at.
        probe: data; rows without a label are passed over.
        term: gradient of one example → fp32 of the same shape, e.g. `scores.fisher`.
        samples: examples to look at, the first of the probe; default all.

    Returns:
        Name → mean in fp32, in the parameter's shape; 0 where no gradient arrives (an expert that gets no token).

    Raises:
        ValueError: where the loss is missing, a gradient is not finite, or the probe has fewer than `samples` examples.
    """
    sums: dict[str, Tensor] = {}

    def visit(name: str, gradient: Tensor) -> None:
        sums[name] = sums[name].add_(term(gradient)) if name in sums else term(gradient)

    seen = _visit_gradients(model, names, probe, visit, samples)
    if samples is not None and seen < samples:
        raise ValueError(f"samples={samples}: the probe has {seen} examples with labels; give it more, or ask for fewer")
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise ValueError(f"{name}: has gradients that are not finite; check model and data (float16 overflows)")
    parameters = dict(model.named_parameters())
    return {name: sums[name].div_(seen) if name in sums else torch.zeros_like(parameters[name]).float() for name in names}


def _visit_gradients(
    model: nn.Module, names: Collection[str], probe: Probe, visit: Callable[[str, Tensor], None], samples: int | None = None
) -> int:
    """Give `visit` the name and gradient of each parameter for each example, and free it; return the number of examples."""
    parameters = dict(model.named_parameters())
    handles, kept, seen = [], {name: parameters[name].grad for name in names}, 0
    try:
        with quiet(model), torch.enable_grad():  # choosing runs under no_grad
            model.requires_grad_(False)
            for name in names:
                parameters[name].grad = None
                parameters[name].requires_grad_(True)
                handles.append(parameters[name].register_post_accumulate_grad_hook(_visiting(visit, name)))
            for example in islice(_examples(model, probe), samples):
                loss = probe.loss(model, example)
                if not loss.requires_grad:
                    raise ValueError(f"probe: the loss depends on none of {', '.join(list(names)[:3])} …; include others")
                loss.backward()
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
        for name, gradient in kept.items():
            parameters[name].grad = gradient
    if not seen:
        raise ValueError("probe: every label is -100, so that there is no gradient; check the mask and the length limit")
    return seen


class _Mask:
    """The attention mask of the batch that is under way."""

    tokens: Tensor | None = None

    def select(self, x: Tensor, name: str) -> Tensor:
        """Rows of `x` `[..., I]` that belong to real tokens, `[tokens, I]`."""
        rows = x.reshape(-1, x.shape[-1])
        if self.tokens is None:
            return rows
        if self.tokens.dim() != 2 or self.tokens.numel() != rows.shape[0]:
            raise ValueError(
                f"probe: the attention_mask has shape {list(self.tokens.shape)}, {name} reads {rows.shape[0]} tokens; give "
                "batches with one mask entry per token"
            )
        return rows[self.tokens.flatten().bool()]


def _visiting(visit: Callable[[str, Tensor], None], name: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        visit(name, parameter.grad)
        parameter.grad = None

    return hook


def _add(squares: dict[str, Tensor], name: str, fresh: Tensor) -> None:
    squares[name] = squares[name] + fresh.cpu() if name in squares else fresh.cpu()


def _squares(weight: Tensor, dim: int) -> Tensor:
    """Summed squares per position along `dim`, fp64 `[shape[dim]]`."""
    others = [d for d in range(weight.dim()) if d != dim]
    return weight.float().square().sum(others, dtype=torch.float64)


def _readers(layers: list[Layer], structures: Collection[str]) -> Iterator[Projection]:
    roles = dict.fromkeys(STRUCTURES[structure][0] for structure in structures)
    for layer in layers:
        yield from (layer.projections[role] for role in roles if role in layer.projections)


def _norms(layers: list[Layer], squares: Mapping[str, Tensor]) -> Norms:
    norms: Norms = {}
    for layer in layers:
        for structure, (reader, _) in STRUCTURES.items():
            units = units_of(layer, structure)
            if not units or layer.projections[reader].parameter not in squares:
                continue
            projection = layer.projections[reader]
            per_reader = projection.per_unit(squares[projection.parameter].cpu())
            per_unit = per_reader.view(units, -1).sum(-1)  # the query heads of one key-value head stand together
            if not bool(per_unit.isfinite().all()):
                raise ValueError(f"{projection.parameter}: its {structure} have norms that are not finite; check model and data")
            norms[layer.name, structure] = per_unit.sqrt()
    return norms


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every flag and the random state put back afterwards."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
            for parameter, flag in required.items():
                parameter.requires_grad_(flag)


def _on_device(model: nn.Module, probe: Probe) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    found = False
    for batch in probe.batches():
        found = True
        yield batch_on(batch, device)
    if not found:
        raise ValueError("probe: it has no batches to calibrate on; give it data")


def _examples(model: nn.Module, probe: Probe) -> Iterator[dict[str, Any]]:
    """The rows of all batches, one at a time, without those that have no label to learn from."""
    for batch in _on_device(model, probe):
        rows = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
        for row in range(rows):
            example = rows_of(batch, slice(row, row + 1), rows)
            labels = example.get("labels")
            if not isinstance(labels, Tensor) or bool((labels != IGNORED).any()):
                yield example
