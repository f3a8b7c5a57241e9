"""Co-permutation: heads and channels reordered so that the chosen ones are adjacent and their slice is dense.

A layout, not a selection: the model computes what it did, the order is undone exactly at detach, and a Delta never sees
it. What moves together (S2FT, arXiv 2412.06289, section 3.1): rows of up and gate with columns of down; rows of q with
columns of o, and rows of k and v, where query heads move inside their key-value group and groups move whole; the biases
of what produces units, and norms over concatenated heads. Hidden-size axes never move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.entries import Entries, Slices
from ..core.fingerprint import fingerprint
from ..core.probe import Probe, batch_on
from ..core.selection import Selection
from .calibration import decoder_of, inputs_of, quiet
from .structure import Layer, Projection, describe, refuse_shared

__all__ = ["Layout", "co_permute"]

# Greatest root mean square of the outputs' change, relative to theirs, that summing in another order may cause.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
_FINE = 1e-5  # in fp64 too: models compute norms and rotations in fp32


@final
class Layout:
    """An order in which the positions of a base model lie now; empty for a model in its own order.

    Attributes:
        orders: parameter name → (dim, order): position i along dim now holds position `order[i]` of the base.
        fingerprints: parameter name → fingerprint of the base values at its chosen entries, for those that moved.
    """

    def __init__(self, orders: Mapping[str, tuple[int, Tensor]] | None = None) -> None:
        self.orders = dict(orders or {})
        self.fingerprints: dict[str, str] = {}

    def apply_(self, model: nn.Module) -> None:
        """Reorder `model` in place."""
        for name, (dim, order) in self.orders.items():
            _reorder_(model.get_parameter(name), dim, order)

    def revert_(self, model: nn.Module) -> None:
        """Put everything back, bit for bit.

        Raises:
            ValueError: where a parameter has gone or has another shape; nothing is changed then.
        """
        parameters = dict(model.named_parameters())
        for name, (dim, order) in self.orders.items():
            if name not in parameters or parameters[name].shape[dim] != len(order):
                raise ValueError(
                    f"{name}: was permuted at attach and is no longer there in that shape; the order cannot be undone"
                )
        for name, (dim, order) in self.orders.items():
            _reorder_(parameters[name], dim, order.argsort())

    def entries(self, selection: Selection) -> Selection:
        """The selection in the coordinates of this layout."""
        return Selection({name: self.moved(name, entries)[0] for name, entries in selection.items()})

    def gather(self, name: str, entries: Entries, weight: Tensor) -> Tensor:
        """Values at base coordinates `entries` from a weight in this layout."""
        if name not in self.orders:
            return entries.to(weight.device).gather(weight)
        assert isinstance(entries, Slices)  # co_permute has refused all else
        dim, order = self.orders[name]
        return weight.detach().index_select(dim, order.argsort()[entries.index.cpu()].to(weight.device))

    def moved(self, name: str, entries: Entries) -> tuple[Entries, Tensor | None]:
        """Base coordinates `entries` in this layout, and the order that sorts their compact values along its dimension.

        Raises:
            ValueError: where the parameter moved and the entries are no slices along the dimension that did.
        """
        if name not in self.orders:
            return entries, None
        dim, order = self.orders[name]
        if not (isinstance(entries, Slices) and entries.dim == dim):
            raise ValueError(
                f"{name}: the model is permuted along dimension {dim}, and these entries are not chosen along it; use an "
                "unpermuted model"
            )
        places = order.argsort()[entries.index.cpu()].sort()
        return Slices(entries.shape, dim, places.values), places.indices


def co_permute(model: nn.Module, selection: Selection, probe: Probe | None) -> Layout:
    """Reorder `model` in place so that the chosen heads and channels come first, and prove that its outputs stay.

    Args:
        model: a transformer; its weights are reordered.
        selection: slices that are whole heads or channels.
        probe: its first batch is the input of the proof; default a few token ids.

    Returns:
        The layout, which undoes itself.

    Raises:
        ValueError: where nothing chosen can be made adjacent, a weight is shared, or the outputs change; the model is
            then as it was.
    """
    layout = _plan(model, selection)
    parameters = dict(model.named_parameters())
    layout.fingerprints = {
        name: fingerprint(entries.to(parameters[name].device).gather(parameters[name]))
        for name, entries in selection.items()
        if name in layout.orders
    }
    sample = _sample(model, probe)
    before = _outputs(model, sample)
    layout.apply_(model)
    try:
        _check_outputs(before, _outputs(model, sample))
    except BaseException:
        layout.revert_(model)
        raise
    return layout


def _plan(model: nn.Module, selection: Selection) -> Layout:
    parameters = dict(model.named_parameters())
    orders: dict[str, tuple[int, Tensor]] = {}
    layers = describe(model)
    refuse_shared(model, layers)
    for layer in layers:
        for role, units in _unit_orders(layer, selection).items():
            for name, dim, now, base in _moves(layer, role, units, parameters):
                _, order = orders.setdefault(name, (dim, torch.arange(parameters[name].shape[dim])))
                order[now] = base
    if not orders:
        raise ValueError("permute=True has no effect: no whole heads or channels are chosen; use permute=False")
    for name, entries in selection.items():
        if name in orders and not (isinstance(entries, Slices) and entries.dim == orders[name][0]):
            raise ValueError(f"permute=True: {name} is chosen entry by entry, not by head or channel; use permute=False")
    return Layout(orders)


def _unit_orders(layer: Layer, selection: Selection) -> dict[str, Tensor]:
    """Role → the order of its units, those chosen most often first; roles of one structure share it."""
    roles = layer.projections
    votes = {role: _votes(projection, selection) for role, projection in roles.items()}
    orders: dict[str, Tensor] = {}
    ffn = [role for role in ("up", "gate", "down") if role in roles]
    channels = torch.stack([votes[role] for role in ffn]).sum(0)
    if channels.any():
        orders |= dict.fromkeys(ffn, channels.argsort(descending=True, stable=True))
    if "k" not in roles:  # no heads, or heads whose keys another layer has
        return orders
    keys = [role for role in ("k", "v") if role in roles]
    shared, own = torch.stack([votes[role] for role in keys]).sum(0), (votes["q"] + votes["o"]).view(roles["k"].units, -1)
    if shared.any() or own.any():
        groups, heads = _head_orders(shared, own)
        orders |= dict.fromkeys(keys, groups) | {"q": heads, "o": heads}
    return orders


def _head_orders(shared: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of key-value groups and query heads that make both chosen sets adjacent wherever that is possible.

    Groups chosen for k or v stand before those that are not; among the former, those whose query heads are chosen come
    last, among the latter first. A group of which only some query heads are chosen stands at an end, its chosen heads
    turned inwards; two such at one end leave a gap, which the index bridges.

    Args:
        shared: times each group is chosen for k or v, `[groups]`.
        own: times each query head is chosen for q or o, `[groups, heads per group]`.
    """
    width = own.shape[1]
    chosen = (own > 0).sum(1).tolist()

    def place(group: int) -> tuple[int, int]:
        part = 0 if chosen[group] == 0 else 2 if chosen[group] == width else 1
        return (part if shared[group] else 5 - part), -chosen[group]

    groups = sorted(range(len(chosen)), key=place)
    heads = [g * width + own[g].argsort(descending=not (shared[g] and chosen[g] < width), stable=True) for g in groups]
    return torch.tensor(groups), torch.cat(heads)


