"""The ways to train that `layers.py` compares, each at work on a model: LoRA and S2FT, whole and a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import nn

from intaglio import IST, LISA, RST, Batches, attach
from intaglio.training.rotation import Rotation
from intaglio.training.tuner import Tuner
from lib.contestants import ALL_LINEAR, Step, s2ft_method

DROPOUT = 0.05
CHECKPOINTED = " ckpt"  # ends the name of a contestant that recomputes


@dataclass(frozen=True)
class Way:
    """What is compared.

    Attributes:
        label: in tables.
        lora: whether LoRA is put on first.
        method: rank and model → what is attached, if anything, drawing anew before every update.
    """

    label: str
    lora: bool
    method: Callable[[nn.Module, int], Any] = lambda model, rank: None


# LISA draws every 20 updates; here before each one, which costs the same and shows more draws.
WAYS = {
    "lora": Way("LoRA", True),
    "ist any": Way("LoRA + IST any", True, lambda model, rank: IST()),
    "ist contiguous": Way("LoRA + IST contiguous", True, lambda model, rank: IST(policy="contiguous")),
    "ist top": Way("LoRA + IST top", True, lambda model, rank: IST(policy="top")),
    "rst": Way("LoRA + RST", True, lambda model, rank: RST()),
    "s2ft": Way("S2FT", False, s2ft_method),
    "s2ft ist": Way("S2FT + IST any", False, lambda model, rank: IST(of=s2ft_method(model, rank))),
    "lisa": Way("LISA, 2 layers", False, lambda model, rank: LISA(redraw=1)),
}
PLAIN = tuple(WAYS)
RECOMPUTED = tuple(f"{name}{CHECKPOINTED}" for name in ("lora", "ist any", "ist top"))
LABELS = {name: way.label for name, way in WAYS.items()} | {
    name: f"{WAYS[name.removesuffix(CHECKPOINTED)].label}, checkpointed" for name in RECOMPUTED
}


class Running:
    """A contestant at work on a model.

    Args:
        name: of `LABELS`.
        model: the bare model.
        batch: what it trains on; probes are made of a quarter of its rows, as `ISTCallback` and run files make them.
        rank: LoRA's.
        changed: other fields of the method, for those that let layers rest.
        seen: called with the optimizer after each of its steps, before layers are drawn anew.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        rank: int,
        changed: Mapping[str, Any] | None = None,
        seen: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
    ) -> None:
        way = WAYS[name.removesuffix(CHECKPOINTED)]
        method = way.method(model, rank)
        if method is not None and method.chooser is not method:
            known = {field.name for field in fields(method)}
            method = replace(method, **{key: value for key, value in (changed or {}).items() if key in known})
        if name.endswith(CHECKPOINTED):
            cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
        if way.lora:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=DROPOUT, target_modules=ALL_LINEAR)
            model = get_peft_model(cast(Any, model), config, autocast_adapter_dtype=False)
        self.model, self.tuner = model, None
        if method is None:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        else:
            rows = max(1, len(batch["input_ids"]) // 4)
            probe = Batches([{key: tensor[:rows] for key, tensor in batch.items()}])
            self.tuner = attach(model, method, probe=probe)
            parameters = self.tuner.parameters()
        self._seen = seen
        self.step = Step(model, parameters, self._watch)
        self.rotation: Rotation | None = None if self.tuner is None else self.tuner.rotation
        self._start = None if self.rotation is None else self.rotation.state()

    @property
    def active(self) -> list[int] | None:
        """The layers that train now; None: all."""
        return None if self.rotation is None else list(self.rotation.active)

    def restart(self) -> None:
        """Draw again what was drawn from the start."""
        if self.rotation is not None and self._start is not None:
            cast(Tuner, self.tuner).step = 0
            self.rotation.load(self._start)

    def with_first_layer(self) -> bool:
        """Let layer 0 be among those that train now, where that can ever be; the most that backward can need."""
        if self.rotation is None or self.rotation.method.policy == "top":
            return False
        active = list(range(len(self.rotation.active)))
        if self.rotation.method.policy == "any" and 0 not in self.rotation.active:
            active = [0, *self.rotation.active[1:]]
        elif self.rotation.method.policy == "any":
            active = self.rotation.active
        self.rotation.load(self.rotation.state() | {"active": active})
        return True

    def _watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_post_hook(lambda stepped, *_: self._seen(stepped))
        return optimizer if self.tuner is None else self.tuner.watch(optimizer)
