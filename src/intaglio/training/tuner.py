"""A tuner, the trainable part of a model: sequencing only. This file names no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..adapter.rest import Rest
from ..core.fingerprint import ATTACHED
from ..core.selection import Selection
from ..method_kinds.method import NOTHING, Method
from ..model import peft_layers
from .averaging import Averaging, refuse_apart
from .regime import Regime
from .slots import Slots

__all__ = ["Tuner"]


@final
class Tuner:
    """The trainable part of a model. Made by `attach`.

    Attributes:
        model: the model, with the slots registered on it.
        regimes: what decides, as training goes on, what trains next; each is asked in turn.
        layout: where the chosen entries lie now, if the model was permuted.
        slots: the compact trainable values.
        step: optimizer updates made so far.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        regimes: list[Regime[Any]],
        *,
        base: str | None,
        partial: bool,
        rest: Rest | None = None,
    ) -> None:
        self.model, self.regimes, self.step = model, regimes, 0
        self.layout, self._by_name = regimes[0].layout, {regime.name: regime for regime in regimes}
        self._together = False  # whether the processes were seen to train alike
        self._method, self._base = method, base if base is not None else _base_name(model)
        self._rest = rest
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        try:
            self.slots = Slots(model, regimes[0].start, partial=partial)
        except BaseException:
            self.layout.revert_(model)
            self._restore_requires_grad()
            raise
        try:
            for regime in regimes:
                regime.connect(self.slots)
        except BaseException:
            self._take_off()
            raise
        model.add_module(ATTACHED, self.slots)
        self.slots.averaging = Averaging(model, list(self.slots))
        if not any(regime.averages for regime in regimes):
            self.slots.averaging.follow()

    @property
    def method(self) -> Method:
        """The method that chooses, with the length of the run once that is known."""
        return self._method.with_inner(self.regimes[0].method)

    @property
    def selection(self) -> Selection:
        """What may change, in the base's coordinates; so far, where the method chooses while training."""
        chosen = NOTHING
        for regime in self.regimes:
            chosen = chosen.union(regime.selection)
        return Selection({name: chosen[name] for name, _ in self.model.named_parameters() if name in chosen})

    @property
    def unmasking(self) -> Any:
        """The `Unmasking` of a method that chooses while training, such as ID3; None for others."""
        return self._by_name.get("unmasking")

    @property
    def rotation(self) -> Any:
        """The `Rotation` of a method that trains layers in turn, such as IST; None for others."""
        return self._by_name.get("rotation")

    def parameters(self) -> list[nn.Parameter]:
        """The trainable values, one compact tensor per selected parameter, in selection order."""
        return [slot.values for slot in self.slots]

    def optimizer(self, cls: Callable[..., torch.optim.Optimizer], **kwargs: Any) -> torch.optim.Optimizer:
        """Build `cls(parameters, **kwargs)` and keep the weights in step with it; errors as `watch`."""
        for regime in self.regimes:
            regime.refuse_optimizer(cls)
        return self.watch(cls(self.parameters(), **kwargs))

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Write the values into the weights after each step of an optimizer that was built elsewhere.

        Raises:
            ValueError: for LBFGS, which evaluates the model inside a step, between writes.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "optimizer LBFGS: evaluates the model inside a step, where the weights are not yet written; use another"
            )
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        for regime in self.regimes:
            regime.watch(optimizer)
        optimizer.register_step_post_hook(lambda stepped, *_: self._after_step(stepped))
        return optimizer

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradient of this update so that its norm is at most `max_norm`; call it between backward and step.

        `torch.nn.utils.clip_grad_norm_(model.parameters(), …)` does the same, but for `Updates(clip="dense")`, where it
        cannot see what is compared here.

        Returns:
            The norm before.
        """
        parameters = self.parameters()
        told = (norm for regime in self.regimes if (norm := regime.norm()) is not None)
        norm = next(told, None)
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def delta(self) -> Delta:
        """The trained values as an artefact, in the base's type.

        Raises:
            ValueError: where the model was cast to another type since `attach`.
        """
        self.slots.reconcile()
        values = {name: self.layout.gather(name, e, self.slots[name].target) for name, e in self.selection.items()}
        fingerprints = self.slots.fingerprints() | self.layout.fingerprints
        rest = None if self._rest is None else self._rest.without(values)
        return Delta(self.selection, values, fingerprints, self.method.to_dict(), self._base, self._weights(), rest)

    def save(self, directory: str | Path) -> Path:
        """Save the adapter folder: `delta().save(directory)`; of a PEFT model, its own complete adapter folder."""
        if peft_layers.is_peft(self.model):
            self.slots.reconcile()
            return peft_layers.save(self.model, directory)
        return self.delta().save(directory)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the optimizer: values in full precision, step, and the state of the regimes."""
        self.slots.follow_loaded()
        state = {"method": self.method.to_dict(), "step": self.step}
        state |= {regime.name: regime.state() for regime in self.regimes}
        return state | {"slots": self.slots.state(), "fingerprints": self.slots.fingerprints()}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another method, or of one under other conditions; entries and base are not looked at.

        Raises:
            ValueError: naming what differs.
        """
        for regime in self.regimes:
            regime.check(state["method"], state.get(regime.name))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: where it comes from another method, other entries or another base; nothing is changed then.
        """
        self.check(state)
        self.slots.load(state["slots"], state["fingerprints"])
        self.step = int(state["step"])
        for regime in self.regimes:
            regime.load(self.step, state["method"], state.get(regime.name))

    def detach(self) -> nn.Module:
        """Take everything of ours off the model and return it, an ordinary model with the tuned weights.

        Raises:
            ValueError: where it is detached already, or permuted weights were replaced since attach.
        """
        if self.model._modules.get(ATTACHED) is not self.slots:
            raise ValueError("this tuner is detached already; attach again to go on training")
        self.slots.averaging.release()
        self._take_off()
        del self.model._modules[ATTACHED]
        return self.model

    def _take_off(self) -> None:
        for regime in self.regimes:
            regime.release()
        for slot in self.slots:
            slot.reconcile()
        self.layout.revert_(self.model)
        for slot in self.slots:
            slot.disconnect()
        self._restore_requires_grad()

    def _weights(self) -> int:
        """Number of weights of the model, without the slots' own."""
        own = {id(parameter) for parameter in self.slots.parameters()} - {id(slot.target) for slot in self.slots}
        return sum(parameter.numel() for parameter in self.model.parameters() if id(parameter) not in own)

    def _before_step(self) -> None:
        if not self._together:
            refuse_apart(self.model, list(self.slots))
            self._together = True
        self.slots.follow_loaded()

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.slots.write()
        self.step += 1
        for regime in self.regimes:
            regime.after_step(self.step, optimizer)

    def _restore_requires_grad(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required.get(name, False))


def _base_name(model: nn.Module) -> str | None:
    """The hub name the model was loaded by; a local path says nothing to others and is left out."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return None if name is None or Path(name).exists() else name
