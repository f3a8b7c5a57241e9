"""vLLM's LoRA layers with compact slots: what vLLM 0.32 calls on a wrapped linear layer, and how that then computes.

vLLM takes the class of each wrapped layer from a list; `install` puts subclasses of its own classes in front, and has the
manager of loaded adapters keep index and values too. Nothing else of vLLM is changed. An adapter that is not one-hot in a layer
stays with vLLM there: its stacked factors are made when the first such adapter is loaded, and both kinds may be in one batch.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import vllm.lora.utils as lora_utils
from torch import Tensor
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.model_manager import LoRAModelManager
from vllm.platforms import current_platform

from . import cpu
from .slots import OneHot, Slots, recognise

__all__ = ["CLASSES", "install"]

_logger = logging.getLogger("vllm.intaglio")


class _Compact(BaseLayerWithLoRA):
    """A wrapped linear layer with compact slots, as far as the classes below share it; vLLM's own class comes after it."""

    base_layer: Any
    device: torch.device
    intaglio_slots: list[Slots]  # one per packed weight (q, k, v), in the order of their outputs
    lora_a_stacked: tuple[Tensor, ...]
    lora_b_stacked: tuple[Tensor, ...]
    output_slices: tuple[int, ...]
    punica_wrapper: Any

    @classmethod
    def can_replace_layer(cls, *, source_layer: Any, **kwargs: Any) -> bool:
        return super().can_replace_layer(source_layer=source_layer, **kwargs) and _can_compute(source_layer)

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make empty slots. The stacked factors get their shape only, which vLLM reads."""
        self._arguments = max_loras, lora_config, model_config
        self._ordinary: set[int] = set()  # slots whose adapter is not one-hot here
        device, self.device = self.device, torch.device("meta")
        super().create_lora_weights(max_loras, lora_config, model_config)
        self.device = device
        pairs = zip(self.lora_a_stacked, self.lora_b_stacked, strict=True)
        sizes = [(a.shape[-1], b.shape[-2]) for a, b in pairs]
        self.intaglio_slots = [Slots(max_loras, *size, lora_config.lora_dtype, device) for size in sizes]

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        for slots in self.intaglio_slots:
            slots.clear(index)
        if index in self._ordinary:
            super().reset_lora(index)
            self._ordinary.remove(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot: with index and values where all factors are one-hot, else as vLLM does."""
        self.reset_lora(index)
        changes = lora_a if isinstance(lora_a, tuple) else self._recognise(lora_a, lora_b)
        if changes is None:
            self._make_factors()
            super().set_lora(index, lora_a, lora_b)
            self._ordinary.add(index)
            return
        for slots, change in zip(self.intaglio_slots, changes, strict=True):
            if change is not None:
                slots.put(index, change)

    def shrink(self, weights: Any) -> None:
        """Replace the factors that vLLM keeps of a loaded adapter, from which it fills slots, by index and values."""
        changes = None if isinstance(weights.lora_a, tuple) else self._recognise(weights.lora_a, weights.lora_b)
        if changes is not None and any(change is not None and len(change.index) for change in changes):
            weights.lora_a, weights.lora_b = changes, None

    def _recognise(self, lora_a: Any, lora_b: Any) -> tuple[OneHot | None, ...] | None:
        """What each packed weight's factors stand for, None where it has none; or None where one of them is not one-hot."""
        pairs = list(zip(_as_list(lora_a), _as_list(lora_b), strict=True))
        changes = tuple(None if a is None or b is None else recognise(a, b) for a, b in pairs)
        known = sum(change is not None for change in changes) == sum(a is not None for a, _ in pairs)
        return changes if known and len(pairs) == len(self.intaglio_slots) else None

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Add to the base layer's output, in place, what each token's adapter changes."""
        y_TO, x_TI = output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1])
        slot_T = self.punica_wrapper._token_lora_indices[: len(x_TI)]
        parts = zip(y_TO.split(self.output_slices, dim=1), self.intaglio_slots, strict=True)
        if y_TO.is_cuda:
            from . import kernels

            for part, slots in parts:
                kernels.add(part, x_TI, slots, slot_T, tiled=len(x_TI) > 4 * len(slots.columns.spans))
        else:
            batch = _batch(self.punica_wrapper, slot_T)
            for part, slots in parts:
                cpu.add(part, x_TI, slots, batch)
        if self._ordinary:
            factors = self.lora_a_stacked, self.lora_b_stacked
            self.punica_wrapper.add_lora_linear(y_TO, x_TI, *factors, 1.0, self.output_slices)
        return output

    def _make_factors(self) -> None:
        """Make vLLM's stacked factors, zero, and one slot more: on a CPU it takes slot −1 (no adapter) for the last."""
        if self.lora_a_stacked[0].is_meta:
            max_loras, *others = self._arguments
            super().create_lora_weights(max_loras + 1, *others)


class RowParallel(_Compact, RowParallelLinearWithLoRA):
    """A wrapped o_proj or down_proj."""


class MergedColumnParallel(_Compact, MergedColumnParallelLinearWithLoRA):
    """A wrapped gate and up, packed."""


class MergedQKVParallel(_Compact, MergedQKVParallelLinearWithLoRA):
    """A wrapped q, k and v, packed."""


CLASSES = (RowParallel, MergedColumnParallel, MergedQKVParallel)


def install() -> bool:
    """Offer vLLM the classes, before its own. Returns whether they were not offered before.

    Raises:
        AttributeError: where vLLM lacks what the classes override; nothing is changed then.
    """
    if any(cls in lora_utils._all_lora_classes for cls in CLASSES):
        return False
    add_adapter = LoRAModelManager._add_adapter
    for method in ("create_lora_weights", "reset_lora", "set_lora", "_apply_lora_to_output"):
        getattr(RowParallelLinearWithLoRA, method)  # an override that nobody calls would drop adapters in silence
    lora_utils._all_lora_classes = (*CLASSES, *lora_utils._all_lora_classes)

    @functools.wraps(add_adapter)
    def add_and_shrink(manager: LoRAModelManager, lora: Any) -> None:
        add_adapter(manager, lora)
        for name, module in manager.modules.items():
            weights = manager._get_lora_layer_weights(lora, name)
            if weights is not None and isinstance(module, _Compact):
                module.shrink(weights)

    LoRAModelManager._add_adapter = add_and_shrink
    return True


def _can_compute(layer: Any) -> bool:
    """Whether this layer, on this machine, is one that the plugin can compute; else vLLM's class takes it."""
    if getattr(layer, "tp_size", 1) != 1:
        _stay_out("tensor parallelism")
        return False
    if current_platform.is_cpu():
        return True
    eager = current_platform.is_cuda() and get_current_vllm_config().model_config.enforce_eager
    if not eager or envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        _stay_out("a GPU without --enforce-eager (slots grow, which a captured graph would not see)")
        return False
    return True


@functools.cache
def _stay_out(reason: str) -> None:
    _logger.warning("Intaglio's plugin stays out, adapters take vLLM's own path: it does not know %s", reason)


def _as_list(factors: Any) -> list[Tensor | None]:
    return list(factors) if isinstance(factors, (list, tuple)) else [factors]


def _batch(punica_wrapper: Any, slot_T: Tensor) -> cpu.Batch:
    """The step's batch, kept as long as its tokens are the same."""
    batch = getattr(punica_wrapper, "intaglio_batch", None)
    if batch is None or not batch.fits(slot_T):
        batch = punica_wrapper.intaglio_batch = cpu.Batch(slot_T)
    return batch
