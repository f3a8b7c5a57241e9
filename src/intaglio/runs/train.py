"""One run, read top to bottom: check → load → attach → train → save → score → report.

What it writes into its output folder stands in `folder`, name by name.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import write_whole
from ..model.peft_layers import model_size
from . import folder
from .config import UPDATES, AttachBlock, Config, load_config
from .peft_methods import PEFT_METHODS, peft_config
from .settings import base_digest, run_settings
from .sft_config import sft_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..core.selection import Selection
    from ..training.regime import Recorder
    from .data import Examples

__all__ = ["Run", "train"]


def train(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """Train as a run file says and write everything into its output folder.

    Args:
        source: path of a run file, or its blocks as a mapping.
        overrides: `block.key=value` strings on top.
        resume: continue from the newest complete checkpoint in the output folder (from the start, if there is none).
        overwrite: replace an earlier run in the output folder.
        allow: packages whose methods the run file may name, as `package.module:Class`; their code runs.

    Returns:
        What `run.json` holds.

    Raises:
        ValueError: for anything wrong with the run file, the data or the output folder, before weights are loaded
            wherever that can be known.

    Example:
        >>> result = train("recipes/demo.yaml", ["train.max_steps=20"])
        >>> result["trainable"]["entries"]
        1385856
    """
    config = load_config(source, overrides, allow=allow)
    output = folder.output_folder(config.train.get("output_dir"), source, resume=resume, overwrite=overwrite)
    run = _setup(config, output)
    checkpoint = _checkpoint(run) if resume else None
    trainer = _make_trainer(run, checkpoint)  # attaches: the last thing that a mistake of the user can stop
    trainer.settings = run.settings
    if overwrite:
        folder.remove_earlier(output)
    before = _score(run, "before") if config.evaluate is not None and config.evaluate.before else None
    training = _fit(run, trainer, checkpoint)
    adapter = _save(run, trainer)
    after = _score(run, "after") if config.evaluate is not None else None
    result = _summary(run, training, adapter, before, after)
    _report(output, result)
    return result


@dataclass
class Run:
    """What a run holds while it goes on."""

    config: Config
    output: Path
    arguments: Any  # SFTConfig
    examples: Examples
    tokenizer: PreTrainedTokenizerBase
    model: Any  # PreTrainedModel, or a PeftModel
    exclude: Selection
    settings: dict[str, Any]  # that a resumed run must share
    tuner: Any = None  # Tuner, where the method is ours
    recorders: list[Recorder] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)


def _setup(config: Config, output: Path) -> Run:
    """Check everything that needs no weights, then load the model."""
    from ..hf.models import check_available, load_model, load_tokenizer
    from .data import check_tokenizer, load_examples

    arguments = sft_config(config.train, str(output))
    check_available(config.model.name, **config.model.kwargs())
    _refuse_idle_settings(config)
    exclude = _excluded(config)
    wants_held_out = config.evaluate is not None or str(arguments.eval_strategy.value) != "no"
    examples = load_examples(config.data, hold_out=wants_held_out)
    if config.evaluate is not None and not examples.test:
        raise ValueError("evaluate: there are no held-out rows with answers to score; drop the block or give data.test")
    if str(arguments.eval_strategy.value) != "no" and not examples.held_out:
        raise ValueError(f"train.eval_strategy={arguments.eval_strategy.value}: there are no held-out rows; give data.test")
    tokenizer = load_tokenizer(config.model.name, chat_template=arguments.chat_template_path, **config.model.kwargs())
    arguments.chat_template_path = None  # it is in the tokenizer now
    check_tokenizer(tokenizer, examples)
    model = load_model(config.model.name, device=arguments.device, **config.model.kwargs())
    settings = run_settings(config, arguments, base_digest(model))
    return Run(config, output, arguments, examples, tokenizer, model, exclude, settings)


def _refuse_idle_settings(config: Config) -> None:
    """Refuse what the method as set would pass over in silence."""
    name, is_peft, chosen = config.method["name"], config.method["name"] in PEFT_METHODS, config.attached
    defaults = AttachBlock.model_validate({})
    if is_peft and config.attach != defaults:
        raise ValueError(f"attach: has no effect with method.name={name!r}; drop the block")
    idle = [key for key in UPDATES if getattr(config.attach, key) != getattr(defaults, key)]
    if idle and chosen is not None and chosen.chooser.chooses_before:
        raise ValueError(f"attach.{idle[0]}: has no effect, method.name={name!r} chooses before training; drop it")
    if "calibration" in config.data.model_fields_set and (chosen is None or not chosen.needs_probe):
        raise ValueError(f"data.calibration: has no effect, method.name={name!r} as set looks at no data; drop it")


def _excluded(config: Config) -> Selection:
    """What other adapters train, which this run must leave alone."""
    from ..adapter.delta import Delta
    from ..core.selection import Selection

    excluded = Selection()
    for given in config.attach.exclude:
        excluded = excluded.union(Delta.load(folder.adapter_of(Path(given))[0]).selection)
    return excluded


def _make_trainer(run: Run, checkpoint: Path | None) -> Any:
    """The trainer of a tuner, or of PEFT for its own methods."""
    from tqdm.auto import tqdm

    from ..adapter.delta import Delta
    from ..core.probe import Batches
    from ..hf.trainer import CheckpointedSFTTrainer, SparseTrainer, calibration_batches, probe_rows
    from ..training.attach import attach

    common: dict[str, Any] = {"args": run.arguments, "processing_class": run.tokenizer, **run.examples.datasets()}
    method, chosen, lora = dict(run.config.method), run.config.attached, run.config.attach.lora
    if chosen is None:
        trainer = CheckpointedSFTTrainer(run.model, peft_config=peft_config(method.pop("name"), method), **common)
        run.model = trainer.model
        return trainer
    if method["name"] in PEFT_METHODS:
        run.model = _with_adapter(run.model, method.pop("name"), method, run.arguments.seed)
    elif lora is not None:
        run.model = _with_adapter(run.model, "lora", lora, run.arguments.seed)
    probe = selection = None
    chooser = chosen.chooser
    if chooser.needs_probe and checkpoint is not None:
        selection = Delta.load(checkpoint).selection  # looking at data again could tip a tie
    if chosen.learns or (chooser.needs_probe and checkpoint is None):
        rows = run.examples.sample(run.config.data.calibration)
        batches = calibration_batches(run.model, rows, probe_rows(run.arguments) if chosen.learns else None, **common)
        probe = Batches(batches if chosen.learns else tqdm(batches, desc="calibrate", leave=False))
    options = {"exclude": run.exclude, "permute": run.config.attach.permute, "selection": selection}
    if not chooser.chooses_before:
        options["updates"] = run.config.attach.updates(run.arguments.gradient_accumulation_steps)
    run.tuner = attach(run.model, chosen, probe=probe, **options)
    run.recorders = [recorder for regime in run.tuner.regimes if (recorder := regime.recorder()) is not None]
    return SparseTrainer(run.tuner, **common)


def _with_adapter(model: Any, name: str, fields: dict[str, Any], seed: int) -> Any:
    """The model with a PEFT adapter on it, the same for every run of a seed."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    return get_peft_model(model, peft_config(name, fields))


