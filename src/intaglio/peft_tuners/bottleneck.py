"""Bottleneck adapters (series and parallel) as a PEFT type of our own; importing this module registers it with PEFT.

PEFT has none, and the library that does, `adapters` 1.3, asks for transformers 4.57.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn

from ..method_kinds import fields
from ..model.structure import describe, is_linear, is_transposed
from .bottleneck_layer import ACTIVATIONS, NO_MERGE, BottleneckLayer
from .delta_config import PeftTypeName, _help
from .guards import check_called
from .targets import owner

__all__ = ["BottleneckConfig", "BottleneckModel"]

TYPE = PeftTypeName("INTAGLIO_BOTTLENECK")
BIASES = ("none", "all", "bottleneck_only")
ROLES = {"series": ("o", "down"), "parallel": ("q", "k", "v", "up", "down")}  # what is adapted unless the config says


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters: two thin layers with a nonlinearity between them, after a module or beside it.

        series:    y = f(x);  y + scaling · U act(D y)
        parallel:  f(x) + scaling · U act(D x)

    D maps to `bottleneck_size` dimensions and U back; U starts at zero, so that a fresh adapter changes nothing.

    Args:
        bottleneck_size: dimensions between D and U.
        placement: "series" reads what a target puts out, "parallel" what goes into it.
        activation: "relu", "gelu", "silu" or "tanh".
        scaling: factor on what the adapter adds; not 0. He et al. use 4 for parallel ones.
        dropout: probability, on what the adapter reads.
        target_modules: linear layers or whole modules (`["mlp"]`): names or their ends, a regex, or "all-linear". Default:
            series, the output projections of attention and MLP (Houlsby et al.); parallel, the attention's q, k and v and
            the MLP's up and down projections, as LLM-Adapters do. These find that series adapters after the MLP alone
            (`["down_proj"]`) serve best.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save, trainable_token_indices: as in PEFT's configs.
        bias: biases of the base that are trained too: "none", "all", or "bottleneck_only", the targets' own.
        init_weights: False starts U at random, for tests.

    Raises:
        ValueError: for a field out of range, or fields that exclude each other; at injection, for targets that cannot be
            adapted, or defaults where the model's structure is unknown.

    Example:
        >>> model = get_peft_model(base, BottleneckConfig(bottleneck_size=64, task_type="CAUSAL_LM"))

    Papers: Houlsby et al. 2019 (arXiv 1902.00751), He et al. 2022 (2110.04366), LLM-Adapters (2304.01933).

    Differences from LLM-Adapters: one meaning of `series` for every target (theirs puts the adapter before the layers that
    read a block's input); U starts at zero, not at random; relu, not tanh; no learned scaling.
    """

    bottleneck_size: int = field(default=256, metadata=_help("dimensions between the two layers"))
    placement: str = field(default="series", metadata=_help("series or parallel"))
    activation: str = field(default="relu", metadata=_help("the nonlinearity: relu, gelu, silu or tanh"))
    scaling: float = field(default=1.0, metadata=_help("factor on what the adapter adds"))
    dropout: float = field(default=0.0, metadata=_help("probability, on what the adapter reads"))
    target_modules: list[str] | str | None = field(default=None, metadata=_help("modules that are adapted"))
    exclude_modules: list[str] | str | None = field(default=None, metadata=_help("modules that are left alone"))
    layers_to_transform: list[int] | int | None = field(default=None, metadata=_help("layers that are adapted"))
    layers_pattern: list[str] | str | None = field(default=None, metadata=_help("name of the list of layers"))
    modules_to_save: list[str] | None = field(default=None, metadata=_help("modules trained and saved whole"))
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata=_help("tokens whose embeddings are trained")
    )
    bias: str = field(default="none", metadata=_help("biases of the base that are trained: none, all or bottleneck_only"))
    init_weights: bool = field(default=True, metadata=_help("False starts away from the base, for tests"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE  # type: ignore[assignment]  # PEFT looks types up as strings
        fields.refuse(type(self).__name__, [*self._problems()])

    def _problems(self) -> Iterator[str]:
        yield from fields.count("bottleneck_size", self.bottleneck_size)
        for name, allowed in (("placement", ROLES), ("activation", ACTIVATIONS), ("bias", BIASES)):
            yield from fields.choice(name, getattr(self, name), allowed)
        yield from fields.number(
            "scaling", self.scaling, "a finite number other than 0", low=math.inf if self.scaling == 0 else -math.inf
        )
        yield from fields.number("dropout", self.dropout, "a probability below 1", low=0.0, high=math.nextafter(1.0, 0.0))
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            yield "layers_to_transform: has no effect where target_modules is a str; give a list, or name the layers in it"
        if self.layers_pattern and self.layers_to_transform is None:
            yield "layers_pattern: has no effect without layers_to_transform"


@final
class BottleneckModel(BaseTuner):
    """The tuner of the type INTAGLIO_BOTTLENECK; made by `get_peft_model` and `PeftModel.from_pretrained`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # typed so by the base class

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:  # type: ignore[override]
        return peft_config

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
        if layer is not target:
            layer._active_adapter = adapter_name
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in a module's place, or back: any module, not only those that own a `weight`."""
        setattr(parent, child_name, new_module)

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
    """What a module reads and puts out, in the last dimension.

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
        for role in ROLES[config.placement]:
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


def _refuse_nested(model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse a target inside another, or inside what another adapter has wrapped; PEFT passes over the inner one.

    Raises:
        ValueError: naming both.
    """
    wrapped = {name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    for path in targets:
        outer = owner(path)
        while outer:
            if outer in wrapped or outer in {*targets}:
                raise ValueError(f"target_modules: {path} lies inside {outer}, which is adapted too; adapt one of them")
            outer = owner(outer)


PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = BottleneckConfig  # type: ignore[index]  # PEFT looks types up as strings
PEFT_TYPE_TO_TUNER_MAPPING[TYPE] = BottleneckModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[TYPE] = BottleneckModel.prefix  # type: ignore[index]
