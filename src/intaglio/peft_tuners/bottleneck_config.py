"""The config of bottleneck adapters (series and parallel), a PEFT type of our own.

PEFT has none, and the library that does, `adapters` 1.3, asks for transformers 4.57.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..method_kinds import fields
from .base_config import PeftTypeName, TargetedConfig, help_text

__all__ = ["ACTIVATIONS", "TARGET_ROLES", "BottleneckConfig"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
BIASES = ("none", "all", "bottleneck_only")
TARGET_ROLES = {"series": ("o", "down"), "parallel": ("q", "k", "v", "up", "down")}  # by placement, unless the config says


@dataclass
class BottleneckConfig(TargetedConfig):
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

    TYPE = PeftTypeName("INTAGLIO_BOTTLENECK")

    bottleneck_size: int = field(default=256, metadata=help_text("dimensions between the two layers"))
    placement: str = field(default="series", metadata=help_text("series or parallel"))
    activation: str = field(default="relu", metadata=help_text("the nonlinearity: relu, gelu, silu or tanh"))
    scaling: float = field(default=1.0, metadata=help_text("factor on what the adapter adds"))
    dropout: float = field(default=0.0, metadata=help_text("probability, on what the adapter reads"))
    bias: str = field(default="none", metadata=help_text("biases of the base that are trained: none, all or bottleneck_only"))

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.refuse(type(self).__name__, [*self._problems()])

    def _problems(self) -> Iterator[str]:
        yield from fields.count("bottleneck_size", self.bottleneck_size)
        for name, allowed in (("placement", TARGET_ROLES), ("activation", ACTIVATIONS), ("bias", BIASES)):
            yield from fields.choice(name, getattr(self, name), allowed)
        yield from fields.number(
            "scaling", self.scaling, "a finite number other than 0", low=math.inf if self.scaling == 0 else -math.inf
        )
        yield from fields.number("dropout", self.dropout, "a probability below 1", low=0.0, high=math.nextafter(1.0, 0.0))
        yield from self.target_problems()
