"""The common part of our PEFT configs: a type's name from outside PEFT's enum, and the fields that say where an adapter goes."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..method_kinds.fields import refuse

__all__ = ["PeftTypeName", "TargetedConfig", "help_text"]


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


def help_text(text: str) -> dict[str, str]:
    """Metadata that command lines built from dataclasses read."""
    return {"help": text}


@dataclass
class TargetedConfig(PeftConfig):
    """The fields by which PEFT's configs say where an adapter goes; each means what it means there.

    Args:
        target_modules: names of modules or their ends, a regex, or "all-linear".
        exclude_modules: modules that are left alone, likewise.
        layers_to_transform: numbers of the layers that are adapted; with None all.
        layers_pattern: name of the list that holds the layers, where it is not found by itself.
        modules_to_save: modules trained and saved whole, e.g. a classifier.
        trainable_token_indices: tokens whose embeddings are trained too.
        init_weights: False starts away from the base, for tests.
    """

    TYPE: ClassVar[PeftTypeName]

    target_modules: list[str] | str | None = field(default=None, metadata=help_text("modules that are adapted"))
    exclude_modules: list[str] | str | None = field(default=None, metadata=help_text("modules that are left alone"))
    layers_to_transform: list[int] | int | None = field(default=None, metadata=help_text("layers that are adapted"))
    layers_pattern: list[str] | str | None = field(default=None, metadata=help_text("name of the list of layers"))
    modules_to_save: list[str] | None = field(default=None, metadata=help_text("modules trained and saved whole"))
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata=help_text("tokens whose embeddings are trained")
    )
    init_weights: bool = field(default=True, metadata=help_text("False starts away from the base, for tests"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.TYPE  # type: ignore[assignment]  # PEFT looks types up as strings

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read a saved config, each field of which must be of its type: PEFT takes whatever JSON holds.

        Raises:
            ValueError: naming the file and every such field, or where it is no JSON.
        """
        loaded, hints = super().from_json_file(path_json_file, **kwargs), typing.get_type_hints(cls)
        known = [name for name in hints if name in loaded]
        refuse(f"{path_json_file}: damaged", [p for name in known for p in _mistyped(name, loaded[name], hints[name])])
        return loaded

    def target_problems(self) -> Iterator[str]:
        """What excludes each other among these fields, in the words of PEFT's own configs."""
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            yield "`layers_to_transform` cannot be used when `target_modules` is a str; give a list, or name the layers in it"
        if self.layers_pattern and self.layers_to_transform is None:
            yield "When `layers_pattern` is specified, `layers_to_transform` must also be specified"


def _mistyped(name: str, value: Any, hint: Any) -> list[str]:
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError:
        return [f"{name}={value!r:.80}: wanted is {str(hint).replace('typing.', '')}"]
    return []
