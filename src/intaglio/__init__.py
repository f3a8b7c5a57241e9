"""Intaglio: fine-tune large language models sparsely.

The public names, loaded on first use: importing this package alone imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.version import VERSION

if TYPE_CHECKING:
    from .adapter.delta import Delta as Delta
    from .adapter.fuse import fuse as fuse
    from .adapter.pool import AdapterPool as AdapterPool
    from .core.probe import Batches as Batches
    from .core.selection import Selection as Selection
    from .methods import ID3 as ID3
    from .methods import IST as IST
    from .methods import LISA as LISA
    from .methods import RST as RST
    from .methods import S2FT as S2FT
    from .methods import SNIP as SNIP
    from .methods import BitFit as BitFit
    from .methods import FishMask as FishMask
    from .methods import Full as Full
    from .methods import PaFi as PaFi
    from .methods import Random as Random
    from .methods import SHiRA as SHiRA
    from .methods import StaticGradient as StaticGradient
    from .runs.train import train as train
    from .training.tuner import Tuner as Tuner
    from .training.tuner import attach as attach
    from .training.updates import Updates as Updates

__version__ = VERSION

_HOME = {
    "attach": "training.tuner",
    "Tuner": "training.tuner",
    "Delta": "adapter.delta",
    "fuse": "adapter.fuse",
    "AdapterPool": "adapter.pool",
    "Selection": "core.selection",
    "Batches": "core.probe",
    "S2FT": "methods",
    "ID3": "methods",
    "IST": "methods",
    "LISA": "methods",
    "RST": "methods",
    "StaticGradient": "methods",
    "SNIP": "methods",
    "Random": "methods",
    "PaFi": "methods",
    "SHiRA": "methods",
    "FishMask": "methods",
    "BitFit": "methods",
    "Full": "methods",
    "Updates": "training.updates",
    "train": "runs.train",
}
__all__ = [
    "ID3",
    "IST",
    "LISA",
    "RST",
    "S2FT",
    "SNIP",
    "AdapterPool",
    "Batches",
    "BitFit",
    "Delta",
    "FishMask",
    "Full",
    "PaFi",
    "Random",
    "SHiRA",
    "Selection",
    "StaticGradient",
    "Tuner",
    "Updates",
    "attach",
    "fuse",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
