"""Layers in turn for a PEFT model in any Trainer, without a tuner: a callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, final

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils.generic import find_labels

from ..core.probe import Batches, Probe
from ..method_kinds.layer_method import LayerMethod
from ..methods import IST, build
from ..model.peft_layers import is_peft
from ..training.damping import Trained, bare_tensors, remember_starts
from ..training.regime import Wish
from ..training.rotation import Rotation
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
            set, of a quarter of an update's rows (so that probes are 4 % of the arithmetic), with the model's own loss. A
            Trainer whose loss reads columns of its own (DPO), or an iterable data set, needs a probe of yours.

    Attributes:
        rotation: importance, draws and visits, once training has begun.
        saved: set by a Trainer that restores callbacks itself (it makes a new one, which has the default probe).

    Raises:
        ValueError: for `of` (use `attach`), and as training begins, as `Rotation` does, under FSDP, DeepSpeed and
            nn.DataParallel, and where the training set's batches give the model no loss.

    Example:
        >>> callback = ISTCallback(IST(layers=0.25))
        >>> SFTTrainer(model, peft_config=LoraConfig(), callbacks=[callback], ...).train()
        >>> callback.rotation.importance
    """

    def __init__(self, method: LayerMethod | None = None, probe: Probe | None = None) -> None:
        self.method, self.probe = IST() if method is None else method, probe
        if self.method.of is not None:
            kind = type(self.method).__name__
            raise ValueError(
                f"ISTCallback: {kind}(of=…) needs attach(model, method) and SparseTrainer; of=None trains the model's adapter"
            )
        self.rotation: Rotation | None = None
        self.saved: dict[str, Any] | None = None
        self._tensors: dict[str, Trained] = {}
        self._step = 0
        self._handle: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_processes(args)
        if self.method.learns:  # a checkpoint may be loaded before training begins
            self._tensors = bare_tensors(kwargs["model"])
            remember_starts(kwargs["model"], self._tensors)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_processes(args)
        self._finish()
        held = state.stateful_callbacks.get(type(self).__name__, {})
        if isinstance(held, list):
            raise ValueError(f"ISTCallback: this Trainer has {len(held)} of them; layers can take turns in one way only")
        saved = held.get("attributes", {}).get("saved") or {}
        if self.saved is not None:  # the Trainer made this callback, in place of the user's
            self.method = cast(LayerMethod, build(saved["method"]))
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        probe = self.probe
        if probe is None and self.method.learns:
            probe = Batches(_sample(model, kwargs["train_dataloader"], probe_rows(args), self.method.seed))
        self.rotation, self._step = Rotation(model, self.method, Wish(probe=probe)), 0
        self.rotation.connect_tensors(self._tensors_of(model, state.global_step))
        if state.global_step:
            self.rotation.check(saved.get("method", {}), saved.get("rotation"))
            self._step = saved["step"]
            self.rotation.load(self._step, saved["method"], saved["rotation"])
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self.rotation.watch(inner)
        self._handle = inner.register_step_post_hook(self._after_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.rotation is not None and logs is not None and "loss" in logs:
            logs.update(self.rotation.log())
            state.log_history[-1].update(self.rotation.log())  # written before callbacks are asked

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finish()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds: JSON values."""
        rotation = None if self.rotation is None else self.rotation.state()
        saved = {"method": self.method.to_dict(), "rotation": rotation, "step": self._step}
        return {"args": {}, "attributes": {"saved": saved}}

    def _tensors_of(self, model: Any, updates: int) -> dict[str, Trained]:
        """What is trained, with the starts that were seen before a checkpoint was loaded."""
        tensors = bare_tensors(model)
        if {id(t.values) for t in tensors.values()} == {id(t.values) for t in self._tensors.values()}:
            return self._tensors
        if updates and self.method.learns and remember_starts(model, tensors):
            raise ValueError(
                "ISTCallback: weights outside the adapters are trained too (modules_to_save, biases), and where they started "
                "is not in the checkpoint: make the Trainer with callbacks=[ISTCallback(…)] to resume, without "
                "restore_callback_states_from_checkpoint"
            )
        return tensors

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self.rotation is not None
        self._step += 1
        self.rotation.after_step(self._step, optimizer)

    def _finish(self) -> None:
        if self._handle is not None and self.rotation is not None:
            self._handle.remove()
            self.rotation.release()
            self._handle = None


def _check_processes(args: Any) -> None:
    if args.deepspeed or args.fsdp:
        raise ValueError("ISTCallback: DeepSpeed and FSDP shard what has to rest; use one process or DDP")
    if args.n_gpu > 1:
        raise ValueError("ISTCallback: one process drives several GPUs (nn.DataParallel): set CUDA_VISIBLE_DEVICES to one")
    expect_unused_parameters(args)


def _sample(model: Any, dataloader: Any, size: int, seed: int) -> list[Mapping[str, Any]]:
    """Shuffled batches of the training set, the same for a seed; the global generator is left as it was."""
    advice = "give ISTCallback(…, probe=Batches(data, loss_fn)), or use RST, which needs none"
    if isinstance(dataloader.dataset, IterableDataset):
        raise ValueError(f"ISTCallback: an iterable training set cannot be drawn from twice; {advice}")
    generator = torch.Generator().manual_seed(seed)
    own: DataLoader[Any] = DataLoader(
        dataloader.dataset, batch_size=size, shuffle=True, collate_fn=dataloader.collate_fn, generator=generator
    )
    with torch.random.fork_rng([]):  # a collator may draw
        torch.default_generator.manual_seed(seed)
        batches: list[Mapping[str, Any]] = [dict(batch) for batch, _ in zip(own, range(_PROBE_BATCHES), strict=False)]
    labels = find_labels(type(model.get_base_model() if is_peft(model) else model))
    if labels and batches and not any(label in batches[0] for label in labels):
        raise ValueError(
            f"ISTCallback: the training set's batches hold {', '.join(sorted(batches[0]))}, of which the model makes no loss; "
            f"{advice}"
        )
    return batches
