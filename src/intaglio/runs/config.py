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

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, create_model, field_validator, model_validator

from ..method_kinds.method import Method
from ..methods import METHODS
from ..training.updates import Updates
from .methods import build_blocks
from .peft_methods import peft_problems
from .reading import is_local
from .run_file import read_blocks, unknown_keys, with_truths
from .sft_config import train_hints, train_problems

__all__ = ["UPDATES", "AttachBlock", "Config", "DataBlock", "EvaluateBlock", "ModelBlock", "load_config"]

UPDATES = tuple(field.name for field in dataclasses.fields(Updates))  # the keys of `attach` that are fields of `Updates`


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelBlock(BaseModel):
    """The base model; keys beside its name go to `from_pretrained` verbatim (dtype, revision, attn_implementation …)."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field("smollm2-135m", description="hub name, local folder, or the embedded smollm2-135m")

    def kwargs(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataBlock(_Block):
    """The examples: exactly one of `task` and `train`."""

    task: str | None = Field(None, description="reasoning_gym/NAME: generated examples whose answers can be verified")
    settings: dict[str, Any] = Field({}, description="settings of the task, as reasoning_gym names them")
    train_size: int = Field(2000, ge=1, description="training examples of a task")
    test_size: int = Field(200, ge=1, description="held-out examples of a task, or drawn from `train` if `test` is absent")
    train: str | None = Field(
        None, description="a .jsonl, .json, .csv, .tsv, .parquet or .txt file (the text ones also .gz), or a hub data set"
    )
    test: str | None = Field(None, description="likewise, held out")
    subset: str | None = Field(None, description="subset of a hub data set")
    split: str = Field("train", description="split of a hub data set to train on")
    test_split: str = Field("test", description="split of a hub data set held out, used if `test` is given")
    streaming: bool = Field(False, description="read a hub data set while training, without a copy; needs train.max_steps")
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
        if self.streaming and (self.train is None or is_local(self.train)):
            raise ValueError("`streaming` has no effect but on a hub data set; files are never read whole anyway")
        return self


class _OwnKeys(_Block):
    """The keys of an attach block that are not those of `Updates`."""

    permute: bool = Field(False, description="reorder chosen heads and channels so that their slices are dense; same result")
    exclude: list[str] = Field([], description="adapter folders whose entries stay frozen, so that the results can be fused")
    lora: dict[str, Any] | None = Field(
        None, description="fields of LoraConfig: put LoRA on the model first, choose among its tensors"
    )


def _update_keys() -> dict[str, Any]:
    """The fields of `Updates` as keys of a block, with its names, types, defaults and meanings."""
    hints = typing.get_type_hints(Updates)
    keys: dict[str, Any] = {
        field.name: (hints[field.name], Field(field.default, description=field.metadata["help"]))
        for field in dataclasses.fields(Updates)
    }
    meaning = f"{keys['accumulation'][1].description}; exact where there are several passes"
    return keys | {"accumulation": (hints["accumulation"] | None, Field(None, description=meaning))}


class AttachBlock(create_model("AttachKeys", __base__=_OwnKeys, **_update_keys())):
    """The way a method is put on the model, and how updates are made while it still chooses."""

    def updates(self, passes: int) -> Updates:
        """The options of updates of `passes` backward passes each.

        Raises:
            ValueError: for options that exclude each other.
        """
        options = {key: getattr(self, key) for key in UPDATES}
        options["accumulation"] = options["accumulation"] or ("exact" if passes > 1 else "none")
        return Updates(**options)


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
    """A whole run file, as `load_config` has checked it."""

    model: ModelBlock = Field(default_factory=lambda: ModelBlock.model_validate({}))
    method: dict[str, Any]
    schedule: dict[str, Any] | None = None
    data: DataBlock
    attach: AttachBlock = Field(default_factory=lambda: AttachBlock.model_validate({}))
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: EvaluateBlock | None = None

    _attached: Method | None = PrivateAttr(None)

    @property
    def attached(self) -> Method | None:
        """The method to attach, built once from `method` and `schedule`; None where PEFT trains by itself."""
        return self._attached


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, allow: Sequence[str] = (), build: bool = True
) -> Config:
    """Read and check a run file.

    Args:
        source: path of a YAML file, or the blocks as a mapping.
        overrides: `block.key=value` strings; values are YAML (`train.learning_rate=1e-3`). A whole block is replaced by
            a mapping: `method={name: lora, r: 8}`.
        allow: packages whose methods may be named, as `package.module:Class`; their code runs.
        build: check and build the method; default True. A command that trains nothing does not, so that no code of a method
            runs because a run's folder names it.

    Raises:
        ValueError: all problems in one message, a line each: what is wrong, and the nearest known key.
    """
    raw = read_blocks(source, overrides, known=Config.model_fields)
    if isinstance(raw.setdefault("method", {}), dict):
        raw["method"] = {"name": "s2ft"} | raw["method"]
    raw |= {name: with_truths(block, _hints(name, block)) for name, block in raw.items() if isinstance(block, dict)}
    config, problems = _validated(raw)
    method, wrong = build_blocks(raw["method"], raw.get("schedule"), allow) if build else (None, [])
    problems += wrong + train_problems(raw.get("train"))
    if config is not None:
        problems += peft_problems("attach.lora", "lora", config.attach.lora or {}) + _update_problems(config)
        config._attached = method
    if problems:
        lead = "" if len(problems) == 1 else f"{len(problems)} problems in the run file:\n  "
        raise ValueError(lead + "\n  ".join(problems))
    assert config is not None
    return config


def _validated(raw: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """The blocks as a `Config`, or what is wrong with their keys and values."""
    try:
        return Config.model_validate(raw), []
    except ValidationError as error:
        return None, [_explain(e) for e in error.errors()]


def _explain(error: Any) -> str:
    *blocks, key = (str(step) for step in error["loc"])
    where = ".".join((*blocks, key))
    if error["type"] == "extra_forbidden":
        return unknown_keys(".".join(blocks), [key], list(_keys(*blocks)))[0]
    if error["type"] == "missing":
        return f"{where}: missing; every run file needs it"
    given = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{given}"


def _keys(block: str | None = None) -> Mapping[str, Any]:
    """The keys that a block knows, or the blocks of a run file."""
    if block is None:
        return Config.model_fields
    annotation = Config.model_fields[block].annotation
    kinds = (*typing.get_args(annotation), annotation)  # of a block that may be absent, or of one that may not
    return next(kind.model_fields for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))


def _hints(name: str, block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The types of a block's keys, as far as they are known."""
    if name == "train":
        return train_hints()
    if name in ("method", "schedule"):
        cls = METHODS.get(str(block.get("name")))
        return {} if cls is None else {field.name: field.type for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return {key: field.annotation for key, field in _keys(name).items()} if name in Config.model_fields else {}


def _update_problems(config: Config) -> list[str]:
    """Options of updates that exclude each other, as far as the run file alone says."""
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
