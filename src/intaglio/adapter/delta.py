"""The artefact: tuned values at their places in the base.

A Delta holds values, not differences: applying swaps them in and keeps the originals, so that apply gives exactly the
trained model and revert exactly the base, in any type, any number of times. Its file format is in `folder`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.entries import Entries, Whole
from ..core.fingerprint import fingerprint, is_attached
from ..core.selection import Selection
from ..model.wrappers import unwrapped
from . import folder
from .rest import Rest

__all__ = ["Delta", "refuse_tuner"]

_APPLIED = "_intaglio_applied"  # attribute of a model: the Deltas that stand in it


@final
class Delta:
    """Tuned values of a selection, ready to be saved, loaded, applied and reverted.

    Args:
        selection: the places, in base coordinates.
        values: name → compact values in the base's type, shape `selection[name].values_shape`.
        fingerprints: name → `fingerprint` of the base values at those places.
        method: the method that trained it, `{"name": …, fields}`; for the record only.
        base: name of the base model, as `from_pretrained` takes it; or None.
        of: number of weights in the whole base model; None where it is not known.
        rest: of the base, which is checked where this is applied; None: it is not known.

    Raises:
        ValueError: naming the parameter, where shapes disagree or a value is not finite.
    """

    def __init__(
        self,
        selection: Selection,
        values: Mapping[str, Tensor],
        fingerprints: Mapping[str, str],
        method: Mapping[str, Any] | None = None,
        base: str | None = None,
        of: int | None = None,
        rest: Rest | None = None,
    ) -> None:
        self.selection, self.values, self.fingerprints = selection, dict(values), dict(fingerprints)
        self.method, self.base, self.of, self.rest = dict(method or {}), base, of, rest
        self._originals: dict[str, Tensor] | None = None
        for name, entries in selection.items():
            _check_values(name, entries, self.values.get(name))

    def apply_(self, model: nn.Module) -> None:
        """Swap the tuned values into `model`, which then equals the trained model bit for bit.

        Everything is checked before the first weight changes.

        Raises:
            ValueError: where a parameter is missing or of another shape or type, where the model holds other base
                values at these places (a wrong base), or where this Delta is applied already.
        """
        refuse_tuner(model)
        if self._originals is not None:
            raise ValueError("this Delta is applied already; call revert_ first, or load the folder a second time")
        originals = self.originals(model)
        try:
            self._write(model, self.values)
        except BaseException:  # Ctrl-C in between: no half-tuned model
            self._write(model, originals)
            raise
        self._originals = originals
        vars(unwrapped(model)).setdefault(_APPLIED, []).append(self)

    def revert_(self, model: nn.Module) -> None:
        """Put the base's values back, bit for bit.

        Raises:
            ValueError: where this Delta is not applied, or `model` does not hold its values.
        """
        if self._originals is None:
            raise ValueError("this Delta is not applied; nothing to revert")
        standing, changed, named = False, False, self._named(model)  # it may have been cast since, to a wider type and back
        for name, parameter in named.items():
            now = self.selection[name].to(parameter.device).gather(parameter)
            tuned, base = self.values[name].to(parameter), self._originals[name].to(parameter)
            if not bool(((now == tuned) | (now == base)).all()):  # some are the base's, where an earlier call was interrupted
                raise ValueError(f"{name}: the model no longer holds this Delta's values; was it applied to another model?")
            differs = tuned != base
            changed = changed or bool(differs.any())
            standing = standing or bool((differs & (now == tuned)).any())
        if changed and not standing:
            first = next(iter(named))
            raise ValueError(f"{first}: the model no longer holds this Delta's values; was it applied to another model?")
        self._write(model, self._originals)
        self._originals = None
        applied = vars(unwrapped(model)).get(_APPLIED, [])
        applied[:] = [delta for delta in applied if delta is not self]

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the adapter folder; see `folder.write` for what a crash can leave. Returns the folder."""
        return folder.write(self._contents(), directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Delta:
        """Read an adapter folder and check everything that can be checked without a model.

        Raises:
            ValueError: naming the file or parameter, for a missing, damaged, truncated or inconsistent folder.
        """
        return cls(**vars(folder.read(directory)))

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters in this Delta.

        Raises:
            ValueError: naming the first that is missing, of another shape or type, or without values of its own.
        """
        found = self._named(model)
        for name, parameter in found.items():
            _check_parameter(name, parameter, self.selection[name], self.values[name].dtype)
        return found

    def check_rest(self, model: nn.Module, besides: Collection[str] = ()) -> None:
        """Refuse a base whose other parameters are not those that this was trained over, as far as that is known.

        Args:
            model: the base.
            besides: names of parameters that another adapter changes now; those that Deltas have changed are known.

        Raises:
            ValueError: naming the parameter.
        """
        if self.rest is not None:
            applied = {name for delta in vars(unwrapped(model)).get(_APPLIED, []) for name in delta.selection}
            self.rest.check(unwrapped(model), self.selection, applied.union(besides))

    def originals(self, model: nn.Module) -> dict[str, Tensor]:
        """The base's values at this Delta's places, copied from `model`, which must hold the base there.

        Raises:
            ValueError: as `parameters` and `check_rest`, and where the model holds other values (a wrong base).
        """
        found = {name: self.selection[name].to(p.device).gather(p) for name, p in self.parameters(model).items()}
        for name, values in found.items():
            self.check_base(name, values)
        self.check_rest(model)
        return found

    def check_base(self, name: str, values: Tensor) -> None:
        """Refuse base values, at this Delta's places in one parameter, that are not those it was trained on.

        Raises:
            ValueError: naming the parameter.
        """
        if isinstance(self.selection[name], Whole):
            return  # nothing of what was there is left
        found = fingerprint(values)
        if found != self.fingerprints[name]:
            raise ValueError(
                f"{name}: base fingerprint {self.fingerprints[name]} expected, {found} found: the model is not the base "
                f"{self.base!r} this adapter was trained on, or it has been changed since"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices, as stored."""
        return sum(t.numel() * t.element_size() for t in folder.tensors(self._contents()).values())

    def _contents(self) -> folder.Contents:
        return folder.Contents(self.selection, self.values, self.fingerprints, self.method, self.base, self.of, self.rest)

    def __repr__(self) -> str:
        return f"Delta({self.method.get('name', '?')}, {self.selection!r}, base={self.base!r})"

    def _named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(unwrapped(model).named_parameters())
        missing = next((name for name in self.selection if name not in parameters), None)
        if missing is not None:
            raise ValueError(f"{missing}: the model has no such parameter; this adapter's base is {self.base!r}")
        return {name: parameters[name] for name in self.selection}

    def _write(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._named(model).items():
            self.selection[name].to(parameter.device).scatter_(parameter, values[name].to(parameter.device))


def refuse_tuner(model: nn.Module) -> None:
    """Refuse to write into a model that is being trained.

    Raises:
        ValueError: where a tuner is attached.
    """
    if is_attached(unwrapped(model)):
        raise ValueError("the model has a tuner attached, whose next step would overwrite this; call its detach() first")


def _check_parameter(name: str, parameter: nn.Parameter, entries: Entries, dtype: torch.dtype) -> None:
    if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
        stored = parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
        raise ValueError(
            f"{name}: stored as {stored} (quantized or sharded), which cannot hold single tuned values; load the base without "
            f"quantization, with dtype={dtype}"
        )
    if tuple(parameter.shape) != entries.shape:
        raise ValueError(f"{name}: expected shape {list(entries.shape)}, the model has {list(parameter.shape)}")
    if parameter.dtype != dtype:
        raise ValueError(f"{name}: trained on a {dtype} base, the model is {parameter.dtype}; load it with dtype={dtype}")
    if parameter.is_meta:
        raise ValueError(f"{name}: has no values here (offloaded, on the meta device); load the base without offloading")


def _check_values(name: str, entries: Entries, values: Tensor | None) -> None:
    if values is None:
        raise ValueError(f"{name}: selected, but no values given")
    if tuple(values.shape) != entries.values_shape:
        raise ValueError(f"{name}: values of shape {list(entries.values_shape)} expected, {list(values.shape)} found")
    if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: values must be finite floating-point numbers; found {values.dtype} with NaN or infinity")
