"""Compact trainable values for the chosen entries, and how their gradients get there.

A slot holds the values of one parameter's entries in fp32 (or the weight's own wider type). The optimizer sees slots
only: weight decay cannot reach a frozen entry, optimizer state is O(chosen), and updates too small for a bf16 weight
add up in the slot. After each update the slot is written into the live weight, rounded to its type.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import partial_linear
from .selection import Entries, Selection, Slices, Whole
from .structure import is_transposed

__all__ = ["Slot", "Slots", "fingerprint", "refuse_differing_ranks"]


class Slot(nn.Module):
    """The trainable values of one parameter.

    Attributes:
        base_dtype: type of the base weight at attach.
        values: parameter of shape `entries.values_shape`, at least fp32. A whole parameter of at least fp32 is its
            own slot and costs nothing extra.
        target: the live base weight.
        fingerprint: of the base values at the chosen entries, taken before training.
        is_alias: whether `values` is the weight itself.
        is_gathered: whether the gradient is gathered from the dense one, outside the autograd graph.
    """

    def __init__(self, name: str, target: nn.Parameter, entries: Entries) -> None:
        super().__init__()
        self.name, self.base_dtype = name, target.dtype
        self.entries = entries.to(target.device)
        self._target = (target,)  # in a tuple, so that it is not registered a second time
        dtype = torch.promote_types(target.dtype, torch.float32)
        self.is_alias = isinstance(entries, Whole) and dtype == target.dtype
        base = self.entries.gather(target)
        self.fingerprint = fingerprint(base)
        self.values = target if self.is_alias else nn.Parameter(base.to(dtype))
        self.is_gathered = False
        self._remove: Callable[[], None] = lambda: None

    @property
    def target(self) -> nn.Parameter:
        return self._target[0]

    def write(self) -> None:
        """Write the values into the base weight."""
        if not self.is_alias:
            self.entries.scatter_(self.target, self.values.detach())

    def is_stale(self) -> bool:
        """Whether the base weight differs from the values, rounded to its type."""
        return not self.is_alias and not torch.equal(self.entries.gather(self.target), self.values.detach().to(self.target))

    def connect(self, module: nn.Module | None, *, partial: bool) -> None:
        """Let gradients reach `values`: through a partial product in `module`, else gathered from the dense one."""
        if self.is_alias:
            self.target.requires_grad_(True)
        elif module is not None and partial:
            partial_linear.install(module, self, transposed=is_transposed(module))
            self._remove = lambda: partial_linear.remove(module)
        else:
            self.is_gathered = True
            self.target.requires_grad_(True)
            self._remove = self.target.register_post_accumulate_grad_hook(self._gather_gradient).remove

    def disconnect(self) -> None:
        """Undo `connect`; the weight keeps its present values."""
        self._remove()
        self.target.requires_grad_(False)

    def _gather_gradient(self, target: Tensor) -> None:
        """Keep the chosen entries of the dense gradient and free it at once."""
        assert target.grad is not None
        chosen = self.entries.gather(target.grad).to(self.values.dtype)
        self.values.grad = chosen if self.values.grad is None else self.values.grad.add_(chosen)
        target.grad = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        """Follow the model to another device, never to a narrower type: `model.bfloat16()` leaves slots in fp32."""
        if not self.is_alias:
            device = fn(torch.empty(0, device=self.values.device)).device
            self.values.data = self.values.data.to(device)
            self.values.grad = None if self.values.grad is None else self.values.grad.to(device)
            self.entries = self.entries.to(device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write nothing: the base weight already holds the values, so `model.state_dict()` stays an ordinary one."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Read nothing, for the same reason."""


