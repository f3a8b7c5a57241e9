"""Where Intaglio meets the Hugging Face stack.

Importing this package teaches PEFT the type of our adapters, at once or as soon as PEFT itself is imported: after
`import intaglio.hf`, `PeftModel.from_pretrained(base, folder)` reads every adapter folder. It imports nothing heavy itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .peft import DeltaConfig as DeltaConfig
    from .peft import S2FTConfig as S2FTConfig

__all__ = ["DeltaConfig", "S2FTConfig"]


class _AfterPeft(MetaPathFinder):
    """Registers our type right after `peft` has been imported, which takes seconds and which many never need."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                sys.meta_path.remove(self)  # only now: transformers looks for the spec without importing it
                execute(module)
                importlib.import_module(f"{__name__}.peft")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.peft"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if "peft" in sys.modules:
    importlib.import_module(f"{__name__}.peft")
else:
    sys.meta_path.insert(0, _AfterPeft())
