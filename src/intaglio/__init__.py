"""Intaglio: fine-tune large language models sparsely.

The public names, loaded on first use: importing this package alone imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .delta import Delta as Delta
    from .methods import S2FT as S2FT
    from .methods import Full as Full
    from .methods import PaFi as PaFi
    from .methods import Random as Random
    from .probe import Batches as Batches
    from .selection import Selection as Selection
    from .training import train as train
    from .tuner import Tuner as Tuner
    from .tuner import attach as attach

__version__ = "0.1.0"

_HOME = {
    "attach": "tuner",
    "Tuner": "tuner",
    "Delta": "delta",
    "Selection": "selection",
    "Batches": "probe",
    "S2FT": "methods",
    "Random": "methods",
    "PaFi": "methods",
    "Full": "methods",
    "train": "training",
}
__all__ = ["S2FT", "Batches", "Delta", "Full", "PaFi", "Random", "Selection", "Tuner", "attach", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
