"""Attach a method to a model: sequencing only. This file names no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..core.fingerprint import ATTACHED, is_attached
from ..core.probe import Probe
from ..core.selection import Selection, Whole
from ..method_kinds.layer_method import LayerMethod
from ..method_kinds.method import Method, State, refuse_foreign
from ..method_kinds.update_method import UpdateMethod
from ..model import peft_layers as adapters
from ..model.permute import Layout, co_permute
from .damping import part_of
from .rotation import Rotation
from .slots import Slots, refuse_differing_ranks
from .unmasking import Unmasking
from .updates import Updates, refuse_kind

__all__ = ["Tuner", "attach"]


def attach(
    model: nn.Module,
    method: Method,
    *,
    probe: Probe | None = None,
    exclude: Selection | None = None,
    base: str | None = None,
    partial: bool = True,
    permute: bool = False,
    selection: Selection | None = None,
    updates: Updates | None = None,
) -> Tuner:
    """Freeze `model`, let `method` choose what may change, and make just that trainable, in place.

    The model stays what it was: it trains, generates and saves as before, and its weights are always the tuned ones.

    Args:
        model: any `nn.Module`; methods that choose structures need a transformer.
        method: what to select, e.g. `S2FT(down=0.02)`.
        probe: data for methods that look at data.
        exclude: entries that must stay frozen, e.g. another adapter's selection.
        base: name of the base model for the adapter; default `model.config._name_or_path`, without local paths.
        partial: use the partial product where it is exact; False takes the dense gradient everywhere (the reference
            twin: same result, more memory).
        permute: reorder the chosen heads and channels to the front while attached, so that their slices are dense
            (co-permutation). Same result; outputs are checked; undone by `detach` and never visible in a Delta.
        selection: what `method` chose earlier, for a run that goes on; default: ask it.
        updates: for a method that chooses at every update, how gradients add up, are clipped and corrected; default
            `Updates()`.

    Parameters that are frozen (`requires_grad` False) while others are not stay frozen: on a PEFT model, the method
    chooses among the adapter's tensors.

    Returns:
        The tuner that owns the training state.

    Raises:
        ValueError: where the model is attached already, or the method does not fit it; the model is then unchanged.

    Example:
        >>> tuner = attach(model, S2FT(o=0.05, down=0.02))
        >>> optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3)
        >>> loss = model(**batch).loss; loss.backward(); optimizer.step(); optimizer.zero_grad()
        >>> tuner.save("adapter")
    """
    if is_attached(model):
        raise ValueError("this model has a tuner attached already; call its detach() first")
    refuse_foreign(exclude or Selection(), model)
    exclude = (exclude or Selection()).union(_frozen(model))
    layered = cast(LayerMethod, method) if method.phase == "layer" else None
    if layered is not None:
        adapters.refuse_prompts(model, type(method).__name__)
    if method.chooser.phase == "update":
        if permute or selection is not None:
            raise ValueError(
                f"permute, selection: no effect with {method.chooser.name!r}, which chooses single entries as it trains"
            )
        unmasking = Unmasking(model, cast(UpdateMethod, method.chooser), exclude, updates or Updates())
        tuner = Tuner(model, method, unmasking.whole, {}, Layout(), base=base, partial=partial, unmasking=unmasking)
        return tuner if layered is None else tuner.rotate(layered, probe)
    if updates is not None:
        raise ValueError(f"updates={updates}: no effect with {method.name!r}, which chooses before training; leave it out")
    state: State = {}
    if selection is None:
        selection, state = method.choose(state, model, 0, probe, exclude)
    if not selection:
        raise ValueError(f"{method}: selects nothing in this model")
    refuse_differing_ranks(selection)
    layout = co_permute(model, selection, probe) if permute else Layout()
    tuner = Tuner(model, method, selection, state, layout, base=base, partial=partial)
    return tuner if layered is None else tuner.rotate(layered, probe)


@final
class Tuner:
    """The trainable part of a model. Made by `attach`.

    Attributes:
        model: the model, with the slots registered on it.
        layout: where the chosen entries lie now, if the model was permuted.
        slots: the compact trainable values.
        unmasking: what chooses while training, where the method does.
        rotation: what lets layers train in turn, where the method does.
        step: optimizer updates made so far.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        selection: Selection,
        state: State,
        layout: Layout,
        *,
        base: str | None,
        partial: bool,
        unmasking: Unmasking | None = None,
    ) -> None:
        self.model, self.layout, self.unmasking, self.step = model, layout, unmasking, 0
        self.rotation: Rotation | None = None
        self._method, self._fixed, self._state = method, selection, state
        self._base = base if base is not None else _base_name(model)
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        try:
            self.slots = Slots(model, layout.entries(selection), partial=partial)
            if unmasking is not None:
                unmasking.connect(self.slots)
        except BaseException:
            layout.revert_(model)
            self._restore_requires_grad()
            raise
        model.add_module(ATTACHED, self.slots)

    @property
    def method(self) -> Method:
        """The method that chooses, with the length of the run once that is known."""
        return self._method if self.unmasking is None else self._method.choosing_by(self.unmasking.method)

    @property
    def selection(self) -> Selection:
        """What may change, in the base's coordinates; so far, where the method chooses while training."""
        if self.unmasking is None:
            return self._fixed
        both = self._fixed.union(self.unmasking.selection)
        return Selection({name: both[name] for name, _ in self.model.named_parameters() if name in both})

    def rotate(self, method: LayerMethod, probe: Probe | None) -> Tuner:
        """Let layers train in turn, as `method` draws them; `attach` does it. Returns the tuner.

        Raises:
            ValueError: where the method does not fit the model; the tuner is detached then.
        """
        parts = {slot.name: part_of(slot) for slot in self.slots}
        try:
            self.rotation = Rotation(self.model, method, parts, probe)
        except BaseException:
            self.detach()
            raise
        return self

    def parameters(self) -> list[nn.Parameter]:
        """The trainable values, one compact tensor per selected parameter, in selection order."""
        return [slot.values for slot in self.slots]

    def optimizer(self, cls: Callable[..., torch.optim.Optimizer], **kwargs: Any) -> torch.optim.Optimizer:
        """Build `cls(parameters, **kwargs)` and keep the weights in step with it; errors as `watch`."""
        if self.unmasking is not None:
            refuse_kind(cls)
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
        if self.unmasking is not None:
            self.unmasking.watch(optimizer)
        if self.rotation is not None:
            self.rotation.watch(optimizer)
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
        if self.unmasking is not None and self.unmasking.updates.clip == "dense":
            whole = [self.slots[name].values.grad for name in self._fixed]
            norm = torch.nn.utils.get_total_norm([self.unmasking.norm(), *(g for g in whole if g is not None)]).float()
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def delta(self) -> Delta:
        """The trained values as an artefact, in the base's type.

        Raises:
            ValueError: where the model was cast to another type since `attach`.
        """
        self.slots.settle()
        values = {name: self.layout.gather(name, e, self.slots[name].target) for name, e in self.selection.items()}
        fingerprints = self.slots.fingerprints() | self.layout.fingerprints
        return Delta(self.selection, values, fingerprints, self.method.to_dict(), self._base, self._weights())

    def save(self, directory: str | Path) -> Path:
        """Save the adapter folder: `delta().save(directory)`; of a PEFT model, its own complete adapter folder."""
        if adapters.is_peft(self.model):
            self.slots.settle()
            return adapters.save(self.model, directory)
        return self.delta().save(directory)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the optimizer: values in full precision, step, and the method's state."""
        state = {"method": self.method.to_dict(), "step": self.step, "state": dict(self._state)}
        run = None if self.unmasking is None else self.unmasking.conditions()
        state |= {"rotation": None if self.rotation is None else self.rotation.state()}
        return state | {"unmasking": run, "slots": self.slots.state(), "fingerprints": self.slots.fingerprints()}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another method, or of one under other conditions; entries and base are not looked at.

        Raises:
            ValueError: naming what differs.
        """
        if self.unmasking is not None:
            self.unmasking.check(_chooser(state["method"]), state["unmasking"])
        elif state["method"] != self.method.to_dict():
            raise ValueError(f"resume: the checkpoint's method is {state['method']}, this run's {self.method.to_dict()}")
        if self.rotation is not None:
            self.rotation.check(state["method"], state.get("rotation"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: where it comes from another method, other entries or another base; nothing is changed then.
        """
        self.check(state)
        self.slots.load(state["slots"], state["fingerprints"])
        self.step, self._state = int(state["step"]), dict(state["state"])
        if self.unmasking is not None:
            self.unmasking.resume(self.step, _chooser(state["method"]))
        if self.rotation is not None:
            self.rotation.load(state["rotation"])

    def detach(self) -> nn.Module:
        """Take everything of ours off the model and return it, an ordinary model with the tuned weights.

        Raises:
            ValueError: where it is detached already, or permuted weights were replaced since attach.
        """
        if self.model._modules.get(ATTACHED) is not self.slots:
            raise ValueError("this tuner is detached already; attach again to go on training")
        if self.rotation is not None:
            self.rotation.release()
        self.slots.write()
        self.layout.revert_(self.model)
        for slot in self.slots:
            slot.disconnect()
        del self.model._modules[ATTACHED]
        self._restore_requires_grad()
        return self.model

    def _weights(self) -> int:
        """Number of weights of the model, without the slots' own."""
        own = {id(parameter) for parameter in self.slots.parameters()} - {id(slot.target) for slot in self.slots}
        return sum(parameter.numel() for parameter in self.model.parameters() if id(parameter) not in own)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.slots.write()
        self.step += 1
        if self.rotation is not None:
            self.rotation.advance(self.step, optimizer)

    def _restore_requires_grad(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required.get(name, False))


def _frozen(model: nn.Module) -> Selection:
    """The parameters that its user froze; none where all are frozen, as in a model loaded for inference.

    Raises:
        ValueError: for a PEFT model whose adapter is frozen.
    """
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad for p in parameters.values()):
        if adapters.is_peft(model):
            raise ValueError("this PEFT model's adapter is frozen: load it with PeftModel.from_pretrained(…, is_trainable=True)")
        return Selection()
    return Selection({name: Whole(tuple(p.shape)) for name, p in parameters.items() if not p.requires_grad})


def _chooser(method: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a method as a checkpoint holds it, the part that chooses entries."""
    return method["of"] if isinstance(method.get("of"), Mapping) else method


def _base_name(model: nn.Module) -> str | None:
    """The hub name the model was loaded by; a local path says nothing to others and is left out."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return None if name is None or Path(name).exists() else name
