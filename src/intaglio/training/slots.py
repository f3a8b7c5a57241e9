"""All slots of a model, and how gradients get there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, final

from torch import Tensor, nn

from ..core.entries import Slices
from ..core.selection import Selection
from ..model.structure import is_transposed
from .averaging import Averaging
from .fixed_slot import FixedSlot
from .slot import Slot

__all__ = ["Slots"]


@final
class Slots(nn.Module):
    """All slots of a model, registered on it so that clipping, counting and sharding see their parameters.

    Attributes:
        averaging: the mean of their gradients over processes; set once all are there.

    Raises:
        ValueError: for a name the model does not have, or a weight that is not floating point (quantized).
    """

    averaging: Averaging

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

    def follow_loaded(self) -> None:
        """Take over weights that somebody else loaded into the model since the slots were written; cheap where nobody did.

        Raises:
            ValueError: where values and weights moved apart, each by itself.
        """
        for slot in self:
            if slot.was_loaded:
                slot.reconcile()

    def reconcile(self) -> None:
        """Make sure that the weights are the values, before they leave the model.

        Raises:
            ValueError: where the model was cast to another type since the slots were made, and as `follow_loaded`.
        """
        for slot in self:
            if slot.target.dtype != slot.base_dtype:
                raise ValueError(
                    f"{slot.name}: attached as {slot.base_dtype}, now {slot.target.dtype}: no base has these values; "
                    "load the model in the type you want and attach then"
                )
        moved = [slot.name for slot in self if slot.reconcile()]
        if moved:
            warnings.warn(
                "values changed without reaching the weights: build the optimizer with tuner.optimizer(...), or call "
                "tuner.watch(optimizer)",
                stacklevel=3,
            )


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
