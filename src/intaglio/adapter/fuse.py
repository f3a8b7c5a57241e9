"""Several adapters of one base combined into one: tuned = base + Σ weight · (value − base), entry by entry.

Adapters that change other entries (`attach(exclude=…)`) lose nothing by it: at weight 1 the result holds the values of each.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.algebra import union, within
from ..core.entries import Entries
from ..core.fingerprint import fingerprint
from ..core.selection import Selection
from .delta import Delta

__all__ = ["Part", "check_weights", "combine", "fuse", "warn_of_overlap"]


class Part(NamedTuple):
    """One adapter's share in a parameter: its entries, its values there, and its weight."""

    entries: Entries
    values: Tensor
    weight: float


def fuse(deltas: Sequence[Delta], weights: Sequence[float] | None = None, *, base: nn.Module) -> Delta:
    """Combine adapters of one base into one Delta that applies, saves and exports like any other.

    At each entry, tuned = base + Σ weightᵢ · (valueᵢ − base) over the adapters that change it, rounded once. An entry that
    one adapter changes, at weight 1, gets that adapter's value itself; at weight 0, the base's.

    Args:
        deltas: adapters of one base, of any kind, at least one.
        weights: a finite number for each; default 1 for all. Negative ones subtract.
        base: the model they were trained on, with none of them applied; it stays as it is.

    Returns:
        A Delta over all their entries; its `method` records what was fused. Its fingerprints are the base's.

    Raises:
        ValueError: for no deltas, another number of weights, a weight that is not finite, deltas of different bases, a
            `base` that is not theirs, or a fused value that the base's type cannot hold.

    Warns:
        UserWarning: with the share of the entries that more than one adapter changes: there, effects add up.

    Example:
        >>> both = fuse([Delta.load("maths"), Delta.load("german")], [1.0, 0.5], base=model)
        >>> both.save("maths-and-german")
    """
    if not deltas:
        raise ValueError("deltas=[]: give at least one adapter")
    shares = check_weights([1.0] * len(deltas) if weights is None else weights, len(deltas))
    name = _common_base(deltas)
    for number, delta in enumerate(deltas):
        _check_base(number, delta, base)
    warn_of_overlap([delta.selection for delta in deltas])
    parameters, places, values, fingerprints = dict(base.named_parameters()), {}, {}, {}
    for key in dict.fromkeys(key for delta in deltas for key in delta.selection):
        parts = [Part(d.selection[key], d.values[key], w) for d, w in zip(deltas, shares, strict=True) if key in d.selection]
        places[key], originals, values[key] = combine(
            key, parts, lambda entries, weight=parameters[key]: entries.to(weight.device).gather(weight)
        )
        fingerprints[key] = fingerprint(originals)
    method = {"name": "fuse", "of": [delta.method for delta in deltas], "weights": shares}
    of = next((delta.of for delta in deltas if delta.of is not None), None)
    return Delta(Selection(places), values, fingerprints, method, name, of)


def check_weights(weights: Iterable[float], count: int) -> list[float]:
    """The weights as floats.

    Raises:
        ValueError: where there are not `count`, or one is not a finite number.
    """
    found = list(weights)
    if len(found) != count:
        raise ValueError(f"weights={found}: give one for each of the {count} adapters")
    if any(isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w) for w in found):
        raise ValueError(f"weights={found}: give finite numbers")
    return [float(w) for w in found]


def combine(name: str, parts: Sequence[Part], base_at: Callable[[Entries], Tensor]) -> tuple[Entries, Tensor, Tensor]:
    """Combine adapters in one parameter.

    Taken as (1 − Σ weight) · base + Σ weight · value, which is exact at weights 0 and 1, in a type with at least twice as many
    digits as the base's, and rounded once.

    Args:
        name: of the parameter, for errors.
        parts: the adapters' shares.
        base_at: gives the base's values at entries.

    Returns:
        The entries of all parts, the base's values there, and the combined values.

    Raises:
        ValueError: where a value leaves the range of the base's type.
    """
    entries = reduce(union, (part.entries for part in parts))
    base = base_at(entries)
    wide = torch.float32 if base.dtype.itemsize < 4 else torch.float64
    of_base, total = torch.ones_like(base, dtype=wide), torch.full_like(base, -0.0, dtype=wide)  # adds nothing, not even a sign
    for part in parts:
        inside = within(entries, part.entries).to(base.device)
        values = part.values.to(base.device, wide).reshape(inside.values_shape)
        inside.scatter_(of_base, inside.gather(of_base) - part.weight)
        inside.scatter_(total, inside.gather(total) + part.weight * values)
    values = torch.where(of_base == 0, total, of_base * base.to(wide) + total).to(base.dtype)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: weights={[p.weight for p in parts]}: a value exceeds {base.dtype}; give smaller weights")
    return entries, base, values


def warn_of_overlap(selections: Sequence[Selection]) -> None:
    """Warn where more than one of `selections` has an entry, with the share of all entries for which that is so."""
    everything, twice = Selection(), Selection()
    for selection in selections:
        twice = twice.union(everything.intersection(selection))
        everything = everything.union(selection)
    if twice:
        share = twice.size / everything.size
        warnings.warn(
            f"these adapters overlap: {share:.2%} of their {everything.size:,} entries are changed by more than one, where their "
            "effects add up; train the second with attach(exclude=first.selection) to keep them apart",
            stacklevel=3,
        )


def _common_base(deltas: Sequence[Delta]) -> str | None:
    """The base's name; None where no adapter names it."""
    names = {delta.base: number for number, delta in enumerate(deltas) if delta.base is not None}
    if len(names) > 1:
        found = ", ".join(f"deltas[{number}]: {name!r}" for name, number in names.items())
        raise ValueError(f"deltas: of different bases ({found}); only adapters of one base can be fused")
    return next(iter(names), None)


def _check_base(number: int, delta: Delta, base: nn.Module) -> None:
    try:
        delta.originals(base)
    except ValueError as error:
        raise ValueError(f"deltas[{number}]: {error}") from error