class Slots(nn.Module):
    """All slots of a model, registered on it so that clipping, counting and sharding see their parameters.

    Raises:
        ValueError: for a name the model does not have, or a weight that is not floating point (quantized).
    """

    REGISTERED_AS = "intaglio_slots"

    def __init__(self, model: nn.Module, selection: Selection, *, partial: bool = True) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        _check(parameters, selection)
        owners = _linear_owners(model) if partial else {}
        for name, entries in selection.items():
            slot = Slot(name, parameters[name], entries)
            self.add_module(name.replace(".", "/"), slot)
            slot.connect(owners.get(name), partial=isinstance(entries, Slices))

    def __iter__(self) -> Iterator[Slot]:
        for slot in self.children():
            assert isinstance(slot, Slot)
            yield slot

    def __getitem__(self, name: str) -> Slot:
        slot = self.get_submodule(name.replace(".", "/"))
        assert isinstance(slot, Slot)
        return slot

    def forward(self, x: Any) -> Any:
        """Pass on what comes in: a model that is an `nn.Sequential` calls all its children in turn."""
        return x

    def write(self) -> None:
        """Write every slot into its base weight."""
        for slot in self:
            slot.write()

    def values(self) -> dict[str, Tensor]:
        """Name → a copy of the values, in full precision."""
        return {slot.name: slot.values.detach().clone() for slot in self}

    def fingerprints(self) -> dict[str, str]:
        """Name → fingerprint of the base values."""
        return {slot.name: slot.fingerprint for slot in self}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], fingerprints: Mapping[str, str]) -> None:
        """Take over values saved earlier, and write them.

        Raises:
            ValueError: where they belong to other entries or another base; nothing is changed then.
        """
        for slot in self:
            if fingerprints.get(slot.name) != slot.fingerprint or values[slot.name].shape != slot.values.shape:
                raise ValueError(
                    f"resume: {slot.name}: the checkpoint has other entries, or another base model, or permute or exclude "
                    "has changed since"
                )
        for slot in self:
            slot.values.copy_(values[slot.name])
        self.write()

    def settle(self) -> None:
        """Make sure that the weights are the values, before they leave the model.

        Raises:
            ValueError: where the model was cast to another type since the slots were made.
        """
        for slot in self:
            if slot.target.dtype != slot.base_dtype:
                raise ValueError(
                    f"{slot.name}: attached as {slot.base_dtype}, now {slot.target.dtype}: no base has these values; "
                    "load the model in the type you want and attach then"
                )
        if any(slot.is_stale() for slot in self):
            warnings.warn(
                "values changed without reaching the weights: build the optimizer with tuner.optimizer(...), or call "
                "tuner.watch(optimizer)",
                stacklevel=3,
            )
            self.write()


def refuse_differing_ranks(selection: Selection) -> None:
    """Refuse to go on where the processes of a distributed run chose different entries.

    Raises:
        ValueError: on every rank.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    own = [(name, e.kind, None if isinstance(e, Whole) else fingerprint(e.flat())) for name, e in selection.items()]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    if any(other != own for other in ranks):
        raise ValueError("the processes of this run chose different entries; give every one the same probe, seed and exclude")


def fingerprint(values: Tensor) -> str:
    """Hash of a tensor's exact bytes, type and shape: 16 hex digits of SHA-256."""
    header = f"{values.dtype}{list(values.shape)}".encode()
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(header + raw.tobytes()).hexdigest()[:16]


def _check(parameters: dict[str, nn.Parameter], selection: Selection) -> None:
    for name, entries in selection.items():
        if name not in parameters:
            raise ValueError(f"selection: the model has no parameter {name!r}")
        if not parameters[name].is_floating_point():
            raise ValueError(
                f"{name}: stored as {parameters[name].dtype} (quantized); sparse training changes weights in place "
                "and needs a floating-point base: load the model without quantization"
            )
        if tuple(parameters[name].shape) != entries.shape:
            raise ValueError(f"{name}: shape {list(parameters[name].shape)}, the selection was made for {list(entries.shape)}")


def _linear_owners(model: nn.Module) -> dict[str, nn.Module]:
    """Weight name → its layer, where a partial product is exact: a plain linear layer whose weight nobody shares."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    owners = {}
    for name, module in model.named_modules():
        plain = type(module) is nn.Linear or is_transposed(module)
        # An own `forward` means somebody (accelerate's offloading, say) already stands in between: stay out.
        weight = module._parameters.get("weight")  # none under weight_norm and its like
        if plain and weight is not None and "forward" not in module.__dict__ and uses[id(weight)] == 1:
            owners[f"{name}.weight" if name else "weight"] = module
    return owners
