"""Compact trainable values for the chosen entries, and how their gradients get there.

A slot holds the values of one parameter's entries in fp32 (or the weight's own wider type). The optimizer sees slots
only: weight decay cannot reach a frozen entry, optimizer state is O(chosen), and updates too small for a bf16 weight
add up in the slot. After each update the slot is written into the live weight, rounded to its type.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.fingerprint import fingerprint
from ..core.selection import Entries, Selection, Slices, Whole
from ..model.structure import is_transposed
from . import partial_linear

__all__ = ["FixedSlot", "Slot", "Slots", "damped_values", "refuse_differing_ranks"]


class Slot(nn.Module, ABC):
    """The trainable values of one parameter.

    Attributes:
        name: of the parameter.
        base_dtype: type of the base weight at attach.
        target: the live base weight.
        values: the compact trainable values, at least fp32.
        is_alias: whether `values` is the weight itself.
        is_gathered: whether the gradient is gathered from the dense one, outside the autograd graph.
    """

    is_alias = is_gathered = False

    def __init__(self, name: str, target: nn.Parameter, values: nn.Parameter) -> None:
        super().__init__()
        self.name, self.base_dtype, self.values = name, target.dtype, values
        self._target = (target,)  # in a tuple, so that it is not registered a second time
        self._remove: Callable[[], None] = lambda: None

    @property
    def target(self) -> nn.Parameter:
        return self._target[0]

    @property
    @abstractmethod
    def fingerprint(self) -> str | None:
        """Of the base values at the chosen entries, taken before training; None where none is chosen yet."""

    @abstractmethod
    def write(self) -> None:
        """Write the values into the base weight."""

    @abstractmethod
    def is_stale(self) -> bool:
        """Whether the base weight differs from the values, rounded to its type."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, by kind: copies."""

    @abstractmethod
    def check(self, state: Mapping[str, Tensor], fingerprint: str | None) -> None:
        """Refuse a state that is not this slot's.

        Raises:
            ValueError: where it belongs to other entries or another base.
        """

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that `check` has passed."""

    def activate(self, active: bool) -> None:
        """Let gradients reach `values`, or none: then nothing is kept for backward and no gradient is left."""
        (self.target if self.is_alias or self.is_gathered else self.values).requires_grad_(active)
        if not active:
            self.values.grad = None

    @abstractmethod
    def keep_start(self) -> None:
        """Remember the present values of the weight, which `damp` damps toward."""

    @abstractmethod
    def damp(self, factor: float) -> Callable[[], None]:
        """Write start + factor · (tuned − start) into the weight; what is returned writes the exact tuned values back."""

    def disconnect(self) -> None:
        """Let no more gradients reach `values`; the weight keeps its present values."""
        self._remove()
        self.target.requires_grad_(False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write nothing: the base weight already holds the values, so `model.state_dict()` stays an ordinary one."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Read nothing, for the same reason."""


@final
class FixedSlot(Slot):
    """Values of entries that were chosen before training.

    Attributes:
        entries: the chosen entries, on the weight's device.
        values: of shape `entries.values_shape`. A whole parameter of at least fp32 is its own slot and costs nothing extra.
    """

    def __init__(self, name: str, target: nn.Parameter, entries: Entries) -> None:
        placed = entries.to(target.device)
        dtype = torch.promote_types(target.dtype, torch.float32)
        is_alias = isinstance(entries, Whole) and dtype == target.dtype
        base = placed.gather(target)
        super().__init__(name, target, target if is_alias else nn.Parameter(base.to(dtype)))
        self.entries, self.is_alias, self._fingerprint = placed, is_alias, fingerprint(base)
        self._start: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def write(self) -> None:
        if not self.is_alias:
            self.entries.scatter_(self.target, self.values.detach())

    def is_stale(self) -> bool:
        return not self.is_alias and not torch.equal(self.entries.gather(self.target), self.values.detach().to(self.target))

    def keep_start(self) -> None:
        self._start = self.entries.gather(self.target).clone()

    @torch.no_grad()
    def damp(self, factor: float) -> Callable[[], None]:
        assert self._start is not None
        tuned = self.entries.gather(self.target).clone()
        self.entries.scatter_(self.target, damped_values(self._start, tuned, factor))
        return lambda: self.entries.scatter_(self.target, tuned)

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

    def state(self) -> dict[str, Tensor]:
        return {"values": self.values.detach().clone()}

    def check(self, state: Mapping[str, Tensor], fingerprint: str | None) -> None:
        if fingerprint != self.fingerprint or "values" not in state or state["values"].shape != self.values.shape:
            raise ValueError(
                f"resume: {self.name}: the checkpoint has other entries, or another base model, or permute or exclude "
                "has changed since"
            )

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        self.values.copy_(state["values"])

    def _gather_gradient(self, target: Tensor) -> None:
        """Keep the chosen entries of the dense gradient and free it at once."""
        assert target.grad is not None
        chosen = self.entries.gather(target.grad).to(self.values.dtype)
        self.values.grad = chosen if self.values.grad is None else self.values.grad.add_(chosen)
        target.grad = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedSlot:
        """Follow the model to another device, never to a narrower type: `model.bfloat16()` leaves slots in fp32."""
        if not self.is_alias:
            device = fn(torch.empty(0, device=self.values.device)).device
            self.values.data = self.values.data.to(device)
            self.values.grad = None if self.values.grad is None else self.values.grad.to(device)
            self.entries = self.entries.to(device)
        if self._start is not None:
            self._start = fn(self._start)
        return self


@final
class Slots(nn.Module):
    """All slots of a model, registered on it so that clipping, counting and sharding see their parameters.

    Raises:
        ValueError: for a name the model does not have, or a weight that is not floating point (quantized).
    """

    def __init__(self, model: nn.Module, selection: Selection, *, partial: bool = True) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        _check(parameters, selection)
        owners = _linear_owners(model) if partial else {}
        for name, entries in selection.items():
            slot = FixedSlot(name, parameters[name], entries)
            self.register(slot)
            slot.connect(owners.get(name), partial=isinstance(entries, Slices))

    def register(self, slot: Slot) -> None:
        """Add one more slot."""
        self.add_module(slot.name.replace(".", "/"), slot)

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

    def state(self) -> dict[str, Tensor]:
        """`KIND/NAME` → tensor: what a resumed run needs of every slot, in full precision."""
        return {f"{kind}/{slot.name}": tensor for slot in self for kind, tensor in slot.state().items()}

    def fingerprints(self) -> dict[str, str]:
        """Name → fingerprint of the base values."""
        return {slot.name: found for slot in self if (found := slot.fingerprint) is not None}

    def load(self, tensors: Mapping[str, Tensor], fingerprints: Mapping[str, str]) -> None:
        """Take over what `state` gave, and write it into the weights.

        Raises:
            ValueError: where it belongs to other entries or another base; nothing is changed then.
        """
        states: dict[str, dict[str, Tensor]] = {slot.name: {} for slot in self}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            states.setdefault(name, {})[kind] = tensor
        for slot in self:
            slot.check(states[slot.name], fingerprints.get(slot.name))
        for slot in self:
            slot.load(states[slot.name])
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


def damped_values(start: Tensor, tuned: Tensor, factor: float) -> Tensor:
    """start + factor · (tuned − start), taken in at least fp32, in the type of `tuned`."""
    wide = torch.promote_types(tuned.dtype, torch.float32)
    return (start.to(wide) + factor * (tuned.to(wide) - start.to(wide))).to(tuned.dtype)


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
