"""The configs of the one PEFT type: any method's adapter, and S2FT's own form."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from .. import __version__
from ..adapter.folder import FORMAT_VERSION, PEFT_TYPE, WEIGHTS
from ..adapter.record import Record
from ..core.probe import Probe
from ..core.selection import Selection
from ..method_kinds.fields import refuse
from ..method_kinds.method import refuse_foreign
from ..methods import build
from ..methods.s2ft import S2FT
from . import targets as peft_places

__all__ = ["TYPE", "DeltaConfig", "PeftTypeName", "S2FTConfig"]

_RUN_TIME = ("probe", "exclude")


class PeftTypeName(str):
    """A PEFT type from outside PEFT's enum: a string that answers `value` and `name` as an enum's member does."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The string itself."""
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        """As an enum's member prints: PEFT's status shows what follows the dot."""
        return f"PeftType.{self.value}"


TYPE = PeftTypeName(PEFT_TYPE)


def _help(text: str) -> dict[str, str]:
    """Metadata that command lines built from dataclasses read."""
    return {"help": text}


@dataclass
class DeltaConfig(PeftConfig):
    """A sparse adapter of any method, fresh or from a folder; its JSON is the `adapter_config.json` of a Delta.

    Args:
        method: `{"name": …, field: value, …}` as in a run file; what chooses the places of a fresh adapter.
        target_modules: modules the choice is restricted to: names or their ends, a regex, or "all-linear"; default all.
        exclude_modules: modules that are left alone, likewise.
        layers_to_transform: layers the choice is restricted to; with None all.
        layers_pattern: name of the list that holds the layers, where it is not found by itself.
        modules_to_save: modules trained and saved whole, e.g. a classifier.
        trainable_token_indices: tokens whose embeddings are trained too.
        init_weights: False starts away from the base, for tests.
        probe: calibration data for methods that need it; used once, never saved.
        exclude: places another adapter uses, which this one leaves alone; used once, never saved.
        parameters: name → place of a saved adapter; filled when the adapter is made.
        trainable, of: number of chosen weights and of all; filled likewise.
        sha256, format_version, intaglio_version: of the saved folder.

    Raises:
        ValueError: for an unknown method or field, a method that changes its choice during training, a folder of another
            format, or fields that exclude each other.

    Example:
        >>> model = get_peft_model(base, DeltaConfig(method={"name": "random", "budget": 0.01}))
    """

    method: dict[str, Any] | None = field(default=None, metadata=_help("name and fields of the method that chooses"))
    target_modules: list[str] | str | None = field(default=None, metadata=_help("modules the choice is restricted to"))
    exclude_modules: list[str] | str | None = field(default=None, metadata=_help("modules that are left alone"))
    layers_to_transform: list[int] | int | None = field(default=None, metadata=_help("layers the choice is restricted to"))
    layers_pattern: list[str] | str | None = field(default=None, metadata=_help("name of the list of layers"))
    modules_to_save: list[str] | None = field(default=None, metadata=_help("modules trained and saved whole"))
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata=_help("tokens whose embeddings are trained")
    )
    init_weights: bool = field(default=True, metadata=_help("False starts away from the base, for tests"))
    parameters: dict[str, dict[str, Any]] | None = field(default=None, metadata=_help("places of a saved adapter"))
    trainable: int | None = field(default=None, metadata=_help("number of chosen weights"))
    of: int | None = field(default=None, metadata=_help("number of weights in the whole base model"))
    sha256: str | None = field(default=None, metadata=_help("of the saved weights"))
    format_version: int = field(default=FORMAT_VERSION, metadata=_help("of the saved folder"))
    intaglio_version: str = field(default=__version__, metadata=_help("that saved the folder"))
    probe: Probe | None = field(default=None, metadata=_help("calibration data, never saved"))
    exclude: Selection | None = field(default=None, metadata=_help("places another adapter uses, never saved"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE  # type: ignore[assignment]  # PEFT looks types up as strings
        self._is_fixed = self.parameters is not None
        self._chosen: Selection | None = None
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"{type(self).__name__}: format version {self.format_version!r}; this release reads {FORMAT_VERSION}: "
                "use the release that wrote it"
            )
        if not self._is_fixed:
            refuse(type(self).__name__, self._problems())
            build(self.method or {})

    @property
    def is_fixed(self) -> bool:
        """Whether the places came with the config, from a saved adapter."""
        return self._is_fixed

    @property
    def chosen(self) -> Selection | None:
        """The places of the last fresh adapter made from this config."""
        return self._chosen

    @chosen.setter
    def chosen(self, selection: Selection) -> None:
        self._chosen = selection

    @property
    def records(self) -> dict[str, Record]:
        """`parameters`, checked."""
        if not isinstance(self.parameters, Mapping):
            raise ValueError(f"{type(self).__name__}: parameters is damaged, not a mapping")
        return {name: Record.parse(name, fields) for name, fields in self.parameters.items()}

    def places(self, model: nn.Module) -> Selection:
        """Choose the places of a fresh adapter in a base model.

        Raises:
            ValueError: where the method does not fit the model, or the restrictions leave nothing.
        """
        method = build(self.method or {})
        if not method.chooses_before:
            raise ValueError(
                f"method {method.name!r} changes its choice during training, which a PEFT adapter cannot follow; train with "
                "intaglio.attach, whose saved adapter PEFT loads"
            )
        chosen = method.choose(model, self.probe, self.left_alone(model))
        return peft_places.restrict(chosen, self)

    def left_alone(self, model: nn.Module) -> Selection:
        """What a method must not choose: `exclude`, and every layer but `layers_to_transform`.

        Raises:
            ValueError: for another model's entries, or where no layer is left.
        """
        refuse_foreign(self.exclude or Selection(), model)
        return (self.exclude or Selection()).union(peft_places.other_layers(model, self))

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the keys of an adapter folder's config."""
        names = [f.name for f in dataclasses.fields(DeltaConfig) if f.name not in _RUN_TIME]
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config; after the weights, as PEFT does, it records their hash."""
        weights = Path(save_directory) / WEIGHTS
        # Only PEFT passes this keyword, and it has written the weights just before; transformers writes them afterwards.
        written = "auto_mapping_dict" in kwargs and weights.is_file()
        self.sha256 = hashlib.sha256(weights.read_bytes()).hexdigest() if written else None
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read a config, and refuse a local folder whose weights are damaged.

        Raises:
            ValueError: where the weights' hash is not the recorded one.
        """
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path) / (subfolder or "") / WEIGHTS
        if config.sha256 is not None and weights.is_file():
            found = hashlib.sha256(weights.read_bytes()).hexdigest()
            if found != config.sha256:
                raise ValueError(f"{weights}: damaged or truncated: SHA-256 {config.sha256[:12]}… expected, {found[:12]}… found")
        return config

    def _problems(self) -> list[str]:
        problems = []
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            problems.append(
                "`layers_to_transform` cannot be used when `target_modules` is a str; give a list, or name the layers in it"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("When `layers_pattern` is specified, `layers_to_transform` must also be specified")
        return problems


@dataclass
class S2FTConfig(DeltaConfig):
    """S2FT for PEFT: train whole attention heads and FFN channels. The shares are those of `intaglio.S2FT`.

    Args:
        q, k, v, o, up, gate, down: share of a projection's units (float), units over all layers (int), or None.
        select: what units are ranked by: "random", "weight", "activation", "product", "gradient"; the last three need a
            `probe`.
        largest: take the largest norms instead of the smallest.
        seed: of the random draw.
        target_modules: restricts the projections; explicit linear layers that are no part of a described transformer
            train the share `down` of their input columns, at least one.

    The other fields are `DeltaConfig`'s, without `method`; a saved config is read back as a `DeltaConfig`.

    Raises:
        ValueError: as `intaglio.S2FT` and `DeltaConfig`; at injection, where a target is a projection without a share.

    Example:
        >>> model = get_peft_model(base, S2FTConfig(o=0.05, down=0.02, task_type="CAUSAL_LM"))

    Paper: arXiv 2412.06289.
    """

    q: int | float | None = field(default=None, metadata=_help("share of query heads, rows of the query projection"))
    k: int | float | None = field(default=None, metadata=_help("share of key-value heads, rows of the key projection"))
    v: int | float | None = field(default=None, metadata=_help("share of key-value heads, rows of the value projection"))
    o: int | float | None = field(default=0.05, metadata=_help("share of query heads, columns of the output projection"))
    up: int | float | None = field(default=None, metadata=_help("share of FFN channels, rows of the up projection"))
    gate: int | float | None = field(default=None, metadata=_help("share of FFN channels, rows of the gate projection"))
    down: int | float | None = field(default=0.02, metadata=_help("share of FFN channels, columns of the down projection"))
    select: str = field(default="random", metadata=_help("what units are ranked by"))
    largest: bool = field(default=False, metadata=_help("take the largest norms"))
    seed: int = field(default=0, metadata=_help("of the random draw"))

    def __post_init__(self) -> None:
        if self.method is not None:
            raise ValueError(f"S2FTConfig: method={self.method!r}: give the shares, or use DeltaConfig(method=…)")
        self.method = S2FT(**{f.name: getattr(self, f.name) for f in dataclasses.fields(S2FT)}).to_dict()
        super().__post_init__()

    def places(self, model: nn.Module) -> Selection:
        if self.target_modules is None:
            return super().places(model)
        shares = {key: value for key, value in (self.method or {}).items() if key != "name"}
        return peft_places.targeted(model, self, S2FT(**shares), self.left_alone(model))
