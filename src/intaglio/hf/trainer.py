"""TRL's SFTTrainer over a tuner: its checkpoints hold the adapter and O(budget) state, never the model.

checkpoint-N/
  adapter_config.json, adapter_model.safetensors    the Delta, loadable on its own
  tuner_state.safetensors                           values in full precision, step, the method's state
  optimizer.pt, scheduler.pt, rng_state.pth, …      the Trainer's own files; optimizer.pt is O(budget)
  complete.json                                     written last: a folder without it is a torn write
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.sft_trainer import SFTTrainer

from ..core.probe import label_count
from ..training import ranks
from .checkpoint import load_tuner_state, mark_complete, save_tuner_state

if TYPE_CHECKING:
    from ..training.tuner import Tuner

__all__ = [
    "CheckpointedSFTTrainer",
    "SparseMixin",
    "SparseTrainer",
    "calibration_batches",
    "expect_unused_parameters",
    "optimizer_cls_and_kwargs",
    "probe_rows",
]


class _Marked:
    """Mixin: marks each checkpoint complete once all of it is on disk.

    Attributes:
        settings: of the run, which every checkpoint of it carries.
    """

    settings: Mapping[str, Any] = MappingProxyType({})

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # an older one goes when this one is complete
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]  # a Trainer's
        finally:
            self.args.save_total_limit = limit
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        ranks.wait()  # every process has written its random state
        if not self.args.should_save:
            return
        if folder.exists() and not self.args.save_only_model:
            mark_complete(folder, self.state.global_step, self.settings)
        rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the adapter has its own, and the Trainer's would describe a full model."""


class CheckpointedSFTTrainer(_Marked, SFTTrainer):
    """An SFTTrainer whose checkpoints are marked complete."""


