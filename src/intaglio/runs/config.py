"""The run file: seven blocks, strict keys, every problem reported at once and before anything is loaded.

model:     name, and arguments of `from_pretrained`
method:    name, and the method's fields (a PEFT config's for `lora` and `bottleneck`)
schedule:  which layers train when: the name of a method that trains them in turn, and its fields
data:      where examples come from
attach:    how the method is put on the model
train:     SFTConfig keys, verbatim
evaluate:  how answers are generated and scored
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..method_kinds.method import Method
from ..method_kinds.layer_method import LayerMethod
from ..methods import METHODS, build, nearest
from .peft_methods import PEFT_METHODS, peft_problems
from ..training.updates import Updates

__all__ = ["AttachBlock", "Config", "DataBlock", "EvaluateBlock", "ModelBlock", "load_config", "sft_config"]

UPDATES = tuple(field.name for field in dataclasses.fields(Updates))


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelBlock(BaseModel):
    """Which model; further keys go to `from_pretrained` verbatim (dtype, revision, attn_implementation …)."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field("smollm2-135m", description="hub name, local folder, or the embedded smollm2-135m")

    def kwargs(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataBlock(_Block):
    """Exactly one of `task` and `train`."""

    task: str | None = Field(None, description="reasoning_gym/NAME: generated examples whose answers can be verified")
    settings: dict[str, Any] = Field({}, description="settings of the task, as reasoning_gym names them")
    train_size: int = Field(2000, ge=1, description="training examples of a task")
    test_size: int = Field(200, ge=1, description="held-out examples of a task, or drawn from `train` if `test` is absent")
    train: str | None = Field(None, description="a .jsonl, .json, .csv or .parquet file, or a hub data set")
    test: str | None = Field(None, description="likewise, held out")
    subset: str | None = Field(None, description="subset of a hub data set")
    split: str = Field("train", description="split of a hub data set to train on")
    test_split: str = Field("test", description="split of a hub data set held out, used if `test` is given")
    columns: dict[str, str] = Field({}, description="our name → your column, e.g. {prompt: question, completion: answer}")
    chat: bool = Field(False, description="wrap prompt and completion strings in the model's chat template")
    seed: int = Field(0, description="of generation and of the held-out draw")
    calibration: int | float = Field(
        0.01, gt=0, description="training examples a method may look at before training: a count, or a share (8 to 256 examples)"
    )

    @field_validator("calibration")
    @classmethod
    def _share(cls, size: int | float) -> int | float:
        if isinstance(size, float) and size > 1:
            raise ValueError("a share must be at most 1.0; for a count give a whole number")
        return size

    @model_validator(mode="after")
    def _one_source(self) -> DataBlock:
        if (self.task is None) == (self.train is None):
            raise ValueError("give exactly one of `task` (reasoning_gym/NAME) and `train` (a file or a hub data set)")
        if self.task is not None and self.test is not None:
            raise ValueError("`test` has no effect with `task`; set test_size")
        return self


class AttachBlock(_Block):
    """How the method is put on the model."""

    permute: bool = Field(False, description="reorder chosen heads and channels so that their slices are dense; same result")
    exclude: list[str] = Field([], description="adapter folders whose entries stay frozen, so that the results can be fused")
    lora: dict[str, Any] | None = Field(
        None, description="fields of LoraConfig: put LoRA on the model first, choose among its tensors"
    )
    accumulation: Literal["none", "exact", "lean"] | None = Field(
        None, description="how gradients of several passes add up while entries are chosen; exact where there are several passes"
    )
    oversampling: int = Field(10, ge=1, description="candidates kept per entry to be chosen under accumulation: lean")
    bias_correction: Literal["global", "per_entry"] = Field(
        "global", description="Adam's correction by the update's number, or by the entry's age"
    )
    clip: Literal["selected", "dense"] = Field(
        "selected", description="the norm that max_grad_norm bounds: of the chosen entries' gradient, or of the whole"
    )
    decay: Literal["zero", "start"] = Field("zero", description="what weight decay pulls toward: zero, or the base's value")

    def updates(self, passes: int) -> Updates:
        """How updates are made with `passes` backward passes each.

        Raises:
            ValueError: for options that exclude each other.
        """
        options = {key: getattr(self, key) for key in UPDATES if key != "accumulation"}
        return Updates(accumulation=self.accumulation or ("exact" if passes > 1 else "none"), **options)


class EvaluateBlock(_Block):
    """Greedy generation on the held-out examples."""

    before: bool = Field(True, description="also score the model before training")
    limit: int | None = Field(None, ge=1, description="score only the first examples")
    batch_size: int = Field(32, ge=1, description="prompts generated at a time")
    max_new_tokens: int = Field(32, ge=1, description="tokens generated at most")
    match: Literal["task", "exact"] = Field("task", description="right is what the task's own check says, or equal strings only")
    extract: str | None = Field(None, description="regular expression; its last match in the output is the answer")

    @field_validator("extract")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
        return pattern


class Config(_Block):
    """A whole run file."""

    model: ModelBlock = Field(default_factory=lambda: ModelBlock.model_validate({}))
    method: dict[str, Any]
    schedule: dict[str, Any] | None = None
    data: DataBlock
    attach: AttachBlock = Field(default_factory=lambda: AttachBlock.model_validate({}))
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: EvaluateBlock | None = None

    def build(self) -> Method | None:
        """The method to attach, layers in turn included; None where PEFT trains by itself.

        Raises:
            ValueError: for fields out of range.
        """
        of = None if self.method["name"] in PEFT_METHODS else self.method
        if self.schedule is None:
            return None if of is None else build(of)
        return build(self.schedule | ({} if of is None else {"of": of}), "schedule")


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read and check a run file.

    Args:
        source: path of a YAML file, or the blocks as a mapping.
        overrides: `block.key=value` strings; values are YAML (`train.learning_rate=1e-3`). A whole block is replaced by
            a mapping: `method={name: lora, r: 8}`.

    Raises:
        ValueError: all problems in one message, a line each: what is wrong, and the nearest known key.
    """
    raw = _read(source)
    for override in overrides:
        _override(raw, override)
    if isinstance(raw.setdefault("method", {}), dict):
        raw["method"] = {"name": "s2ft"} | raw["method"]
    problems: list[str] = []
    config = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(e) for e in error.errors()]
    problems += _method_problems(raw["method"])
    problems += _schedule_problems(raw.get("schedule"))
    problems += _train_problems(raw.get("train", {}))
    problems += peft_problems("attach.lora", "lora", (config.attach.lora if config else None) or {})
    problems += [] if config is None else _update_problems(config)
    if problems:
        lead = "" if len(problems) == 1 else f"{len(problems)} problems in the run file:\n  "
        raise ValueError(lead + "\n  ".join(problems))
    assert config is not None
    return config


def sft_config(train: Mapping[str, Any], output_dir: str) -> Any:
    """SFTConfig from the train block.

    Defaults are TRL's, but for: no reporting service unless `report_to` names one, bf16 only on a GPU, and no
    activation checkpointing (what a sparse method keeps for backward is small; set it where memory is short).

    Raises:
        ValueError: where SFTConfig refuses a value.
    """
    import torch
    from trl.trainer.sft_config import SFTConfig

    gpu = torch.cuda.is_available()
    ours: dict[str, Any] = {"report_to": "none", "bf16": gpu, "dataloader_pin_memory": gpu}
    checkpointing = ("activation_checkpointing", "gradient_checkpointing")  # the new name, and that of transformers < 5.20
    if not train.keys() & set(checkpointing):
        known = {f.name for f in dataclasses.fields(SFTConfig)}
        ours[next(name for name in checkpointing if name in known)] = False
    fields: dict[str, Any] = ours | {"output_dir": output_dir} | dict(train)
    try:
        return SFTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {str(error).splitlines()[0]}") from error


def _update_problems(config: Config) -> list[str]:
    """What is wrong with how updates are made, as far as the run file alone says."""
    problems, passes = [], config.train.get("gradient_accumulation_steps", 1)
    try:
        updates = config.attach.updates(passes if isinstance(passes, int) else 1)
        if updates.accumulation == "none" and isinstance(passes, int) and passes > 1:
            problems.append(f"attach.accumulation=none: train.gradient_accumulation_steps={passes}; take exact or lean")
    except ValueError as error:
        problems.append(f"attach: {error}")
    steps, run = config.method.get("steps"), config.train.get("max_steps", -1)
    if isinstance(steps, int) and isinstance(run, int) and 0 < run != steps:
        problems.append(f"method.steps={steps}: train.max_steps={run}; leave steps out, or make them agree")
    return problems


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{path}: no such run file")
    try:
        raw = _parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a run file holds the blocks {', '.join(Config.model_fields)}")
    return raw


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as every user means it (YAML 1.1 wants 1.0e-3)."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, ("tag:yaml.org,2002:float", _FLOAT))


def _parse(text: str) -> Any:
    """One YAML document of plain values; a tag that would build an object is an error."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    steps = path.split(".")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"override {override!r}: the value is not YAML; put quotes around the argument for the shell, and around a "
            "value that begins with * or [ for YAML"
        ) from error
    if not equals or not all(steps) or (len(steps) < 2 and not isinstance(value, dict)):
        raise ValueError(f"override {override!r}: write block.key=value, e.g. train.learning_rate=1e-3")
    place = raw
    for step in steps[:-1]:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            raise ValueError(f"override {override!r}: {step!r} is not a block")
    place[steps[-1]] = value