def _checkpoint(run: Run) -> Path | None:
    """The newest checkpoint of the run, which must be of a run with these settings."""
    from ..hf.checkpoint import last_checkpoint, refuse_other_settings

    found = last_checkpoint(run.output)
    if found is not None:
        refuse_other_settings(found, run.settings)
    return found


def _fit(run: Run, trainer: Any, checkpoint: Path | None) -> dict[str, Any]:
    """Train; return time, memory and the loss log."""
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import TrainerState

    from .meter import StepMeter, mean_loss

    meter = StepMeter()
    trainer.add_callback(meter)
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state is not None and checkpoint is not None and _is_over(state, run.arguments):
        trainer._load_from_checkpoint(str(checkpoint))  # one more call of train would make one more update
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        state = trainer.state
    return {
        "steps": state.global_step,
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "final_loss": mean_loss(state.log_history),
        **meter.figures(),
        "history": state.log_history,
    }


def _is_over(state: Any, arguments: Any) -> bool:
    """Whether a run has made all of its updates."""
    same_epochs = arguments.max_steps <= 0 and state.num_train_epochs >= arguments.num_train_epochs
    return state.global_step >= (arguments.max_steps if arguments.max_steps > 0 else state.max_steps if same_epochs else math.inf)


def _save(run: Run, trainer: Any) -> Path:
    """Write the adapter, and the logits that `verify` compares with."""
    from .verify import save_check

    adapter = run.output / folder.ADAPTER
    for recorder in run.recorders:
        recorder.save(run.output)
    if run.tuner is not None:
        run.tuner.save(adapter)
        run.tuner.detach()
    else:
        run.model.save_pretrained(str(adapter))
    save_check(run.model, run.tokenizer, run.examples.held_out or run.examples.train, run.output / folder.CHECK)
    return adapter


def _score(run: Run, when: str) -> dict[str, Any]:
    from .answers import evaluate

    assert run.config.evaluate is not None
    score, records = evaluate(
        run.model, run.tokenizer, run.examples.test, run.config.evaluate, run.examples.verify, title=f"score {when}"
    )
    run.answers += [{"when": when} | record for record in records]
    return score.to_dict()


def _summary(
    run: Run, training: dict[str, Any], adapter: Path, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, Any]:
    if run.answers:
        lines = (json.dumps(record, default=str) for record in run.answers)
        (run.output / folder.ANSWERS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    total, trained = model_size(run.model), sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    entries = trained if run.tuner is None else run.tuner.selection.size
    return {
        "output": str(run.output),
        "config": run.config.model_dump(mode="json"),
        "versions": _versions(),
        "machine": {"processor": platform.machine(), "system": platform.system(), "device": str(run.model.device)},
        "trainable": {"entries": entries, "of": total, "share": entries / total},
        "adapter": {"path": str(adapter), "bytes": sum(f.stat().st_size for f in adapter.iterdir())},
        "training": training,
        "before": before,
        "after": after,
    }


def _report(output: Path, result: dict[str, Any]) -> None:
    from ..report.plots import plot_accuracy, plot_loss

    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / folder.RESULT, (json.dumps(result, indent=1, default=str) + "\n").encode())
    plot_loss(result["training"]["history"], output / folder.LOSS)
    if result["after"] is not None:
        plot_accuracy(result["before"], result["after"], output / folder.ACCURACY)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("intaglio", "torch", "transformers", "peft", "trl", "accelerate", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