def _votes(projection: Projection, selection: Selection) -> Tensor:
    """1 for each unit that is chosen, else 0."""
    votes = torch.zeros(projection.units, dtype=torch.int64)
    entries = selection.get(projection.parameter)
    if isinstance(entries, Slices) and entries.dim == projection.dim:
        votes[projection.owners(entries.index.cpu())] = 1
    return votes


def _moves(
    layer: Layer, role: str, units: Tensor, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """(parameter, dim, positions, base positions they take) for everything that moves with a role's units."""
    projection = layer.projections[role]
    now, base = projection.places(torch.arange(projection.units)).flatten(), projection.places(units).flatten()
    yield projection.parameter, projection.dim, now, base
    alone = projection.parameter.endswith(".weight")
    bias = projection.parameter.removesuffix("weight") + ("bias" if alone else "_bias")  # of all experts, [experts, out]
    if role not in ("o", "down") and bias in parameters:
        yield bias, parameters[bias].dim() - 1, now, base
    positions = torch.arange(projection.units * projection.width).view(projection.units, -1)
    for follower in layer.followers.get(role, ()):
        if parameters[follower].shape[0] == positions.numel():  # else it is shared by all heads, and stays
            yield follower, 0, positions.flatten(), positions[units].flatten()
    for name in layer.per_head if role == "q" else ():
        yield name, 0, torch.arange(projection.units), units


@torch.no_grad()
def _reorder_(parameter: nn.Parameter, dim: int, order: Tensor) -> None:
    parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))


def _sample(model: nn.Module, probe: Probe | None) -> dict[str, Any]:
    device = next(model.parameters()).device
    if probe is not None:
        return inputs_of(model, batch_on(next(iter(probe.batches())), device))
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    if vocabulary is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"permute=True: {type(model).__name__} has no config to make a sample input from, or reads more than token ids, and "
            "the outputs must be checked; give attach a probe, e.g. probe=Batches([batch])"
        )
    ids = ((torch.arange(32) * 7 + 3) % vocabulary).view(2, 16).to(device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if decoder_of(model) is not None else {})


@torch.no_grad()
def _outputs(model: nn.Module, sample: Mapping[str, Any]) -> Tensor:
    with quiet(model):
        found = model(**sample)
    return found if isinstance(found, Tensor) else found["logits"] if "logits" in found else found[0]


def _check_outputs(before: Tensor, after: Tensor) -> None:
    change = (after.double() - before.double()).square().mean().sqrt() / before.double().square().mean().sqrt()
    allowed = _TOLERANCE.get(before.dtype, _FINE)
    if not change <= allowed:
        raise ValueError(
            f"permute=True changes the model's outputs by {change:.1e} of their size ({allowed:.0e} allowed): this architecture "
            "couples its heads or channels in a way not known here; use permute=False, which trains the same weights"
        )