class SparseMixin(_Marked):
    """Makes any Trainer train an attached model: `class SparseDPOTrainer(SparseMixin, DPOTrainer): pass`.

    Args:
        tuner: what `attach` returned; its model is trained.
        kwargs: the Trainer's arguments, without `model` and `peft_config`.

    Raises:
        ValueError: under DeepSpeed or FSDP, and where gradients add up over several passes in a way that the tuner was not told.
    """

    def __init__(self: Any, tuner: Tuner, **kwargs: Any) -> None:
        self.tuner = tuner
        super().__init__(model=tuner.model, **kwargs)  # type: ignore[call-arg]  # a Trainer's
        if kwargs.get("ref_model") is None:
            self._take_as_reference()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.fsdp:
            raise ValueError(
                "DeepSpeed and FSDP shard the weights that sparse training writes to; leave them out: every process "
                "then holds the model, and only what is trained travels"
            )
        if self.args.n_gpu > 1:
            raise ValueError("one process drives several GPUs (nn.DataParallel): set CUDA_VISIBLE_DEVICES to one of them")
        # The slots average their own gradients; DistributedDataParallel would have nothing to do, or do it twice.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        for regime in tuner.regimes:
            regime.measure_by(self._probe_loss)
            regime.expect(passes=self.args.gradient_accumulation_steps)
        self.add_callback(_Length(tuner))
        checkpointing: Any = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            model: Any = tuner.model
            model.enable_input_require_grads()  # else the frozen embedding cuts every gradient off

    def _take_as_reference(self: Any) -> None:
        """Let the reference of DPO, GRPO and their kin be the model as it is before this training.

        Their trainers read it by the name that the model was loaded by: the base of an earlier training, if there was one.
        """
        reference = getattr(self, "ref_model", None)
        if reference is not None:
            self.accelerator.unwrap_model(reference).load_state_dict(self.tuner.model.state_dict())

    def create_optimizer(self: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `train.optim` names, over the slots alone; norms and biases are not decayed, as usual."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.tuner.model))
            groups: list[dict[str, Any]] = [
                {"params": [s.values for s in self.tuner.slots if s.name in decayed], "weight_decay": self.args.weight_decay},
                {"params": [s.values for s in self.tuner.slots if s.name not in decayed], "weight_decay": 0.0},
            ]
            given = self.optimizer_cls_and_kwargs
            cls, kwargs = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = self.tuner.watch(cls([group for group in groups if group["params"]], **kwargs))
        return self.optimizer

    def _probe_loss(self: Any, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The trainer's own loss, without a trace in its metrics."""
        kept = {key: copy.deepcopy(vars(self)[key]) for key in ("_metrics", "_stored_metrics") if key in vars(self)}
        count = ranks.total(torch.tensor(label_count(model, batch))) if self.compute_loss_func is not None else None
        loss = self.compute_loss(model, dict(batch), num_items_in_batch=count)
        vars(self).update(kept)
        return loss

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; gradients travel with the last pass of an update only."""
        self.tuner.slots.averaging.waits = not self.accelerator.sync_gradients
        return super().training_step(*args, **kwargs)  # type: ignore[misc]  # a Trainer's

    def _clip_grad_norm(self: Any, model: nn.Module) -> Tensor:
        return self.tuner.clip_grad_norm_(self.args.max_grad_norm)

    def log(self: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log what the regimes have to say beside the loss."""
        if "loss" in logs:
            for regime in self.tuner.regimes:
                logs |= regime.log()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # a Trainer's

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = self.tuner.save(output_dir or self.args.output_dir or ".")
        save_tuner_state(self.tuner, folder)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tuner_state(self.tuner, resume_from_checkpoint)

    def _load_best_model(self: Any) -> None:
        assert self.state.best_model_checkpoint is not None
        load_tuner_state(self.tuner, self.state.best_model_checkpoint)


class SparseTrainer(SparseMixin, SFTTrainer):
    """SFTTrainer for an attached model; arguments and errors as `SparseMixin`."""


class _Length(TrainerCallback):
    """A callback that says how many updates the run makes."""

    def __init__(self, tuner: Tuner) -> None:
        self._tuner = tuner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            for regime in self._tuner.regimes:
                regime.expect(steps=state.max_steps)
        except ValueError as error:
            if self._tuner.step == 0:
                raise
            raise ValueError(
                f"resume: the checkpoint's run is of another length: {error}; set max_steps (or epochs) back, or start anew"
            ) from error


def expect_unused_parameters(args: Any) -> None:
    """Tell DistributedDataParallel that idle layers get no gradient.

    Raises:
        ValueError: where the user has told it otherwise.
    """
    if args is None or args.world_size == 1:
        return
    if args.ddp_find_unused_parameters is False:
        raise ValueError(
            "ddp_find_unused_parameters=False: idle layers get no gradient, and DDP would wait for it; set it to True"
        )
    args.ddp_find_unused_parameters = True


def optimizer_cls_and_kwargs(
    tuner: Tuner, cls: type[torch.optim.Optimizer] = torch.optim.AdamW, **kwargs: Any
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The argument of `Trainer(model=tuner.model, optimizer_cls_and_kwargs=…)`, for a Trainer that cannot be subclassed.

    The optimizer is made over the slots, each in the group (weight decay or not) of its weight. Such a Trainer saves whole
    models in its checkpoints; `SparseMixin` saves adapters. A method that needs the length of the run must be given it.

    Args:
        tuner: what `attach` returned.
        cls: the optimizer.
        kwargs: its arguments.

    Example:
        >>> trainer = Trainer(model=tuner.model, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(tuner, lr=1e-4), ...)
    """

    for regime in tuner.regimes:
        regime.refuse_optimizer(cls)

    def begin(self: torch.optim.Optimizer, groups: list[dict[str, Any]], **options: Any) -> None:
        ours = []
        for group in groups:
            members = {id(p) for p in group["params"]}
            mine = [s.values for s in tuner.slots if id(s.target if s.target.requires_grad else s.values) in members]
            ours.append(group | {"params": mine})
        cls.__init__(self, [group for group in ours if group["params"]], **options)
        tuner.watch(self)

    # A class, since the Trainer takes any other callable for a factory over the whole model.
    return type(f"Sparse{cls.__name__}", (cls,), {"__init__": begin}), kwargs


def probe_rows(args: Any) -> int:
    """Rows of a probe's batch that cost a quarter of an update: 3 forward passes per 10 updates are 4 % of the arithmetic."""
    return max(1, args.per_device_train_batch_size * args.gradient_accumulation_steps // 4)


def calibration_batches(model: nn.Module, rows: Dataset, size: int | None = None, **kwargs: Any) -> list[dict[str, Any]]:
    """Rows as SFTTrainer would feed them: templated, tokenized, masked and collated.

    Args:
        model: the model that will train; only its tokenizer-side settings are read.
        rows: training rows, as the Trainer takes them.
        size: rows of a batch; default that of training.
        kwargs: SFTTrainer's arguments; its data sets are replaced by `rows`.
    """
    arguments = copy.deepcopy(kwargs["args"])
    # Every row, and each a row of its own: gradients are taken example by example.
    arguments.dataloader_drop_last = arguments.packing = arguments.padding_free = False
    arguments.eval_strategy, arguments.do_eval, arguments.load_best_model_at_end = "no", False, False
    arguments.per_device_train_batch_size = size or arguments.per_device_train_batch_size
    replaced = {"args": arguments, "train_dataset": rows, "eval_dataset": None}
    trainer = SFTTrainer(model, **(kwargs | replaced))  # type: ignore[arg-type]  # a PreTrainedModel
    return [dict(batch) for batch in trainer.get_train_dataloader()]