def _explain(error: Any) -> str:
    where = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        block, _, key = where.rpartition(".")
        known = Config.model_fields if not block else _fields_of(block)
        return f"{where}: unknown key; {nearest(key, list(known))}"
    if error["type"] == "missing":
        return f"{where}: missing; every run file needs it"
    given = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{given}"


def _fields_of(block: str) -> list[str]:
    blocks: dict[str, type[BaseModel]] = {
        "model": ModelBlock,
        "data": DataBlock,
        "attach": AttachBlock,
        "evaluate": EvaluateBlock,
    }
    return list(blocks[block].model_fields)


def _method_problems(method: Any) -> list[str]:
    if not isinstance(method, dict):
        return []  # pydantic has said so
    name = method.get("name")
    if isinstance(name, str) and name in PEFT_METHODS:
        return peft_problems("method", name, {key: value for key, value in method.items() if key != "name"})
    if not isinstance(name, str) or name not in METHODS:
        return [f"method.name={name!r}: unknown; {nearest(str(name), [*METHODS, *PEFT_METHODS])}"]
    try:
        build(method)
    except ValueError as error:
        return [str(error)]
    return []


def _schedule_problems(schedule: Any) -> list[str]:
    if not isinstance(schedule, dict):
        return []  # none, or pydantic has said so
    in_turn = [name for name, cls in METHODS.items() if issubclass(cls, LayerMethod)]
    if schedule.get("name") not in in_turn:
        return [f"schedule.name={schedule.get('name')!r}: unknown; {nearest(str(schedule.get('name')), in_turn)}"]
    if "of" in schedule:
        return ["schedule.of: what is trained in a layer is the method block's; leave it out"]
    try:
        build(schedule, "schedule")
    except ValueError as error:
        return [str(error)]
    return []


def _train_problems(train: Any) -> list[str]:
    if not isinstance(train, dict) or not train:
        return []
    from trl.trainer.sft_config import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    problems = _unknown("train", train.keys(), [f.name for f in dataclasses.fields(SFTConfig)])
    if not isinstance(train.get("output_dir", ""), str):
        problems.append(f"train.output_dir={train['output_dir']!r}: wanted is a folder's name")
    for key in train.keys() & hints.keys():
        kinds = set(typing.get_args(hints[key]) or (hints[key],))
        if kinds <= {int, float, bool, type(None)} and type(train[key]) not in kinds | ({int} if float in kinds else set()):
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
            problems.append(f"train.{key}={train[key]!r}: wanted is {wanted}")
    return problems


def _unknown(block: str, keys: Any, known: list[str]) -> list[str]:
    return [f"{block}.{key}: unknown key; {nearest(key, known)}" for key in keys if key not in known]
