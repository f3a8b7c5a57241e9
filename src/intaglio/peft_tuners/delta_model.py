"""Sparse adapters in a model: their places chosen or taken from a folder, checked, and wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapter.record import Record
from ..core.entries import Entries
from .delta_config import DeltaConfig
from .delta_layer import DeltaLayer
from .guards import check_module, check_parameter, check_tied, check_tokens, refuse_nested, refuse_quantized
from .targets import excluded, owner, unwrapped
from .wrapper import WrappingTuner

__all__ = ["DeltaModel"]


@dataclass
class _Places:
    """One module's part of an adapter."""

    records: dict[str, Record] = field(default_factory=dict)
    entries: dict[str, Entries] = field(default_factory=dict)  # of a fresh adapter
    tied: dict[str, str] = field(default_factory=dict)  # own name → full name of a parameter shared with another module


@final
class DeltaModel(WrappingTuner):
    """The tuner of the type INTAGLIO; made by `get_peft_model`, `PeftModel.from_pretrained` and transformers' adapters."""

    prefix = "intaglio_"
    tuner_layer_cls = DeltaLayer

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported.

        Raises:
            ValueError: always, with what to do instead.
        """
        raise ValueError(
            "add_weighted_adapter: sparse adapters hold values, not differences, and are not averaged; train disjoint ones "
            "(exclude=) and activate them together: model.base_model.set_adapter([…])"
        )

    def _prepare_model(self, peft_config: DeltaConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Choose the places of a fresh adapter or take a saved one's, and check them all before anything changes."""
        merged = {name for layer in _layers(model) for name in layer.merged_adapters}
        if merged and not peft_config.is_fixed:
            raise ValueError(
                f"adapter {sorted(merged)[0]!r} is merged into the base; call unmerge_adapter() before adding another"
            )
        with unwrapped(model):
            if not peft_config.is_fixed:
                refuse_quantized(model)
                peft_config.choose(model)
            self._places = _plan(model, peft_config)
            if peft_config.is_fixed and not merged:
                peft_config.check_rest(model)
        refuse_nested(model, self._places)
        if peft_config.target_modules is None:
            # The parameters say it all. To PEFT, which expects some list once an adapter is in a model and adds to it when it
            # converts one to LoRA, an adapter of parameters targets no module by name.
            peft_config.target_modules = []

    def _check_target_module_exists(self, peft_config: DeltaConfig, key: str) -> Any:  # type: ignore[override]
        return key in self._places or excluded(peft_config, key)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: DeltaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if "/" in adapter_name or "\\" in adapter_name:
            raise ValueError(f"adapter name {adapter_name!r}: it becomes a folder's name; leave out slashes")
        places = self._places[current_key]
        layer = target if isinstance(target, DeltaLayer) else DeltaLayer(target, current_key)
        tied = {name: (self._layer(owner(full)), full.rpartition(".")[2]) for name, full in places.tied.items()}
        entries = places.entries or self._entries_of_twin(peft_config, adapter_name, layer)
        layer.update_layer(adapter_name, places.records, entries, tied, noise=not peft_config.init_weights)
        self.put(layer, parent, target_name, adapter_name, inference_mode=peft_config.inference_mode)

    def _entries_of_twin(self, config: DeltaConfig, adapter: str, layer: DeltaLayer) -> dict[str, Entries]:
        """Places of a loaded adapter with the same config: trainers add such a copy as reference, and copy parameters only."""
        twins = [name for name, other in self.peft_config.items() if other is config and name != adapter]
        for twin in twins if config.is_fixed else []:
            if twin in layer.intaglio_records and layer.has_tensors(twin):
                return {name: tuned.entries for name, tuned in layer.tuned(twin).items()}
        return {}

    def _layer(self, path: str) -> DeltaLayer:
        layer = self.model.get_submodule(path)
        assert isinstance(layer, DeltaLayer)  # named_parameters gives the owner before those that share
        return layer

    def _check_merge_allowed(self) -> None:
        """Always allowed: values are swapped within the tensor that tied modules share, which PEFT warns about."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Values train in fp32; PEFT's `autocast_adapter_dtype=False` asks for the base's type."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in _layers(self.model):
                layer.cast_values(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Tell every layer the adapter of each row of the batch, for the length of one forward or generate."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        modules = [m for m in self.modules() if isinstance(m, (DeltaLayer, AuxiliaryTrainingWrapper))]
        hook = partial(_pass_names, names=list(names), beams=kwargs.get("num_beams") or 1)
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_names(_: nn.Module, args: Any, kwargs: dict[str, Any], *, names: list[str], beams: int) -> tuple[Any, Any]:
    """Give a layer the names of its rows; beam search repeats each row, except in an encoder."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if beams > 1 and first is not None and first.dim() > 0 and len(first) == len(names) * beams:
        names = [name for name in names for _ in range(beams)]
    return args, kwargs | {"adapter_names": names}


def _layers(model: nn.Module) -> list[DeltaLayer]:
    return [module for module in model.modules() if isinstance(module, DeltaLayer)]


def _plan(model: nn.Module, config: DeltaConfig) -> dict[str, _Places]:
    """Module → what it holds of the adapter, with the modules that share a chosen parameter."""
    parameters, places = dict(model.named_parameters()), dict[str, _Places]()
    primary = {id(parameter): name for name, parameter in parameters.items()}
    chosen = config.chosen if not config.is_fixed else None
    for name, record in config.records.items():
        check_parameter(name, record, parameters.get(name), config.base_model_name_or_path)
        check_module(model, name)
        check_tokens(model, name, config.trainable_token_indices)
        place = places.setdefault(owner(name), _Places())
        place.records[name.rpartition(".")[2]] = record
        if chosen is not None:
            place.entries[name.rpartition(".")[2]] = chosen[name]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        full = primary[id(parameter)]
        if full != name and full in config.records:
            check_module(model, name)
            check_tied(name, full, left_out=excluded(config, owner(name)) is not False)
            places.setdefault(owner(name), _Places()).tied[name.rpartition(".")[2]] = full
    return places
