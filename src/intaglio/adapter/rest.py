"""The rest of a base, which an adapter does not restore: frozen parameters, and names that share one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.fingerprint import ATTACHED, fingerprint

__all__ = ["Rest"]

_SAMPLE = 4096  # entries looked at, spread over a parameter; and as many at its end, where new vocabulary rows are


@final
@dataclass(frozen=True)
class Rest:
    """What an adapter was trained over.

    Attributes:
        frozen: parameter → type and fingerprint of a sample of its entries.
        tied: groups of names that share one parameter.
    """

    frozen: Mapping[str, str]
    tied: Sequence[Sequence[str]] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Rest:
        """The rest of a model of which nothing is chosen; a few thousand entries of each parameter are read."""
        own = {name: p for name, p in model.named_parameters() if not name.startswith(f"{ATTACHED}.")}
        return cls({name: mark for name, p in own.items() if (mark := _mark(p)) is not None}, _groups(model))

    @classmethod
    def parse(cls, fields: Any) -> Rest | None:
        """Read `to_dict`; None where an older release has written none.

        Raises:
            ValueError: where it is damaged.
        """
        if fields is None:
            return None
        found = fields if isinstance(fields, Mapping) else {}
        frozen, tied = found.get("frozen"), found.get("tied")
        groups = [list(group) for group in tied if isinstance(group, list | tuple)] if isinstance(tied, list | tuple) else None
        if not isinstance(frozen, Mapping) or groups is None:
            raise ValueError("damaged adapter: rest holds no frozen parameters and groups of tied names")
        if not all(isinstance(name, str) for name in (*frozen, *frozen.values(), *(name for group in groups for name in group))):
            raise ValueError("damaged adapter: rest holds names or fingerprints that are no text")
        return cls(dict(frozen), groups)

    def to_dict(self) -> dict[str, Any]:
        """What `parse` reads, as JSON values."""
        return {"frozen": dict(self.frozen), "tied": [list(group) for group in self.tied]}

    def without(self, names: Collection[str]) -> Rest:
        """The rest without these parameters."""
        return Rest({name: mark for name, mark in self.frozen.items() if name not in names}, self.tied)

    def check(self, model: nn.Module, chosen: Collection[str], besides: Collection[str] = ()) -> None:
        """Refuse a base that is another, or that ties other names.

        Args:
            model: the base.
            chosen: parameters that the adapter changes.
            besides: parameters that another adapter changes now.

        Raises:
            ValueError: naming the parameter, and what to do.
        """
        then, now = ({name: set(group) for group in groups for name in group} for groups in (self.tied, _groups(model)))
        for name in chosen:
            if then.get(name, {name}) != now.get(name, {name}):
                was, found = (" and ".join(sorted(group.get(name, {name}))) for group in (then, now))
                raise ValueError(
                    f"{name}: one parameter was trained as {was}, in this model it is {found}: load the base with "
                    f"tie_word_embeddings={name in then}"
                )
        parameters = dict(model.named_parameters())
        for name, mark in self.frozen.items():
            found = _mark(parameters[name]) if name in parameters and name not in besides else None
            if found is not None and found.partition(" ")[0] == mark.partition(" ")[0] and found != mark:
                raise ValueError(
                    f"{name}: base fingerprint {mark} expected, {found} found: it is not what this adapter was trained over, and "
                    "the adapter does not hold it: another base, or a head or vocabulary rows drawn at random. Load the base; "
                    "what is new in a model is saved with it once (save_pretrained), or trained whole"
                )


def _mark(parameter: Tensor) -> str | None:
    """Type and fingerprint; None for what holds no plain numbers here."""
    if parameter.is_meta or not parameter.is_floating_point() or type(parameter.data) is not Tensor:
        return None
    flat = parameter.detach().reshape(-1)
    sample = torch.cat([flat[:: max(1, flat.numel() // _SAMPLE)], flat[-_SAMPLE:]])
    return f"{str(parameter.dtype).removeprefix('torch.')} {fingerprint(sample)}"


def _groups(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(f"{ATTACHED}."):
            names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _is_groups(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(group, list | tuple) for group in value)
