"""Bottleneck adapters in a model: default targets, and what cannot be adapted, found before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..model.structure import describe, is_linear, is_transposed
from .bottleneck_config import TARGET_ROLES, BottleneckConfig
from .bottleneck_layer import NO_MERGE, BottleneckLayer
from .guards import check_called
from .targets import around, owner
from .wrapper import WrappingTuner

__all__ = ["BottleneckModel"]


@final
class BottleneckModel(WrappingTuner):
    """The tuner of the type INTAGLIO_BOTTLENECK; made by `get_peft_model` and `PeftModel.from_pretrained`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Find default targets, and check all targets before anything changes."""
        if peft_config.target_modules is None:
            peft_config.target_modules = _defaults(model, peft_config)
        targets = [name for name, _ in model.named_modules() if name and check_target_module_exists(peft_config, name)]
        _refuse_nested(model, targets)
        for path in targets:
            check_called(model, path)
            _sizes(model, path)

    @staticmethod
    def _check_target_module_exists(peft_config: BottleneckConfig, key: str) -> Any:  # type: ignore[override]
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        reads, adds = _sizes(self.model, current_key)
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target, current_key)
        layer.update_layer(adapter_name, peft_config, adds if peft_config.placement == "series" else reads, adds)
        self.put(layer, parent, target_name, adapter_name, inference_mode=peft_config.inference_mode)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: bottleneck adapters serve one adapter per batch; call set_adapter and split the batch"
            )
        yield


def _sizes(model: nn.Module, path: str) -> tuple[int, int]:
    """Sizes of what a module reads and puts out, in the last dimension.

    Raises:
        ValueError: for what is neither linear nor a module with linear layers of a model that states its hidden size.
    """
    module = model.get_submodule(path)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if is_transposed(base):
        reads, adds = base.get_parameter("weight").shape
        return reads, adds
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if hidden is None or not any(is_linear(child) for child in base.modules()):
        raise ValueError(
            f"target_modules: {path} is a {type(base).__name__}; bottleneck adapters go on linear layers, and on modules that "
            "hold some (attention, MLP) where the model's config states hidden_size"
        )
    return hidden, hidden


def _defaults(model: nn.Module, config: BottleneckConfig) -> list[str]:
    """Full names of the linear layers that play the placement's roles, within the config's other restrictions.

    Raises:
        ValueError: where the model's structure is unknown, or a role is played by stacked experts.
    """
    found = []
    for layer in describe(model):
        for role in TARGET_ROLES[config.placement]:
            if role not in layer.projections:
                continue
            path, view = owner(layer.projections[role].parameter), copy.copy(config)
            view.target_modules = [path.rpartition(".")[2]]
            if not check_target_module_exists(view, path):
                continue
            if not is_linear(model.get_submodule(path)):
                raise ValueError(
                    f"target_modules: no default, {path} holds stacked weights; name modules, e.g. ['o_proj', 'mlp']"
                )
            found.append(path)
    return list(dict.fromkeys(found))


def _refuse_nested(model: nn.Module, targets: list[str]) -> None:
    """Refuse a target inside another, or inside what another adapter has wrapped; PEFT passes over the inner one.

    Raises:
        ValueError: naming both.
    """
    wrapped = {name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}.union(targets)
    for path in targets:
        for outer in around(path):
            if outer in wrapped:
                raise ValueError(f"target_modules: {path} lies inside {outer}, which is adapted too; adapt one of them")
