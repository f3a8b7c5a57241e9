"""The config of a sparse adapter of any method, the PEFT type INTAGLIO."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..adapter.folder import CARD, FORMAT_VERSION, PEFT_TYPE, WEIGHTS, card, read_weights
from ..adapter.record import Record
from ..adapter.rest import Rest
from ..core.fingerprint import fingerprint
from ..core.probe import Probe
from ..core.selection import Selection
from ..core.version import VERSION
from ..method_kinds.fields import refuse
from ..method_kinds.method import refuse_foreign
from ..methods import build
from ..training.ranks import refuse_differing
from .base_config import PeftTypeName, TargetedConfig, help_text
from .targets import other_layers, restrict

__all__ = ["DeltaConfig"]

_RUN_TIME = ("probe", "exclude")
_PEFT_CARD = "[More Information Needed]"  # PEFT's own card, which says nothing of how to load the folder


@dataclass
class DeltaConfig(TargetedConfig):
    """A sparse adapter of any method, fresh or from a folder; its JSON is the `adapter_config.json` of a Delta.

    Args:
        method: `{"name": …, field: value, …}` as in a run file; what chooses the places of a fresh adapter.
        target_modules: modules the choice is restricted to; default all. The other restrictions are `TargetedConfig`'s.
        probe: calibration data for methods that need it; used once, never saved.
        exclude: places another adapter uses, which this one leaves alone; used once, never saved.
        parameters: name → place of a saved adapter; filled when the adapter is made.
        trainable, of, rest: number of chosen weights and of all, and the rest of the base; filled likewise.
        sha256, format_version, intaglio_version: of the saved folder.

    Raises:
        ValueError: for an unknown method or field, a method that changes its choice during training, a folder of another
            format, or fields that exclude each other.

    Example:
        >>> model = get_peft_model(base, DeltaConfig(method={"name": "random", "budget": 0.01}))
    """

    TYPE = PeftTypeName(PEFT_TYPE)

    method: dict[str, Any] | None = field(default=None, metadata=help_text("name and fields of the method that chooses"))
    parameters: dict[str, dict[str, Any]] | None = field(default=None, metadata=help_text("places of a saved adapter"))
    trainable: int | None = field(default=None, metadata=help_text("number of chosen weights"))
    of: int | None = field(default=None, metadata=help_text("number of weights in the whole base model"))
    rest: dict[str, Any] | None = field(default=None, metadata=help_text("what a saved adapter was trained over"))
    sha256: str | None = field(default=None, metadata=help_text("of the saved weights"))
    format_version: int = field(default=FORMAT_VERSION, metadata=help_text("of the saved folder"))
    intaglio_version: str = field(default=VERSION, metadata=help_text("that saved the folder"))
    probe: Probe | None = field(default=None, metadata=help_text("calibration data, never saved"))
    exclude: Selection | None = field(default=None, metadata=help_text("places another adapter uses, never saved"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._is_fixed = self.parameters is not None
        self._chosen: Selection | None = None
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"{type(self).__name__}: format version {self.format_version!r}; this release reads {FORMAT_VERSION}: "
                "use the release that wrote it"
            )
        if not self._is_fixed:
            refuse(type(self).__name__, [*self.target_problems()])
            build(self.method or {})

    @property
    def is_fixed(self) -> bool:
        """Whether the places came with the config, from a saved adapter."""
        return self._is_fixed

    @property
    def chosen(self) -> Selection | None:
        """The places of the last fresh adapter made from this config."""
        return self._chosen

    @property
    def records(self) -> dict[str, Record]:
        """`parameters`, checked."""
        if not isinstance(self.parameters, Mapping):
            raise ValueError(f"{type(self).__name__}: parameters is damaged, not a mapping")
        return {name: Record.parse(name, fields) for name, fields in self.parameters.items()}

    def check_rest(self, model: nn.Module) -> None:
        """Refuse a base that is not what a saved adapter was trained over, as far as it says.

        Raises:
            ValueError: naming the parameter.
        """
        rest = Rest.parse(self.rest)
        if rest is not None:
            saved_whole = tuple(self.modules_to_save or ())
            renewed = [name for name in rest.frozen if any(f".{part}." in f".{name}" for part in saved_whole)]
            rest.check(model, self.records, renewed)

    def choose(self, model: nn.Module) -> None:
        """Choose a fresh adapter's places in the bare base, and keep them.

        A config that is used again on the same base keeps its choice, so that copies of an adapter share their places.

        Raises:
            ValueError: for a config that was used on another base, whose adapter it still describes; and as `places`.
        """
        parameters = dict(model.named_parameters())
        chosen = self._chosen or self.places(model)
        refuse_differing(chosen)
        described = _describe(parameters, chosen)
        if self._chosen and described != self.parameters:
            raise ValueError(
                f"{type(self).__name__}: already describes an adapter of another base, with which it is saved; make a new config "
                "for this model"
            )
        self._chosen, self.parameters, self.trainable = chosen, described, chosen.size
        self.of = sum(parameter.numel() for parameter in parameters.values())
        self.rest = Rest.of(model).without(chosen).to_dict()

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
        return restrict(chosen, self)

    def left_alone(self, model: nn.Module) -> Selection:
        """What a method must not choose: `exclude`, and every layer but `layers_to_transform`.

        Raises:
            ValueError: for another model's entries, or where no layer is left.
        """
        refuse_foreign(self.exclude or Selection(), model)
        return (self.exclude or Selection()).union(other_layers(model, self))

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
        readme = Path(save_directory) / CARD
        written = readme.read_text(encoding="utf-8") if readme.exists() else ""
        if not written or _PEFT_CARD in written:  # else it is somebody's own
            named = self.base_model_name_or_path
            base = named if named and not Path(named).exists() else None  # a folder says nothing to others
            text = card(base, self.method or {}, self.trainable or 0, len(self.parameters or ()))
            front = written.split("---\n")[1] if written.startswith("---\n") else None  # PEFT's, which the hub reads
            own = text.split("---\n", 2)
            readme.write_text("---\n".join(own if front is None else [own[0], front, own[2]]), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read a config, and refuse a local folder whose weights are damaged: PEFT would load what it can of them.

        Raises:
            ValueError: where the config is damaged, the weights' hash is not the recorded one, or they are not what it says.
        """
        try:
            config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except RecursionError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: its config is damaged ({error})") from error
        if not isinstance(config, DeltaConfig):
            return config  # of PEFT's own type, as the folder says
        weights = Path(pretrained_model_name_or_path) / (subfolder or "") / WEIGHTS
        if weights.exists():
            _, _, more = read_weights(weights, config.records, config.sha256)
            more_named = config.modules_to_save or config.trainable_token_indices
            if more_named and not more:
                raise ValueError(f"{weights}: damaged, it holds nothing of {more_named!r}, which the config says is trained too")
        return config


def _describe(parameters: Mapping[str, nn.Parameter], selection: Selection) -> dict[str, dict[str, Any]] | None:
    """The config's `parameters` for a selection; None where it does not fit the model."""
    described = {}
    for name, entries in selection.items():
        parameter = parameters.get(name)
        if parameter is None or tuple(parameter.shape) != entries.shape:
            return None
        base = entries.to(parameter.device).gather(parameter)
        described[name] = Record.of(entries, parameter.dtype, fingerprint(base)).to_dict()
    return described
