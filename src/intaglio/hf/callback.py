"""Layers in turn for a PEFT model in any Trainer, without a tuner: a callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, final

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..layer_method import LayerMethod
from ..methods import IST, build
from ..parts import bare_parts
from ..probe import Batches, Probe
from ..rotation import Rotation
from .trainer import expect_unused_parameters, probe_rows

__all__ = ["ISTCallback"]

_PROBE_BATCHES = 64


@final
class ISTCallback(TrainerCallback, ExportableState):
    """Lets the layers of a PEFT model train in turn: `Trainer(model=peft_model, callbacks=[ISTCallback()])`.

    The Trainer builds its optimizer over every adapter tensor first; layers rest from the first update on. Layers are drawn
    after an optimizer step, so one draw holds for all passes of an accumulation window. What a resumed run needs is in the
    checkpoint's `trainer_state.json`, and is read from there, whatever `restore_callback_states_from_checkpoint` says.

    Args:
        method: `IST(...)`, `RST(...)` or `LISA(of=None)`; default `IST()`.
        probe: batches that importance is learned from, and their loss; default up to 64 shuffled batches of the training
            set, of a quarter of an update's rows (so that probes cost less than 4 % of a run), with the model's own loss. A
            Trainer whose loss reads columns of its own (DPO), or an iterable data set, needs a probe of yours.

    Attributes:
        rotation: importance, draws and visits, once training has begun.
        saved: set by a Trainer that restores callbacks itself (it makes a new one, which has the default probe).

    Raises:
        ValueError: for `of` (use `attach`), and as training begins, as `Rotation` does, or under FSDP and DeepSpeed.

    Example:
        >>> callback = ISTCallback(IST(layers=0.25))
        >>> SFTTrainer(model, peft_config=LoraConfig(), callbacks=[callback], ...).train()
        >>> callback.rotation.importance
    """

    def __init__(self, method: LayerMethod | None = None, probe: Probe | None = None) -> None:
        self.method, self.probe = IST() if method is None else method, probe
        if self.method.of is not None:
            raise ValueError(f"ISTCallback: {type(self.method).__name__}(of=…) needs attach(model, method) and SparseTrainer")
        self.rotation: Rotation | None = None
        self.saved: dict[str, Any] | None = None
        self._step = 0
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed or args.fsdp:
            raise ValueError("ISTCallback: DeepSpeed and FSDP shard what has to rest; use one process or DDP")
        expect_unused_parameters(args)
        self._finish()
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("saved") or {}
        if self.saved is not None:  # the Trainer made this callback, in place of the user's
            self.method = cast(LayerMethod, build(saved["method"]))
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        probe = self.probe
        if probe is None and self.method.learns:
            probe = Batches(_sample(kwargs["train_dataloader"], probe_rows(args), self.method.seed))
        self.rotation, self._step = Rotation(model, self.method, bare_parts(model), probe), state.global_step
        if state.global_step:
            self.rotation.check(saved.get("method", {}), saved.get("rotation"))
            self.rotation.load(saved["rotation"])
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self.rotation.watch(inner)
        self._handle = inner.register_step_post_hook(self._after_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.rotation is not None and logs is not None and "loss" in logs and self.method.learns:
            seconds = {"probe_seconds": round(self.rotation.seconds, 2)}
            logs.update(seconds)
            state.log_history[-1].update(seconds)  # written before callbacks are asked

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finish()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds: JSON values."""
        rotation = None if self.rotation is None else self.rotation.state()
        return {"args": {}, "attributes": {"saved": {"method": self.method.to_dict(), "rotation": rotation}}}

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self.rotation is not None
        self._step += 1
        self.rotation.advance(self._step, optimizer)

    def _finish(self) -> None:
        if self._handle is not None and self.rotation is not None:
            self._handle.remove()
            self.rotation.release()
            self._handle = None


def _sample(dataloader: Any, size: int, seed: int) -> list[Mapping[str, Any]]:
    """Shuffled batches of the training set, the same for a seed, without a draw from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    own: DataLoader[Any] = DataLoader(
        dataloader.dataset, batch_size=size, shuffle=True, collate_fn=dataloader.collate_fn, generator=generator
    )
    return [dict(batch) for batch, _ in zip(own, range(_PROBE_BATCHES), strict=False)]
